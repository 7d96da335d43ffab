// What the files of the Python face share.
#pragma once
#include <nanobind/nanobind.h>

#include <vector>

#include "layers.h"
#include "unlocked.h"

namespace fate {

// The instruction set that is used.
const Ops& used_ops();

// Rows of the sequences of one pass; keeps the ids of their blocks, and their marks.
struct Spans {
  std::vector<Span> spans;
  std::vector<std::vector<int32_t>> blocks;
  std::vector<std::vector<Mark>> marks;
};

void bind_step(nanobind::module_& m);
void bind_predict(nanobind::module_& m);  // after what it uses: bind_residency
void bind_watch(nanobind::module_& m);

}  // namespace fate
