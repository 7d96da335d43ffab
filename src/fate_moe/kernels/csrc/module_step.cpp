// The Python face of the step (step.h): addresses and sizes as numbers.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "expert_memory.h"
#include "module.h"
#include "step.h"

namespace nb = nanobind;

namespace fate {
namespace {

// By sequence: its number of rows, the positions before them, its entry in the batch and the positions of that before its first; ids of
// blocks of all sequences or of none.
std::unique_ptr<Spans> make_spans(const std::vector<int64_t>& counts, const std::vector<int64_t>& pasts, const std::vector<int64_t>& entries,
                                  const std::vector<int64_t>& firsts, std::vector<std::vector<int32_t>> blocks,
                                  const std::vector<std::vector<std::pair<int64_t, int64_t>>>& marks) {
  auto made = std::make_unique<Spans>();
  made->blocks = std::move(blocks);
  made->marks.resize(marks.size());
  for (size_t i = 0; i < marks.size(); ++i)
    for (const auto& [position, entry] : marks[i]) made->marks[i].push_back({position, entry});
  int64_t begin = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    const int32_t* const ids = made->blocks.empty() ? nullptr : made->blocks.at(i).data();
    const std::vector<Mark>* const its_marks = marks.empty() ? nullptr : &made->marks.at(i);
    if (counts[i] > 0) made->spans.push_back({begin, begin + counts[i], pasts.at(i), entries.at(i), firsts.at(i), ids, its_marks});
    begin += counts[i];
  }
  return made;
}

void layer(const Layer& of, uintptr_t x, const Spans& rows, uintptr_t cos, uintptr_t sin, const Kv& kv, uintptr_t residual, uintptr_t normed,
           uintptr_t experts, uintptr_t weights, uintptr_t factors, bool exact, int num_threads) {
  const Unlocked unlocked;
  const LayerOut out = {reinterpret_cast<void*>(residual), reinterpret_cast<void*>(normed), reinterpret_cast<int64_t*>(experts),
                        reinterpret_cast<float*>(weights), reinterpret_cast<float*>(factors)};
  run_layer(used_ops(), of, reinterpret_cast<const void*>(x), rows.spans, reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin),
            kv, out, exact, num_threads);
}

std::unique_ptr<StepLayer> make_layer(int64_t index, const Layer& layer, const Mlp* shared, const std::vector<const ExpertPlace*>& places,
                                      std::vector<int> num_planes, std::vector<int32_t> place_of, int64_t angles) {
  auto made = std::make_unique<StepLayer>(StepLayer{index, layer, {}, {}, std::move(num_planes), std::move(place_of), angles});
  if (shared) made->shared.push_back(*shared);
  for (const ExpertPlace* const place : places) made->places.push_back(*place);
  return made;
}

// `angles`: the addresses of cos and sin of each kind of rotary embedding. `kv`: of each layer the addresses of keys and values, the strides
// of batch, blocks and heads, and the format.
void step(const Step& of, uintptr_t x, const Spans& rows, const std::vector<uintptr_t>& angles, const std::vector<int64_t>& kv,
          const std::vector<int64_t>& wanted, const std::vector<int64_t>& depths, uintptr_t logits, ExpertMemory& memory, bool exact, bool team,
          int num_threads) {
  std::vector<Kv> kvs;
  for (size_t i = 0; i + 6 <= kv.size(); i += 6)
    kvs.push_back({reinterpret_cast<void*>(kv[i]), reinterpret_cast<void*>(kv[i + 1]), kv[i + 2], kv[i + 3], kv[i + 4], KvFormat(kv[i + 5])});
  std::vector<Angles> turned;
  for (size_t i = 0; i + 2 <= angles.size(); i += 2)
    turned.push_back({reinterpret_cast<const float*>(angles[i]), reinterpret_cast<const float*>(angles[i + 1])});
  for (const StepLayer& layer : of.layers)
    if (size_t(layer.angles) >= turned.size()) throw std::invalid_argument("a step without the angles of a layer");
  if (kvs.size() != of.layers.size() || rows.spans.empty()) throw std::invalid_argument("a step without rows, or with another number of layers");
  const Unlocked unlocked;
  run_step(used_ops(), of,
           {reinterpret_cast<void*>(x), rows.spans, turned, kvs, wanted, depths, reinterpret_cast<void*>(logits)},
           memory, exact, team, num_threads);
}

}  // namespace

void bind_step(nb::module_& m) {
  nb::class_<Spans>(m, "Spans").def_static("make", &make_spans, nb::arg("counts"), nb::arg("pasts"), nb::arg("entries"), nb::arg("firsts"),
                                           nb::arg("blocks") = std::vector<std::vector<int32_t>>(),
                                           nb::arg("marks") = std::vector<std::vector<std::pair<int64_t, int64_t>>>());
  nb::class_<Kv>(m, "Kv").def_static("make", [](uintptr_t keys, uintptr_t values, int64_t batch_stride, int64_t block_stride, int64_t head_stride, int format) {
    return Kv{reinterpret_cast<void*>(keys), reinterpret_cast<void*>(values), batch_stride, block_stride, head_stride, KvFormat(format)};
  }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg() = 0);
  nb::class_<StepLayer>(m, "StepLayer").def_static("make", &make_layer, nb::arg("index"), nb::arg("layer"), nb::arg("shared").none(),
                                                   nb::arg("places"), nb::arg("num_planes"), nb::arg("place_of"), nb::arg("angles") = 0);
  nb::class_<Head>(m, "Head").def_static("make", [](const Norm& norm, const Weight& weight) { return Head{norm, weight}; });
  nb::class_<Step>(m, "Step").def_static("make", [](const std::vector<const StepLayer*>& layers, const Head* head) {
    Step made;
    for (const StepLayer* const layer : layers) made.layers.push_back(*layer);
    if (head) made.head.push_back(*head);
    return made;
  }, nb::arg("layers"), nb::arg("head").none()).def("__len__", [](const Step& of) { return of.layers.size(); });
  m.def("layer", &layer);
  m.def("step", &step);
}

}  // namespace fate
