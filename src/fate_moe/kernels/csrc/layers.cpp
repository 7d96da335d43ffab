#include "layers.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "inputs.h"
#include "threads.h"

namespace fate {
namespace {

constexpr int64_t kChunk = 1024;  // values between two products that one thread turns into the next one's input: whole blocks
constexpr int64_t kValueRows = 16;

// Rows of several matrices as tasks; Rows::expert is the matrix.
void multiply(const Ops& ops, const Rows& task, const Matrix& m, const Inputs& x, int64_t num_tokens, bool integers, float* out,
              int64_t stride) {
  for (int64_t t = 0; t < num_tokens; t += kTokens) {
    Token some[kTokens];
    const int64_t count = std::min(kTokens, num_tokens - t);
    for (int64_t j = 0; j < count; ++j) some[j] = x.token(t + j, integers, out + (t + j) * stride);
    ops.product(m, some, count, task.begin, task.end);
  }
}

// As `multiply`, rounded to dtype.
void multiply_to(const Ops& ops, const Rows& task, const Matrix& m, const Inputs& x, int64_t num_tokens, bool integers,
                 float* result, void* out, Dtype dtype) {
  multiply(ops, task, m, x, num_tokens, integers, result, m.rows);
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t first = t * m.rows + task.begin;
    ops.from_float(result + first, task.end - task.begin, at(out, dtype, first), dtype);
  }
}

float mean_square(const float* x, int64_t n) {
  float lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int64_t j = 0; j < 16; ++j) lanes[j] += x[i + j] * x[i + j];
  float sum = 0.0f;
  for (const float lane : lanes) sum += lane;
  for (; i < n; ++i) sum += x[i] * x[i];
  return sum / float(n);
}

// exp(x) for x <= 0 (Cody and Waite's reduction, Taylor to the sixth power: 1e-7); written so that compilers vectorize it.
inline float exponential(float x) {
  x = x > -87.0f ? x : -87.0f;
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

// In place; `x` has room for a multiple of 16. NaN stays NaN, so that a broken input is not hidden.
void softmax(float* x, int64_t n, float scaling) {
  const int64_t padded = (n + 15) / 16 * 16;
  for (int64_t i = n; i < padded; ++i) x[i] = -INFINITY;
  float most = -INFINITY;
  for (int64_t i = 0; i < n; ++i) most = x[i] * scaling > most ? x[i] * scaling : most;
  float lanes[16] = {};
  for (int64_t i = 0; i < padded; i += 16) {
    for (int64_t j = 0; j < 16; ++j) x[i + j] = exponential(x[i + j] * scaling - most) + 0.0f * x[i + j < n ? i + j : 0];
    for (int64_t j = 0; j < 16; ++j) lanes[j] += i + j < n ? x[i + j] : 0.0f;
  }
  float sum = 0.0f;
  for (const float lane : lanes) sum += lane;
  for (int64_t i = 0; i < n; ++i) x[i] /= sum;
}

// A head's values, normalized if there is a weight, then turned by the angle of its position.
void turn(const Ops& ops, const Attention& a, float* head, const void* norm, const float* cos, const float* sin, float* scratch) {
  if (norm) {
    const float factor = 1.0f / std::sqrt(mean_square(head, a.dim) + a.eps);
    ops.to_float(norm, a.norm_dtype, a.dim, scratch);
    for (int64_t i = 0; i < a.dim; ++i) head[i] *= factor * scratch[i];
  }
  const int64_t half = a.dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    scratch[i] = head[i] * cos[i] - head[half + i] * sin[i];
    scratch[half + i] = head[half + i] * cos[half + i] + head[i] * sin[half + i];
  }
  std::copy(scratch, scratch + a.dim, head);
}

}  // namespace

Matrix Weight::matrix() const {
  Matrix m = place.at(address, int(place.kind));
  m.bias = bias, m.bias_dtype = bias_dtype;
  return m;
}

