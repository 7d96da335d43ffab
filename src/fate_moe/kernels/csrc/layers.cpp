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
    ops.to_float(norm, a.norm_dtype, a.dim, scratch);
    ops.steps->normalize(head, scratch, a.dim, a.eps, false, head);
  }
  ops.steps->turn(head, a.dim, cos, sin);
}

}  // namespace

Matrix Weight::matrix() const {
  Matrix m = place.at(address, int(place.kind));
  m.bias = bias, m.bias_dtype = bias_dtype;
  return m;
}

void run_rms_norm(const Ops& ops, const void* x, Dtype dtype, int64_t num_tokens, int64_t n, const void* weight, Dtype weight_dtype,
                  float eps, bool rounds_first, void* out) {
  static thread_local Scratch scratch;
  float *const values = scratch.of<float>(2 * n), *const factors = values + n;
  ops.to_float(weight, weight_dtype, n, factors);
  for (int64_t t = 0; t < num_tokens; ++t) {
    ops.to_float(at(x, dtype, t * n), dtype, n, values);
    ops.steps->normalize(values, factors, n, eps, rounds_first && dtype == Dtype::kBf16, values);
    ops.from_float(values, n, at(out, dtype, t * n), dtype);
  }
}

void run_route(const Ops& ops, float* logits, int64_t num_experts, int64_t top_k, bool normalize, int64_t* chosen, float* weights) {
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
}

void run_mlp(const Ops& ops, const Mlp& mlp, const void* x, Dtype dtype, int64_t num_tokens, void* out, bool exact, int num_threads) {
  static thread_local Inputs tokens, inners;
  static thread_local Scratch gate_ups, results;
  const Matrix matrices[] = {mlp.gate.matrix(), mlp.up.matrix(), mlp.down.matrix()};
  const int64_t hidden = matrices[0].cols, inner = matrices[2].cols;
  const bool up_integers = !exact && matrices[0].kind != Kind::kBf16, down_integers = !exact && matrices[2].kind != Kind::kBf16;
  tokens.resize(num_tokens, hidden, matrices[0].group);
  inners.resize(num_tokens, inner, matrices[2].group);
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
  Phases phases(num_threads);
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
      ops.activate(mlp.how, gate_up + t * 2 * inner + 2 * first, length, of_inners.x(t) + first);
      of_inners.finish(ops, t, matrices[2].kind, down_integers, first, first + length);
    });
    phases.each(3, int64_t(down_tasks.size()), [&](int64_t i) {
      multiply_to(ops, down_tasks[i], matrices[2], of_inners, num_tokens, down_integers, result, out, dtype);
    });
  };
  run_phases(num_threads, work);
}

namespace {

// One token's attention in phases; the caller prepares its input and takes its output.
class Attending {
 public:
  // Sizes everything; `token` is the calling thread's.
  Attending(const Ops& ops, const Attention& a, Inputs& token, void* keys, void* values, int64_t length, int64_t room, bool exact)
      : ops_(ops), a_(a), token_(token), attended_(own_inputs()), keys_(keys), values_(values), length_(length), room_(room) {
    q_ = a.q.matrix(), k_ = a.k.matrix(), v_ = a.v.matrix(), last_ = a.o.matrix();
    integers_ = !exact && q_.kind != Kind::kBf16, last_integers_ = !exact && last_.kind != Kind::kBf16;
    token.resize(1, q_.cols, q_.group);
    attended_.resize(1, last_.cols, last_.group);
    cut(tasks_, 0, q_), cut(tasks_, 1, k_), cut(tasks_, 2, v_);
    cut(last_tasks_, 0, last_);
    count_ = length + 1, padded_ = (count_ + 15) / 16 * 16;
    head_floats_ = padded_ + (kValueRows + 2) * a.dim;
    const int64_t total = (a.heads + 2 * a.kv_heads) * a.dim;
    query_ = own_scratch().of<float>(total + 2 * a.dim + last_.rows + a.heads * head_floats_);
    key_ = query_ + a.heads * a.dim, value_ = key_ + a.kv_heads * a.dim;
    angles_ = query_ + total, result_ = angles_ + 2 * a.dim, heads_ = result_ + last_.rows;
  }

  float* result() const { return result_; }  // [o.rows]
  int64_t size() const { return last_.rows; }

