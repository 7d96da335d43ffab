#include "layers.h"

#include <algorithm>

#include "attending.h"

namespace fate {
namespace {

constexpr int64_t kChunk = 1024;  // values between two products that one thread turns into the next one's input: whole blocks

float rounded(const Ops& ops, float value) {
  uint16_t bits;
  ops.from_float(&value, 1, &bits, Dtype::kBf16);
  ops.to_float(&bits, Dtype::kBf16, 1, &value);
  return value;
}

// `norm` in one pass over a token: fp32 values [n], with which it begins.
void normalize(const Ops& ops, float* values, const float* weight, int64_t n, float eps, bool rounds_first, Dtype dtype, void* out) {
  ops.steps->normalize(values, weight, n, eps, rounds_first && dtype == Dtype::kBf16, values);
  ops.from_float(values, n, out, dtype);
}

// Of `spans` the rows [first, first + kMostRows), counted from `first`.
void cut_spans(const std::vector<Span>& spans, int64_t first, std::vector<Span>& out) {
  out.clear();
  for (const Span& span : spans) {
    const int64_t begin = std::max(span.begin, first), end = std::min(span.end, first + kMostRows);
    if (begin < end) out.push_back({begin - first, end - first, span.past + begin - span.begin, span.entry, span.first, span.blocks});
  }
}

}  // namespace

Matrix Weight::matrix() const {
  Matrix m = place.at(address, int(place.kind));
  m.bias = bias, m.bias_dtype = bias_dtype;
  return m;
}

void run_rms_norm(const Ops& ops, const void* x, Dtype dtype, int64_t num_tokens, int64_t n, const void* weight, Dtype weight_dtype,
                  float eps, bool rounds_first, void* out, int num_threads) {
  static thread_local Scratch scratch;
  float* const factors = scratch.of<float>(n);
  ops.to_float(weight, weight_dtype, n, factors);
  Phases phases(num_threads);
  auto work = [&] {
    phases.each(0, num_tokens, [&](int64_t t) {
      static thread_local Scratch own;
      float* const values = own.of<float>(n);
      ops.to_float(at(x, dtype, t * n), dtype, n, values);
      normalize(ops, values, factors, n, eps, rounds_first, dtype, at(out, dtype, t * n));
    });
  };
  run_phases(num_tokens > 4 ? num_threads : 1, work);
}

void run_route(const Ops& ops, float* logits, int64_t num_experts, int64_t top_k, bool normalize, float scale, int64_t* chosen,
               float* weights) {
  ops.steps->softmax(logits, num_experts);
  float sum = 0.0f;
  for (int64_t k = 0; k < top_k; ++k) {
    int64_t best = -1;
    float most = -2.0f;
    for (int64_t i = 0; i < num_experts; ++i) {
      const float value = logits[i] == logits[i] ? logits[i] : -1.0f;  // NaN after all numbers
      if (value > most && std::find(chosen, chosen + k, i) == chosen + k) best = i, most = value;
    }
    chosen[k] = best, weights[k] = logits[best], sum += weights[k];
  }
  for (int64_t k = 0; normalize && k < top_k; ++k) weights[k] /= sum;
  for (int64_t k = 0; k < top_k; ++k) weights[k] *= scale;
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

void run_attention(const Ops& ops, const Attention& a, const void* x, Dtype dtype, const std::vector<Span>& spans, const void* cos,
                   const void* sin, const Kv& kv, void* out, bool exact, int num_threads) {
  const int64_t cols = a.q.place.cols;
  std::vector<Span> some;
  for (int64_t first = 0; first < spans.back().end; first += kMostRows) {
    cut_spans(spans, first, some);
    const int64_t count = some.back().end, angles = first * a.rotary_dim;
    const Attending attending(ops, a, some, kv, exact, num_threads);
    Phases phases(num_threads);
    auto work = [&] {
      phases.each(0, count, [&](int64_t t) {
        ops.to_float(at(x, dtype, (first + t) * cols), dtype, cols, attending.x(t));
        attending.begin(t, at(cos, dtype, angles), at(sin, dtype, angles), dtype);
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
void run_pass(const Ops& ops, const Layer& layer, const void* x, const std::vector<Span>& spans, const void* cos, const void* sin,
              const Kv& kv, const LayerOut& out, bool exact, int num_threads) {
  static thread_local Operand routed;
  static thread_local Scratch scratch;
  const Dtype bf16 = Dtype::kBf16;
  const int64_t hidden = layer.attention.q.place.cols, num_tokens = spans.back().end;
  const Matrix router = layer.router.matrix(), shared_gate = layer.shared_gate.matrix();
  Operand& of_routed = routed;
  const Attending attending(ops, layer.attention, spans, kv, exact, num_threads);
  routed.resize(ops, num_tokens, router.kind, hidden, router.group, exact, true);
  const int64_t width = router.rows + 1;
  float *const norm = scratch.of<float>(2 * hidden + num_tokens * width), *const post_norm = norm + hidden, *const logits = norm + 2 * hidden;
  ops.to_float(layer.norm, layer.norm_dtype, hidden, norm);
  ops.to_float(layer.post_norm, layer.norm_dtype, hidden, post_norm);
  std::vector<Rows> tasks;
  cut(tasks, 0, router);
  if (layer.shared_gate.address) tasks.push_back({1, 0, 1});
  const auto normed = [&](int64_t t, float* values, const float* weight) {
    void* const to = at(out.normed, bf16, t * hidden);
    normalize(ops, values, weight, hidden, layer.eps, layer.rounds_first, bf16, to);
    ops.to_float(to, bf16, hidden, values);
  };
  Phases phases(num_threads);
  auto work = [&] {
    phases.each(0, num_tokens, [&](int64_t t) {
      float* const values = attending.x(t);
      ops.to_float(at(x, bf16, t * hidden), bf16, hidden, values);
      normed(t, values, norm);
      attending.begin(t, cos, sin, bf16);
    });
    attending.run(phases, [](int64_t, int64_t) {});
    phases.each(8, num_tokens, [&](int64_t t) {
      float *const values = of_routed.x(t), *const sum = attending.result(t);
      void* const residual = at(out.residual, bf16, t * hidden);
      ops.to_float(at(x, bf16, t * hidden), bf16, hidden, values);
      ops.steps->add(layer.residual_scale, sum, hidden, values);
      ops.from_float(values, hidden, residual, bf16);
      ops.to_float(residual, bf16, hidden, values);
      normed(t, values, post_norm);
      of_routed.finish(ops, t);
    });
    phases.each(9, int64_t(tasks.size()), [&](int64_t i) {
      const bool shared = tasks[i].expert == 1;
      of_routed.multiply(ops, shared ? shared_gate : router, tasks[i].begin, tasks[i].end, shared ? logits + router.rows : logits, width);
    });
    // As families have it: logits in bf16, probabilities in fp32, weights in bf16.
    phases.each(10, num_tokens, [&](int64_t t) {
      float *const scores = logits + t * width, *const weights = out.weights + t * layer.top_k;
      for (int64_t i = 0; i < router.rows; ++i) scores[i] = rounded(ops, scores[i]);
      run_route(ops, scores, router.rows, layer.top_k, layer.normalize, layer.scale, out.chosen + t * layer.top_k, weights);
      for (int64_t k = 0; k < layer.top_k; ++k) weights[k] = rounded(ops, weights[k]);
      out.factors[t] = layer.shared_gate.address ? rounded(ops, ops.steps->sigmoid(rounded(ops, scores[router.rows]))) : 1.0f;
    });
  };
  run_phases(num_threads, work);
}

}  // namespace

void run_layer(const Ops& ops, const Layer& layer, const void* x, const std::vector<Span>& spans, const void* cos, const void* sin,
               const Kv& kv, const LayerOut& out, bool exact, int num_threads) {
  const Dtype bf16 = Dtype::kBf16;
  const int64_t hidden = layer.attention.q.place.cols, turned = layer.attention.rotary_dim;
  if (spans.back().end <= kMostRows) return run_pass(ops, layer, x, spans, cos, sin, kv, out, exact, num_threads);
  std::vector<Span> cut;
  for (int64_t first = 0; first < spans.back().end; first += kMostRows) {
    cut_spans(spans, first, cut);
    const LayerOut some = {at(out.residual, bf16, first * hidden), at(out.normed, bf16, first * hidden), out.chosen + first * layer.top_k,
                           out.weights + first * layer.top_k, out.factors + first};
    run_pass(ops, layer, at(x, bf16, first * hidden), cut, at(cos, bf16, first * turned), at(sin, bf16, first * turned), kv, some, exact,
             num_threads);
  }
}

void run_layer_end(const Ops& ops, const void* residual, const float* rows, const float* weights, int64_t num_tokens, int64_t num_rows,
                   const void* shared, const float* factors, float residual_scale, int64_t n, void* out, int num_threads) {
  const Dtype bf16 = Dtype::kBf16;
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
      ops.to_float(at(residual, bf16, t * n), bf16, n, other);
      ops.steps->add(residual_scale, sum, n, other);
      ops.from_float(other, n, at(out, bf16, t * n), bf16);
    });
  };
  run_phases(num_tokens > 4 ? num_threads : 1, work);
}

}  // namespace fate
