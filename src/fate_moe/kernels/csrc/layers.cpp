#include "layers.h"

#include <algorithm>
#include <optional>

#include "attending.h"
#include "latent.h"
#include "recurrent.h"

namespace fate {
namespace {

constexpr int64_t kChunk = 1024;  // values between two products that one thread turns into the next one's input: whole blocks

float rounded(const Ops& ops, float value) {
  uint16_t bits;
  ops.from_float(&value, 1, &bits, Dtype::kBf16);
  ops.to_float(&bits, Dtype::kBf16, 1, &value);
  return value;
}

// Of `spans` the rows [first, first + kMostRows), counted from `first`.
void cut_spans(const std::vector<Span>& spans, int64_t first, std::vector<Span>& out) {
  out.clear();
  for (const Span& span : spans) {
    const int64_t begin = std::max(span.begin, first), end = std::min(span.end, first + kMostRows);
    if (begin < end) out.push_back({begin - first, end - first, span.past + begin - span.begin, span.entry, span.first, span.blocks, span.marks});
  }
}

}  // namespace

Matrix Weight::matrix() const {
  Matrix m = place.at(address, int(place.kind));
  m.bias = bias, m.bias_dtype = bias_dtype;
  return m;
}

void run_norm(const Ops& ops, const Norm& norm, const void* x, Dtype dtype, int64_t num_tokens, int64_t n, void* out, int num_threads) {
  static thread_local Scratch scratch;
  float* const numbers = scratch.of<float>(2 * n);
  read_norm(ops, norm, n, numbers);
  Phases phases(num_threads);
  auto work = [&] {
    phases.each(0, num_tokens, [&](int64_t t) {
      static thread_local Scratch own;
      float* const values = own.of<float>(n);
      ops.to_float(at(x, dtype, t * n), dtype, n, values);
      apply_norm(ops, norm, numbers, n, dtype, values);
      ops.from_float(values, n, at(out, dtype, t * n), dtype);
    });
  };
  run_phases(num_tokens > 4 ? num_threads : 1, work);
}

void run_mlp(const Ops& ops, const Mlp& mlp, const void* x, Dtype dtype, int64_t num_tokens, void* out, bool exact, int num_threads) {
  static thread_local Operand tokens, inners;
  static thread_local Scratch gate_ups, results;
  const Matrix matrices[] = {mlp.gate.matrix(), mlp.up.matrix(), mlp.down.matrix()};
  const int64_t hidden = matrices[0].cols, inner = matrices[2].cols, rows = matrices[2].rows;
  for (; num_tokens > kMostRows; num_tokens -= kMostRows, x = at(x, dtype, kMostRows * hidden), out = at(out, dtype, kMostRows * rows))
    run_mlp(ops, mlp, x, dtype, kMostRows, out, exact, num_threads);
  const int quantized = matrices[0].kind == Kind::kBf16;  // the first of gate and up that may be
  const bool kept = matrices[0].kind == Kind::kBf16 || matrices[1].kind == Kind::kBf16;
  tokens.resize(ops, num_tokens, matrices[quantized].kind, hidden, matrices[quantized].group, exact, kept);
  inners.resize(ops, num_tokens, matrices[2].kind, inner, matrices[2].group, exact, true);
  const int64_t chunks = (inner + kChunk - 1) / kChunk;
  // By chunk of kChunk inner values: its gates, then its ups, so that activation can begin anywhere.
  float* const gate_up = gate_ups.of<float>(num_tokens * 2 * inner);
  float* const result = results.of<float>(num_tokens * rows);
  std::vector<Rows> up_tasks, down_tasks;
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t step = rows_of_task(matrices[half]), end = std::min((chunk + 1) * kChunk, inner);
      for (int64_t row = chunk * kChunk; row < end; row += step) up_tasks.push_back({half, row, std::min(row + step, end)});
    }
  cut(down_tasks, 2, matrices[2]);
  Operand &of_tokens = tokens, &of_inners = inners;  // the calling thread's own
  Phases phases(num_threads);
  auto work = [&] {
    phases.each(0, num_tokens, [&](int64_t t) {
      ops.to_float(at(x, dtype, t * hidden), dtype, hidden, of_tokens.x(t));
      of_tokens.finish(ops, t);
    });
    phases.each(1, of_tokens.tiles(), [&](int64_t i) { of_tokens.pack(ops, i); });
    phases.each(2, int64_t(up_tasks.size()), [&](int64_t i) {
      const Rows& task = up_tasks[i];
      const int64_t chunk = task.begin / kChunk, length = std::min(kChunk, inner - chunk * kChunk);
      // out[row] of this chunk's half: 2 * chunk * kChunk + half * length + (row - chunk * kChunk)
      float* const to = gate_up + chunk * kChunk + task.expert * length;
      of_tokens.multiply(ops, matrices[task.expert], task.begin, task.end, to, 2 * inner);
    });
    phases.each(3, num_tokens * chunks, [&](int64_t i) {
      const int64_t t = i / chunks, first = i % chunks * kChunk, length = std::min(kChunk, inner - first);
      ops.activate(mlp.how, gate_up + t * 2 * inner + 2 * first, length, of_inners.x(t) + first);
      of_inners.finish(ops, t, first, first + length);
    });
    phases.each(4, of_inners.tiles(), [&](int64_t i) { of_inners.pack(ops, i); });
    phases.each(5, int64_t(down_tasks.size()), [&](int64_t i) {
      const Rows& task = down_tasks[i];
      of_inners.multiply(ops, matrices[2], task.begin, task.end, result, rows);
      for (int64_t t = 0; t < num_tokens; ++t)
        ops.from_float(result + t * rows + task.begin, task.end - task.begin, at(out, dtype, t * rows + task.begin), dtype);
    });
    of_tokens.end(ops), of_inners.end(ops);
  };
  run_phases(num_threads, work);
}