  // After token.x(0) is written: the rest of phase 0.
  void begin(const void* cos, const void* sin, Dtype dtype) {
    token_.finish(ops_, 0, q_.kind, integers_);
    ops_.to_float(cos, dtype, a_.dim, angles_);
    ops_.to_float(sin, dtype, a_.dim, angles_ + a_.dim);
  }

  // Phases 1 to 5; calls `done(begin, end)` for rows of the result that are written.
  template <class Done>
  void run(Phases& phases, Done done) {
    const int64_t dim = a_.dim, group = a_.heads / a_.kv_heads;
    float *const cos = angles_, *const sin = angles_ + dim;
    phases.each(1, int64_t(tasks_.size()), [&](int64_t i) {
      const int64_t which = tasks_[i].expert;
      multiply(ops_, tasks_[i], which == 0 ? q_ : which == 1 ? k_ : v_, token_, 1, integers_,
               which == 0 ? query_ : which == 1 ? key_ : value_, 0);
    });
    phases.each(2, a_.kv_heads, [&](int64_t h) {
      turn(ops_, a_, key_ + h * dim, a_.k_norm, cos, sin, heads_ + h * head_floats_);
      ops_.from_float(key_ + h * dim, dim, at(keys_, Dtype::kBf16, (h * room_ + length_) * dim), Dtype::kBf16);
      ops_.from_float(value_ + h * dim, dim, at(values_, Dtype::kBf16, (h * room_ + length_) * dim), Dtype::kBf16);
    });
    phases.each(3, a_.heads, [&](int64_t h) {
      float *const scores = heads_ + h * head_floats_, *const rows = scores + padded_, *const head = query_ + h * dim;
      turn(ops_, a_, head, a_.q_norm, cos, sin, rows);
      const int64_t first = h / group * room_ * dim;
      const uint8_t* const key = static_cast<const uint8_t*>(at(keys_, Dtype::kBf16, first));
      const Matrix past = {Kind::kBf16, count_, dim, kGroup, groups_of(dim), {key, nullptr, nullptr}, nullptr, nullptr, nullptr, Dtype::kF32};
      const Token query = {nullptr, nullptr, nullptr, head, scores};
      ops_.product(past, &query, 1, 0, count_);
      softmax(scores, count_, a_.scaling);
      // Several rows of values at a time as numbers, the sum so far before them with weight 1.
      float weights[kValueRows + 1] = {1.0f};
      std::fill(rows, rows + dim, 0.0f);
      for (int64_t row = 0; row < count_; row += kValueRows) {
        const int64_t some = std::min(kValueRows, count_ - row);
        std::copy(scores + row, scores + row + some, weights + 1);
        ops_.to_float(at(values_, Dtype::kBf16, first + row * dim), Dtype::kBf16, some * dim, rows + dim);
        ops_.combine(rows, weights, some + 1, dim, rows);
      }
      std::copy(rows, rows + dim, attended_.x(0) + h * dim);
    });
    phases.each(4, 1, [&](int64_t) { attended_.finish(ops_, 0, last_.kind, last_integers_); });
    phases.each(5, int64_t(last_tasks_.size()), [&](int64_t i) {
      multiply(ops_, last_tasks_[i], last_, attended_, 1, last_integers_, result_, 0);
      done(last_tasks_[i].begin, last_tasks_[i].end);
    });
  }

 private:
  static Inputs& own_inputs() {
    static thread_local Inputs inputs;
    return inputs;
  }
  static Scratch& own_scratch() {
    static thread_local Scratch scratch;
    return scratch;
  }

  const Ops& ops_;
  const Attention& a_;
  Inputs &token_, &attended_;
  void *keys_, *values_;
  int64_t length_, room_, count_, padded_, head_floats_;
  Matrix q_, k_, v_, last_;
  bool integers_, last_integers_;
  std::vector<Rows> tasks_, last_tasks_;
  float *query_, *key_, *value_, *angles_, *result_, *heads_;
};

float rounded(const Ops& ops, float value) {
  uint16_t bits;
  ops.from_float(&value, 1, &bits, Dtype::kBf16);
  ops.to_float(&bits, Dtype::kBf16, 1, &value);
  return value;
}

}  // namespace

