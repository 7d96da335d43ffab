#include "products.h"

#include <algorithm>

#include "inputs.h"
#include "threads.h"

namespace fate {

Matrix Place::at(uint64_t address, int num_planes) const {
  const uint8_t* base = reinterpret_cast<const uint8_t*>(address);
  const Kind used = kind == Kind::kPlanes3 ? Kind(num_planes) : kind;
  Matrix m = {used, rows, cols, group, groups_of(cols, group), {}, nullptr, nullptr, bias < 0 ? nullptr : base + bias, bias_dtype};
  for (int i = 0; i < 3; ++i) m.planes[i] = base + planes[i];
  if (kind != Kind::kBf16) {
    m.scale = reinterpret_cast<const uint16_t*>(base + scale);
    m.zero = reinterpret_cast<const uint16_t*>(base + zero);
  }
  return m;
}

void run_experts(const Ops& ops, const ExpertPlace& place, const Batch& batch, bool exact, int num_threads) {
  static thread_local Inputs tokens, inners;
  static thread_local Scratch gate_ups;
  const int64_t num_experts = int64_t(batch.addresses.size()), num_rows = int64_t(batch.choices.size());
  const int64_t hidden = place.up.cols, wide = place.up.rows, inner = place.down.cols;
  const Kind kind = place.up.kind;
  const bool integers = !exact && kind != Kind::kBf16;
  tokens.resize(batch.num_tokens, hidden, place.up.group);
  inners.resize(num_rows, inner, place.down.group);
  float* const gate_up = gate_ups.of<float>(num_rows * wide);
  std::vector<Matrix> ups, downs;
  std::vector<Rows> up_tasks, down_tasks;
  for (int64_t e = 0; e < num_experts; ++e) {
    ups.push_back(place.up.at(batch.addresses[e], batch.num_planes[e]));
    downs.push_back(place.down.at(batch.addresses[e], batch.num_planes[e]));
    cut(up_tasks, e, ups.back());
    cut(down_tasks, e, downs.back());
  }
  // The calling thread's own copies of pointers: thread_local names would mean another thread's in the team.
  Inputs &of_tokens = tokens, &of_inners = inners;
  Phases phases(num_threads);
  auto multiply = [&](const Rows& task, const Matrix& m, bool down) {
    for (int64_t i = batch.starts[task.expert]; i < batch.starts[task.expert + 1]; i += kTokens) {
      Token some[kTokens];
      const int64_t count = std::min(kTokens, batch.starts[task.expert + 1] - i);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t row = batch.choices[i + j];
        some[j] = down ? of_inners.token(i + j, integers, batch.out + row * place.down.rows)
                       : of_tokens.token(row / batch.top_k, integers, gate_up + (i + j) * wide);
      }
      ops.product(m, some, count, task.begin, task.end);
    }
  };
  auto work = [&] {
    phases.each(0, batch.num_tokens, [&](int64_t t) {
      ops.to_float(at(batch.x, batch.x_dtype, t * hidden), batch.x_dtype, hidden, of_tokens.x(t));
      of_tokens.finish(ops, t, kind, integers);
    });
    phases.each(1, int64_t(up_tasks.size()), [&](int64_t i) { multiply(up_tasks[i], ups[up_tasks[i].expert], false); });
    phases.each(2, num_rows, [&](int64_t i) {
      ops.activate(place.activation, gate_up + i * wide, inner, of_inners.x(i));
      of_inners.finish(ops, i, kind, integers);
    });
    phases.each(3, int64_t(down_tasks.size()), [&](int64_t i) { multiply(down_tasks[i], downs[down_tasks[i].expert], true); });
  };
  run_phases(num_threads, work);
}