void run_attention(const Ops& ops, const Attention& a, const void* x, Dtype dtype, const std::vector<Span>& spans, const float* cos,
                   const float* sin, const Kv& kv, void* out, bool exact, int num_threads) {
  const int64_t cols = a.hidden();
  std::vector<Span> some;
  for (int64_t first = 0; first < spans.back().end; first += kMostRows) {
    cut_spans(spans, first, some);
    const int64_t count = some.back().end;
    const float *const some_cos = cos + first * a.num_angles, *const some_sin = sin + first * a.num_angles;
    if (a.latent.value_dim || a.delta.value_dim) {
      static thread_local Scratch scratch;
      float* const result = scratch.of<float>(count * cols);
      const auto input = [&](int64_t t, float* to) { ops.to_float(at(x, dtype, (first + t) * cols), dtype, cols, to); };
      if (a.delta.value_dim)
        run_delta(ops, a, some, kv, result, exact, num_threads, input);
      else
        run_latent(ops, a, some, some_cos, some_sin, kv, result, exact, num_threads, input);
      ops.from_float(result, count * cols, at(out, dtype, first * cols), dtype);
      continue;
    }
    const Attending attending(ops, a, some, kv, exact, num_threads);
    Phases phases(num_threads);
    auto work = [&] {
      phases.each(0, count, [&](int64_t t) {
        ops.to_float(at(x, dtype, (first + t) * cols), dtype, cols, attending.x(t));
        attending.begin(t, some_cos, some_sin);
      });
      attending.run(phases, [&](int64_t begin, int64_t end) {
        for (int64_t t = 0; t < count; ++t)
          ops.from_float(attending.result(t) + begin, end - begin, at(out, dtype, (first + t) * attending.size() + begin), dtype);
      });
    };
    run_phases(num_threads, work);
  }
}