void run_rms_norm(const Ops& ops, const void* x, Dtype dtype, int64_t num_tokens, int64_t n, const void* weight, Dtype weight_dtype,
                  float eps, void* out) {
  static thread_local Scratch scratch;
  float *const values = scratch.of<float>(2 * n), *const factors = values + n;
  ops.to_float(weight, weight_dtype, n, factors);
  for (int64_t t = 0; t < num_tokens; ++t) {
    ops.to_float(at(x, dtype, t * n), dtype, n, values);
    const float factor = 1.0f / std::sqrt(mean_square(values, n) + eps);
    for (int64_t i = 0; i < n; ++i) values[i] *= factor;
    if (dtype != Dtype::kF32) {
      ops.from_float(values, n, at(out, dtype, t * n), dtype);
      ops.to_float(at(out, dtype, t * n), dtype, n, values);
    }
    for (int64_t i = 0; i < n; ++i) values[i] *= factors[i];
    ops.from_float(values, n, at(out, dtype, t * n), dtype);
  }
}

void run_mlp(const Ops& ops, const Mlp& mlp, const void* x, Dtype dtype, int64_t num_tokens, void* out, bool exact, int num_threads) {
  static thread_local Inputs tokens, inners;
  static thread_local Scratch gate_ups, results;
  const Matrix matrices[] = {mlp.gate.matrix(), mlp.up.matrix(), mlp.down.matrix()};
  const int64_t hidden = matrices[0].cols, inner = matrices[2].cols;
  const bool up_integers = !exact && matrices[0].kind != Kind::kBf16, down_integers = !exact && matrices[2].kind != Kind::kBf16;
  tokens.resize(num_tokens, hidden);
  inners.resize(num_tokens, inner);
  const int64_t chunks = (inner + kChunk - 1) / kChunk;
  // By chunk of kChunk inner values: its gates, then its ups, so that activation can begin anywhere.
  float* const gate_up = gate_ups.of<float>(num_tokens * 2 * inner);
  float* const result = results.of<float>(num_tokens * matrices[2].rows);
  std::vector<Rows> up_tasks, down_tasks;
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t step = rows_of_task(matrices[half]), end = std::min((chunk + 1) * kChunk, inner);
      for (int64_t row = chunk * kChunk; row < end; row += step) up_tasks.push_back({half, row, std::min(row + step, end)});
    }
  cut(down_tasks, 2, matrices[2]);
  Inputs &of_tokens = tokens, &of_inners = inners;  // the calling thread's own
  Phases phases;
  auto work = [&] {
    phases.each(0, num_tokens, [&](int64_t t) {
      ops.to_float(at(x, dtype, t * hidden), dtype, hidden, of_tokens.x(t));
      of_tokens.finish(ops, t, matrices[0].kind, up_integers);
    });
    phases.each(1, int64_t(up_tasks.size()), [&](int64_t i) {
      const Rows& task = up_tasks[i];
      const int64_t chunk = task.begin / kChunk, length = std::min(kChunk, inner - chunk * kChunk);
      // out[row] of this chunk's half: 2 * chunk * kChunk + half * length + (row - chunk * kChunk)
      float* const to = gate_up + chunk * kChunk + task.expert * length;
      multiply(ops, task, matrices[task.expert], of_tokens, num_tokens, up_integers, to, 2 * inner);
    });
    phases.each(2, num_tokens * chunks, [&](int64_t i) {
      const int64_t t = i / chunks, first = i % chunks * kChunk, length = std::min(kChunk, inner - first);
      ops.gate(mlp.how, gate_up + t * 2 * inner + 2 * first, length, of_inners.x(t) + first);
      of_inners.finish(ops, t, matrices[2].kind, down_integers, first, first + length);
    });
    phases.each(3, int64_t(down_tasks.size()), [&](int64_t i) {
      multiply_to(ops, down_tasks[i], matrices[2], of_inners, num_tokens, down_integers, result, out, dtype);
    });
  };
  run_phases(num_threads, work);
}