void run_linear(const Ops& ops, const Matrix& m, const void* x, Dtype x_dtype, int64_t num_tokens, void* out, Dtype out_dtype,
                bool exact, int num_threads) {
  static thread_local Inputs tokens;
  static thread_local Scratch results;
  const bool integers = !exact && m.kind != Kind::kBf16;
  tokens.resize(num_tokens, m.cols, m.group);
  float* const result = out_dtype == Dtype::kF32 ? static_cast<float*>(out) : results.of<float>(num_tokens * m.rows);
  std::vector<Rows> tasks;
  cut(tasks, 0, m);
  Inputs& of_tokens = tokens;
  Phases phases(num_threads);
  auto work = [&] {
    phases.each(0, num_tokens, [&](int64_t t) {
      ops.to_float(at(x, x_dtype, t * m.cols), x_dtype, m.cols, of_tokens.x(t));
      of_tokens.finish(ops, t, m.kind, integers);
    });
    phases.each(1, int64_t(tasks.size()), [&](int64_t i) {
      const Rows& task = tasks[i];
      for (int64_t t = 0; t < num_tokens; t += kTokens) {
        Token some[kTokens];
        const int64_t count = std::min(kTokens, num_tokens - t);
        for (int64_t j = 0; j < count; ++j) some[j] = of_tokens.token(t + j, integers, result + (t + j) * m.rows);
        ops.product(m, some, count, task.begin, task.end);
        if (out_dtype != Dtype::kF32)
          for (int64_t j = t; j < t + count; ++j)
            ops.from_float(result + j * m.rows + task.begin, task.end - task.begin, at(out, out_dtype, j * m.rows + task.begin),
                           out_dtype);
      }
    });
  };
  run_phases(num_threads, work);
}

void run_expand(const Ops& ops, const Matrix& m, void* out, Dtype dtype, int num_threads) {
  std::vector<Rows> tasks;
  cut(tasks, 0, m);
  Phases phases(num_threads);
  auto work = [&] {
    phases.each(0, int64_t(tasks.size()), [&](int64_t i) {
      ops.expand(m, tasks[i].begin, tasks[i].end, at(out, dtype, tasks[i].begin * m.cols), dtype);
    });
  };
  run_phases(num_threads, work);
}

void run_combine(const Ops& ops, const float* rows, const void* weights, Dtype weights_dtype, int64_t num_tokens, int64_t top_k,
                 int64_t hidden, void* out, Dtype out_dtype, int num_threads) {
  static thread_local Scratch factors, results;
  float* const factor = factors.of<float>(num_tokens * top_k);
  float* const result = out_dtype == Dtype::kF32 ? static_cast<float*>(out) : results.of<float>(num_tokens * hidden);
  ops.to_float(weights, weights_dtype, num_tokens * top_k, factor);
  Phases phases(num_threads);
  auto work = [&] {
    phases.each(0, num_tokens, [&](int64_t t) {
      ops.combine(rows + t * top_k * hidden, factor + t * top_k, top_k, hidden, result + t * hidden);
      if (out_dtype != Dtype::kF32) ops.from_float(result + t * hidden, hidden, at(out, out_dtype, t * hidden), out_dtype);
    });
  };
  run_phases(num_tokens > 4 ? num_threads : 1, work);
}

uint64_t read_all(const void* memory, int64_t num_bytes, int num_threads) {
  constexpr int64_t step = 1 << 20;
  std::atomic<uint64_t> sum{0};
  Phases phases(num_threads);
  auto work = [&] {
    phases.each(0, (num_bytes + step - 1) / step, [&](int64_t i) {
      const uint64_t* words = reinterpret_cast<const uint64_t*>(static_cast<const char*>(memory) + i * step);
      const int64_t count = std::min(step, num_bytes - i * step) / 8;
      uint64_t lanes[32] = {};
      int64_t w = 0;
      for (; w + 32 <= count; w += 32)
        for (int j = 0; j < 32; ++j) lanes[j] ^= words[w + j];
      for (; w < count; ++w) lanes[0] ^= words[w];
      for (const uint64_t lane : lanes) sum.fetch_xor(lane, std::memory_order_relaxed);
    });
  };
  run_phases(num_threads, work);
  return sum;
}

}  // namespace fate
