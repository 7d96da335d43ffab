// Rows of several sequences through a run of decoder layers, and to their logits, in one call.
#pragma once
#include <cstdint>
#include <vector>

#include "expert_memory.h"
#include "layers.h"

namespace fate {

struct StepLayer {
  int64_t index;  // of its MoE block; a layer without experts has no places
  Layer layer;
  std::vector<Mlp> shared;          // one, or none
  std::vector<ExpertPlace> places;  // of the ways in which its experts are stored
  std::vector<int> num_planes;      // of each place: all
  std::vector<int32_t> place_of;    // by expert
  int64_t angles;                   // its place in StepRows::angles
};

// What turns the last layer's result into logits.
struct Head {
  Norm norm;
  Weight weight;
};

struct Step {
  std::vector<StepLayer> layers;  // all of one hidden size
  std::vector<Head> head;         // one, or none
};

struct Angles {
  const float *cos, *sin;  // [num_rows, num_angles]
};

struct StepRows {
  void* x;  // bf16 [num_rows, hidden]: what goes into the first layer; overwritten by what comes out of the last
  const std::vector<Span>& spans;
  const std::vector<Angles>& angles;  // of each kind of rotary embedding
  const std::vector<Kv>& kv;    // by layer
  const std::vector<int64_t>& wanted;  // the rows whose logits are computed
  const std::vector<int64_t>& depths;  // of drafts: ExpertMemory::hold_back
  void* logits;                 // bf16 [wanted, vocabulary]
};

// A row's bits depend on its own sequence alone. Throws what `memory` throws, after its `release`. With `team` the threads stay together
// from the first layer to the last: not where `memory` runs code with threads of its own.
void run_step(const Ops&, const Step&, const StepRows&, ExpertMemory& memory, bool exact, bool team, int num_threads);

}  // namespace fate