namespace {

// As run_layer, up to kMostRows rows.
void run_pass(const Ops& ops, const Layer& layer, const void* x, const std::vector<Span>& spans, const float* cos, const float* sin,
              const Kv& kv, const LayerOut& out, bool exact, int num_threads) {
  static thread_local Operand routed;
  static thread_local Scratch scratch, sums;
  const Dtype bf16 = Dtype::kBf16;
  const int64_t hidden = layer.attention.hidden(), num_tokens = spans.back().end;
  const Matrix router = layer.router.matrix(), shared_gate = layer.shared_gate.matrix();
  Operand& of_routed = routed;
  const bool delta = layer.attention.delta.value_dim != 0, latent = layer.attention.latent.value_dim != 0, apart = delta || latent;
  std::optional<Attending> attending;
  if (!apart) attending.emplace(ops, layer.attention, spans, kv, exact, num_threads);
  float* const attended = apart ? sums.of<float>(num_tokens * hidden) : attending->result(0);
  routed.resize(ops, num_tokens, router.kind, hidden, router.group, exact, true);
  const int64_t width = router.rows + 1;  // the shared expert's is the last
  float *const norm = scratch.of<float>(4 * hidden + num_tokens * width), *const post_norm = norm + 2 * hidden, *const logits = norm + 4 * hidden;
  read_norm(ops, layer.norm, hidden, norm);
  read_norm(ops, layer.post_norm, hidden, post_norm);
  std::vector<Rows> tasks;
  if (layer.router.address) cut(tasks, 0, router);
  if (layer.shared_gate.address) tasks.push_back({1, 0, 1});
  const auto normed = [&](int64_t t, float* values, const Norm& of, const float* numbers) {
    void* const to = at(out.normed, bf16, t * hidden);
    apply_norm(ops, of, numbers, hidden, bf16, values);
    ops.from_float(values, hidden, to, bf16);
    ops.to_float(to, bf16, hidden, values);
  };
  const auto input = [&](int64_t t, float* values) {
    ops.to_float(at(x, bf16, t * hidden), bf16, hidden, values);
    normed(t, values, layer.norm, norm);
  };
  if (delta)
    run_delta(ops, layer.attention, spans, kv, attended, exact, num_threads, input);
  else if (latent)
    run_latent(ops, layer.attention, spans, cos, sin, kv, attended, exact, num_threads, input);
  Phases phases(num_threads);
  auto work = [&] {
    if (attending) {
      phases.each(0, num_tokens, [&](int64_t t) {
        input(t, attending->x(t));
        attending->begin(t, cos, sin);
      });
      attending->run(phases, [](int64_t, int64_t) {});
    }
    phases.each(8, num_tokens, [&](int64_t t) {
      float *const values = of_routed.x(t), *const sum = attended + t * hidden;
      void* const residual = at(out.residual, bf16, t * hidden);
      ops.to_float(at(x, bf16, t * hidden), bf16, hidden, values);
      ops.steps->add(layer.residual_scale, sum, hidden, values);
      ops.from_float(values, hidden, residual, bf16);
      ops.to_float(residual, bf16, hidden, values);
      normed(t, values, layer.post_norm, post_norm);
      of_routed.finish(ops, t);
    });
    phases.each(9, int64_t(tasks.size()), [&](int64_t i) {
      const bool shared = tasks[i].expert == 1;
      of_routed.multiply(ops, shared ? shared_gate : router, tasks[i].begin, tasks[i].end, shared ? logits + router.rows : logits, width);
    });
    phases.each(10, num_tokens, [&](int64_t t) {
      float* const scores = logits + t * width;
      const int64_t to = t * layer.routing.top_k;
      if (layer.router.address) run_route(ops, layer.routing, scores, router.rows, out.chosen + to, out.weights + to);
      out.factors[t] = layer.shared_gate.address ? rounded(ops, ops.steps->sigmoid(rounded(ops, scores[router.rows]))) : 1.0f;
    });
  };
  run_phases(num_threads, work);
}

}  // namespace

void run_layer(const Ops& ops, const Layer& layer, const void* x, const std::vector<Span>& spans, const float* cos, const float* sin,
               const Kv& kv, const LayerOut& out, bool exact, int num_threads) {
  const Dtype bf16 = Dtype::kBf16;
  const int64_t hidden = layer.attention.hidden(), angles = layer.attention.num_angles, top_k = layer.routing.top_k;
  if (spans.back().end <= kMostRows) return run_pass(ops, layer, x, spans, cos, sin, kv, out, exact, num_threads);
  std::vector<Span> cut;
  for (int64_t first = 0; first < spans.back().end; first += kMostRows) {
    cut_spans(spans, first, cut);
    const LayerOut some = {at(out.residual, bf16, first * hidden), at(out.normed, bf16, first * hidden), out.chosen + first * top_k,
                           out.weights + first * top_k, out.factors + first};
    run_pass(ops, layer, at(x, bf16, first * hidden), cut, cos + first * angles, sin + first * angles, kv, some, exact, num_threads);
  }
}

void run_layer_end(const Ops& ops, const void* residual, const float* rows, const float* weights, int64_t num_tokens, int64_t num_rows,
                   const void* shared, const float* factors, float residual_scale, const Norm& block_norm, int64_t n, void* out, int num_threads) {
  const Dtype bf16 = Dtype::kBf16;
  static thread_local Scratch norms;
  float* const numbers = norms.of<float>(2 * n);
  if (block_norm.weight) read_norm(ops, block_norm, n, numbers);
  Phases phases(num_threads);
  auto work = [&] {
    phases.each(0, num_tokens, [&](int64_t t) {
      static thread_local Scratch scratch;
      float *const sum = scratch.of<float>(2 * n), *const other = sum + n;
      ops.combine(rows + t * num_rows * n, weights + t * num_rows, num_rows, n, sum);
      if (shared) {
        ops.to_float(at(shared, bf16, t * n), bf16, n, other);
        ops.steps->add(factors[t], other, n, sum);
      }
      if (block_norm.weight) apply_norm(ops, block_norm, numbers, n, Dtype::kF32, sum);
      ops.to_float(at(residual, bf16, t * n), bf16, n, other);
      ops.steps->add(residual_scale, sum, n, other);
      ops.from_float(other, n, at(out, bf16, t * n), bf16);
    });
  };
  run_phases(num_tokens > 4 ? num_threads : 1, work);
}

}  // namespace fate