void run_attention(const Ops& ops, const Attention& a, const void* x, Dtype dtype, const void* cos, const void* sin, void* keys,
                   void* values, int64_t length, int64_t room, void* out, bool exact, int num_threads) {
  static thread_local Inputs token, attended;
  static thread_local Scratch scratches;
  const Matrix matrices[] = {a.q.matrix(), a.k.matrix(), a.v.matrix()}, last = a.o.matrix();
  const int64_t hidden = matrices[0].cols, dim = a.dim, group = a.heads / a.kv_heads, count = length + 1;
  const bool integers = !exact && matrices[0].kind != Kind::kBf16, last_integers = !exact && last.kind != Kind::kBf16;
  token.resize(1, hidden);
  attended.resize(1, last.cols);
  std::vector<Rows> tasks, last_tasks;
  int64_t starts[] = {0, a.heads * dim, (a.heads + a.kv_heads) * dim};
  for (int64_t i = 0; i < 3; ++i) cut(tasks, i, matrices[i]);
  cut(last_tasks, 0, last);
  const int64_t padded = (count + 15) / 16 * 16, total = (a.heads + 2 * a.kv_heads) * dim;
  const int64_t head_floats = padded + (kValueRows + 2) * dim;
  float* const qkv = scratches.of<float>(total + 2 * dim + last.rows + a.heads * head_floats);
  float *const angles = qkv + total, *const result = angles + 2 * dim, *const heads = result + last.rows;
  Inputs &of_token = token, &of_attended = attended;
  Phases phases;
  auto work = [&] {
    phases.each(0, 1, [&](int64_t) {
      ops.to_float(x, dtype, hidden, of_token.x(0));
      of_token.finish(ops, 0, matrices[0].kind, integers);
      ops.to_float(cos, dtype, dim, angles);
      ops.to_float(sin, dtype, dim, angles + dim);
    });
    phases.each(1, int64_t(tasks.size()), [&](int64_t i) {
      multiply(ops, tasks[i], matrices[tasks[i].expert], of_token, 1, integers, qkv + starts[tasks[i].expert], 0);
    });
    phases.each(2, a.kv_heads, [&](int64_t h) {
      turn(ops, a, qkv + starts[1] + h * dim, a.k_norm, angles, angles + dim, heads + h * head_floats);
      ops.from_float(qkv + starts[1] + h * dim, dim, at(keys, Dtype::kBf16, (h * room + length) * dim), Dtype::kBf16);
      ops.from_float(qkv + starts[2] + h * dim, dim, at(values, Dtype::kBf16, (h * room + length) * dim), Dtype::kBf16);
    });
    phases.each(3, a.heads, [&](int64_t h) {
      float *const scores = heads + h * head_floats, *const rows = scores + padded, *const query = rows + (kValueRows + 1) * dim;
      float* const head = qkv + h * dim;
      turn(ops, a, head, a.q_norm, angles, angles + dim, query);
      const int64_t first = h / group * room * dim;
      const uint8_t* const key = static_cast<const uint8_t*>(at(keys, Dtype::kBf16, first));
      const Matrix past = {Kind::kBf16, count, dim, groups_of(dim), {key, nullptr, nullptr}, nullptr, nullptr, nullptr, Dtype::kF32};
      const Token asked = {nullptr, nullptr, nullptr, head, scores};
      ops.product(past, &asked, 1, 0, count);
      softmax(scores, count, a.scaling);
      // Several rows of values at a time as numbers, the sum so far before them with weight 1.
      float weights[kValueRows + 1] = {1.0f};
      std::fill(rows, rows + dim, 0.0f);
      for (int64_t row = 0; row < count; row += kValueRows) {
        const int64_t some = std::min(kValueRows, count - row);
        std::copy(scores + row, scores + row + some, weights + 1);
        ops.to_float(at(values, Dtype::kBf16, first + row * dim), Dtype::kBf16, some * dim, rows + dim);
        ops.combine(rows, weights, some + 1, dim, rows);
      }
      std::copy(rows, rows + dim, of_attended.x(0) + h * dim);
    });
    phases.each(4, 1, [&](int64_t) { of_attended.finish(ops, 0, last.kind, last_integers); });
    phases.each(5, int64_t(last_tasks.size()), [&](int64_t i) {
      multiply_to(ops, last_tasks[i], last, of_attended, 1, last_integers, result, out, dtype);
    });
  };
  run_phases(num_threads, work);
}

}  // namespace fate
