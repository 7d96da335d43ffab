#include "step.h"

#include <algorithm>
#include <exception>

#include "inputs.h"
#include "threads.h"

namespace fate {
namespace {

// The distinct experts that rows chose, most chosen first, of equals the one that was chosen first; and by expert its (row, choice)
// pairs in order.
struct Routed {
  std::vector<int64_t> experts, counts, starts, choices;
  std::vector<int64_t> count_of, place;  // by expert; zeros between calls

  void sort(const int64_t* chosen, int64_t n, int64_t num_experts) {
    experts.clear(), counts.clear(), starts.assign(1, 0), choices.resize(size_t(n));
    count_of.resize(size_t(std::max<int64_t>(num_experts, int64_t(count_of.size()))));
    place.resize(count_of.size());
    for (int64_t i = 0; i < n; ++i)
      if (count_of[size_t(chosen[i])]++ == 0) experts.push_back(chosen[i]);
    if (int64_t(experts.size()) < n)
      std::stable_sort(experts.begin(), experts.end(), [&](int64_t a, int64_t b) { return count_of[size_t(a)] > count_of[size_t(b)]; });
    for (const int64_t expert : experts) {
      place[size_t(expert)] = starts.back();
      counts.push_back(count_of[size_t(expert)]), starts.push_back(starts.back() + counts.back());
    }
    for (int64_t i = 0; i < n; ++i) choices[size_t(place[size_t(chosen[i])]++)] = i;
    for (const int64_t expert : experts) count_of[size_t(expert)] = 0;
  }
};

// What one pass keeps between the parts of a layer.
struct Between {
  Scratch residuals, normeds, shareds, choices, floats, outputs;
  Routed routed;
  std::vector<ExpertMemory::Arrived> arrived;
};

void run_arrived(const Ops& ops, const StepLayer& of, const Between& own, int64_t count, const Batch& like, bool exact, int num_threads) {
  for (size_t p = 0; p < of.places.size(); ++p) {
    Batch batch = {{}, {}, {0}, {}, like.x, like.x_dtype, like.num_tokens, like.top_k, like.out};
    for (int64_t i = 0; i < count; ++i) {
      const ExpertMemory::Arrived& one = own.arrived[size_t(i)];
      const size_t index = size_t(one.index);
      if (size_t(of.place_of[size_t(own.routed.experts[index])]) != p) continue;
      batch.addresses.push_back(one.address), batch.num_planes.push_back(one.num_planes ? one.num_planes : of.num_planes[p]);
      const auto from = own.routed.choices.begin();
      batch.choices.insert(batch.choices.end(), from + own.routed.starts[index], from + own.routed.starts[index + 1]);
      batch.starts.push_back(int64_t(batch.choices.size()));
    }
    if (!batch.addresses.empty()) run_experts(ops, of.places[p], batch, exact, num_threads);
  }
}

void run_one(const Ops& ops, const StepLayer& of, const StepRows& rows, const Kv& kv, Between& own, ExpertMemory& memory, bool exact,
             int num_threads) {
  const int64_t hidden = of.layer.attention.hidden(), num_rows = rows.spans.back().end, top_k = of.layer.routing.top_k;
  uint16_t* const shared = of.shared.empty() ? nullptr : own.shareds.of<uint16_t>(num_rows * hidden);
  float *const weights = own.floats.of<float>(num_rows * (top_k + 1)), *const factors = weights + num_rows * top_k;
  float* const outputs = own.outputs.of<float>(num_rows * top_k * hidden);
  const LayerOut out = {own.residuals.of<uint16_t>(num_rows * hidden), own.normeds.of<uint16_t>(num_rows * hidden),
                        own.choices.of<int64_t>(num_rows * top_k), weights, factors};
  const Angles& angles = rows.angles[size_t(of.angles)];
  run_layer(ops, of.layer, rows.x, rows.spans, angles.cos, angles.sin, kv, out, exact, num_threads);
  if (of.places.empty()) {
    if (shared) run_mlp(ops, of.shared[0], out.normed, Dtype::kBf16, num_rows, shared, exact, num_threads);
    return run_layer_end(ops, out.residual, outputs, weights, num_rows, 0, shared, factors, of.layer.residual_scale, of.layer.block_norm, hidden, rows.x, num_threads);
  }
  own.routed.sort(out.chosen, num_rows * top_k, int64_t(of.place_of.size()));
  const int64_t n = int64_t(own.routed.experts.size());
  own.arrived.resize(size_t(n));
  memory.acquire(of.index, own.routed.experts.data(), own.routed.counts.data(), n, num_rows, out.normed, out.chosen, weights);
  if (shared) run_mlp(ops, of.shared[0], out.normed, Dtype::kBf16, num_rows, shared, exact, num_threads);
  const Batch like = {{}, {}, {}, {}, out.normed, Dtype::kBf16, num_rows, top_k, outputs};
  for (int64_t missing = n; missing > 0;) {
    const int64_t count = memory.arrived(own.arrived.data());
    run_arrived(ops, of, own, count, like, exact, num_threads);
    missing -= count;
  }
  memory.release();
  run_layer_end(ops, out.residual, outputs, weights, num_rows, top_k, shared, factors, of.layer.residual_scale, of.layer.block_norm, hidden, rows.x, num_threads);
}

void run_head(const Ops& ops, const Head& head, const StepRows& rows, Between& own, bool exact, int num_threads) {
  const int64_t hidden = head.weight.place.cols, count = int64_t(rows.wanted.size());
  uint16_t* const some = own.normeds.of<uint16_t>(count * hidden);
  for (int64_t i = 0; i < count; ++i)
    std::copy_n(static_cast<const uint16_t*>(rows.x) + rows.wanted[size_t(i)] * hidden, hidden, some + i * hidden);
  run_norm(ops, head.norm, some, Dtype::kBf16, count, hidden, some, num_threads);
  run_linear(ops, head.weight.matrix(), some, Dtype::kBf16, count, rows.logits, Dtype::kBf16, exact, num_threads);
}

}  // namespace

void run_step(const Ops& ops, const Step& step, const StepRows& rows, ExpertMemory& memory, bool exact, bool team, int num_threads) {
  static thread_local Between of_thread;
  Between& own = of_thread;
  std::exception_ptr error;
  memory.hold_back(rows.depths);
  auto pass = [&] {
    try {
      for (size_t i = 0; i < step.layers.size(); ++i) run_one(ops, step.layers[i], rows, rows.kv[i], own, memory, exact, num_threads);
      if (!rows.wanted.empty()) run_head(ops, step.head.at(0), rows, own, exact, num_threads);
    } catch (...) {
      error = std::current_exception();
    }
  };
  if (team)
    run_together(num_threads, pass);
  else
    pass();
  if (!error) return;
  memory.release();
  std::rethrow_exception(error);
}

}  // namespace fate