void run_attention(const Ops& ops, const Attention& a, const void* x, Dtype dtype, const void* cos, const void* sin, void* keys,
                   void* values, int64_t length, int64_t room, void* out, bool exact, int num_threads) {
  static thread_local Inputs token;
  Inputs& of_token = token;  // the calling thread's own
  Attending attending(ops, a, token, keys, values, length, room, exact);
  Phases phases(num_threads);
  auto work = [&] {
    phases.each(0, 1, [&](int64_t) {
      ops.to_float(x, dtype, a.q.place.cols, of_token.x(0));
      attending.begin(cos, sin, dtype);
    });
    attending.run(phases, [&](int64_t begin, int64_t end) {
      ops.from_float(attending.result() + begin, end - begin, at(out, dtype, begin), dtype);
    });
  };
  run_phases(num_threads, work);
}

float run_layer(const Ops& ops, const Layer& layer, const void* x, const void* cos, const void* sin, void* keys, void* values,
                int64_t length, int64_t room, void* residual, void* normed, int64_t* chosen, float* weights, bool exact,
                int num_threads) {
  static thread_local Inputs token, routed;
  static thread_local Scratch scratch;
  const Dtype bf16 = Dtype::kBf16;
  const int64_t hidden = layer.attention.q.place.cols;
  const Matrix router = layer.router.matrix(), shared_gate = layer.shared_gate.matrix();
  Inputs &of_token = token, &of_routed = routed;
  Attending attending(ops, layer.attention, token, keys, values, length, room, exact);
  routed.resize(1, hidden, router.group);
  float* const logits = scratch.of<float>(router.rows + 1);
  std::vector<Rows> tasks;
  cut(tasks, 0, router);
  if (layer.shared_gate.address) tasks.push_back({1, 0, 1});
  Phases phases(num_threads);
  auto work = [&] {
    phases.each(0, 1, [&](int64_t) {
      run_rms_norm(ops, x, bf16, 1, hidden, layer.norm, layer.norm_dtype, layer.eps, layer.rounds_first, normed);
      ops.to_float(normed, bf16, hidden, of_token.x(0));
      attending.begin(cos, sin, bf16);
    });
    attending.run(phases, [](int64_t, int64_t) {});
    phases.each(6, 1, [&](int64_t) {
      float *const sum = attending.result(), *const before = of_routed.x(0);
      ops.to_float(x, bf16, hidden, before);
      for (int64_t i = 0; i < hidden; ++i) sum[i] += before[i];
      ops.from_float(sum, hidden, residual, bf16);
      run_rms_norm(ops, residual, bf16, 1, hidden, layer.post_norm, layer.norm_dtype, layer.eps, layer.rounds_first, normed);
      ops.to_float(normed, bf16, hidden, of_routed.x(0));
      of_routed.finish(ops, 0, Kind::kBf16, false);
    });
    phases.each(7, int64_t(tasks.size()), [&](int64_t i) {
      const bool shared = tasks[i].expert == 1;
      multiply(ops, tasks[i], shared ? shared_gate : router, of_routed, 1, false, shared ? logits + router.rows : logits, 0);
    });
  };
  run_phases(num_threads, work);

  // As families have it: logits in bf16, probabilities in fp32, weights in bf16.
  for (int64_t i = 0; i < router.rows; ++i) logits[i] = rounded(ops, logits[i]);
  run_route(ops, logits, router.rows, layer.top_k, layer.normalize, chosen, weights);
  for (int64_t k = 0; k < layer.top_k; ++k) weights[k] = rounded(ops, weights[k]);
  return layer.shared_gate.address ? rounded(ops, ops.steps->sigmoid(rounded(ops, logits[router.rows]))) : 1.0f;
}

void run_layer_end(const Ops& ops, const void* residual, const float* rows, const float* weights, int64_t num_rows,
                   const void* shared, float factor, int64_t n, void* out) {
  static thread_local Scratch scratch;
  float *const sum = scratch.of<float>(2 * n), *const other = sum + n;
  ops.combine(rows, weights, num_rows, n, sum);
  if (shared) {
    ops.to_float(shared, Dtype::kBf16, n, other);
    ops.steps->add(factor, other, n, sum);
  }
  ops.to_float(residual, Dtype::kBf16, n, other);
  ops.steps->add(1.0f, other, n, sum);
  ops.from_float(sum, n, out, Dtype::kBf16);
}

}  // namespace fate
