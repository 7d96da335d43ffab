// The steps of a layer between its products, in the orders that kernels/elementary.py and kernels/attention.py state: the same bits from
// every instruction set, for any number of rows.
#pragma once
#include <cstdint>

namespace fate {

struct Matrix;
struct Token;

constexpr int64_t kMostTurned = 512;  // channels of a head that turn in pairs
constexpr int64_t kPositions = 64;  // of a block of keys and values; blocks begin at multiples of it

// How a position's keys or values of one head lie in memory: as bf16 [dim]; or, defined in kernels/attention.py, as int8 [dim] and then a
// fp32 scale of each kScaled of these.
enum class KvFormat : int32_t { kBf16 = 0, kInt8 = 1 };
constexpr int64_t kScaled = 64;
// From a position to the next, in what strides count: numbers of bf16, or bytes.
static inline int64_t kv_row(KvFormat format, int64_t dim) {
  return format == KvFormat::kBf16 ? dim : dim + (dim + kScaled - 1) / kScaled * int64_t(sizeof(float));
}

// Query rows that share one head of keys and values, of `num_tokens` positions from `first` on, `heads` of each. Token t's head h has
// its row at q + t * stride + h * dim, and its result in `out` so.
struct Queries {
  const float* q;
  float* out;
  int64_t stride, num_tokens, heads, dim, first;
  int64_t window;                 // positions that a token sees, itself among them; 0: all before it
  float scaling, cap;             // cap * tanh(score / cap) where cap is not 0
  const float* sinks;             // [heads]: scores of no position; or null
  // Block b of kPositions positions begins at keys + id * block_stride, where id is blocks[b], or b without `blocks`; they are kv_row
  // apart. Values likewise.
  KvFormat format;
  const void *keys, *values;
  const int32_t* blocks;
  int64_t block_stride;
  float* scratch;                 // [attend_floats]
};

constexpr int64_t kFewRows = 8;    // up to so many the block is turned in pieces that stay in the nearest cache
constexpr int64_t kRowFloats = 16;  // what is kept of a row beside its sums

// Of a task of `num_rows` rows. (Static: no linker takes the copy of another instruction set.)
static inline int64_t attend_floats(int64_t num_rows, int64_t dim) {
  const int64_t padded = (dim + 15) / 16 * 16;
  return (padded + kScaled + padded) * kPositions + 2 * (padded / kScaled + 1) * kPositions + num_rows * (padded + kPositions + kRowFloats);
}

// Rows of one sequence, one after the other, through some columns of a value head's state (kernels/recurrent.py, `delta_rule`).
struct DeltaRows {
  const float *q, *k, *v, *decay, *beta;  // of row t at t times their stride
  int64_t key_stride, value_stride, gate_stride;  // of q and k, of v, of decay and beta
  float *out, *state;                             // of row t at t * out_stride; [key_dim] rows of `columns` numbers, state_stride apart
  int64_t out_stride, state_stride;
  int64_t num_rows, key_dim, columns;  // a multiple of 16 columns
};

struct Steps {
  // y = x * f rounded to bf16 if `rounds`, with f = 1 / sqrt(mean of squares + eps); out = y * weight. May be in place.
  void (*normalize)(const float* x, const float* weight, int64_t n, float eps, bool rounds, float* out);
  // x - the mean of x, in place.
  void (*center)(float* x, int64_t n);
  void (*softmax)(float* x, int64_t n);
  float (*sigmoid)(float x);
  // Channels i and i + n / 2 of a head turn by the angles of cos and sin [n].
  void (*turn)(float* head, int64_t n, const float* cos, const float* sin);
  // Channels 2 * i and 2 * i + 1 turn by the angle of cos[i] and sin[i], i < n / 2; with `parts` to places i and i + n / 2.
  void (*turn_pairs)(float* head, int64_t n, const float* cos, const float* sin, bool parts);
  // y = fma(factor, x, y).
  void (*add)(float factor, const float* x, int64_t n, float* y);
  void (*attend)(const Queries&);
  // A row of keys or values [n] of one head as KvFormat::kInt8 has it.
  void (*put_codes)(const float* x, int64_t n, void* to);
  // As Ops::product, of a matrix of numbers.
  void (*product)(const Matrix&, const Token* tokens, int64_t num_tokens, int64_t begin, int64_t end);
  // out[c] = silu of the sum of weights[j * stride + c] * rows[j][c] over j < kernel, fused, from 0; c < n.
  void (*convolve)(const float* const* rows, const float* weights, int64_t stride, int64_t kernel, int64_t n, float* out);
  // x over the root of its sum of squares and 1e-6, times `scale`.
  void (*unit)(float* x, int64_t n, float scale);
  // out = e^-(rate * softplus(a + bias)); may be in place of a.
  void (*decays)(const float* a, const float* biases, const float* rates, int64_t n, float* out);
  // x times the sigmoid of `gates`, or times their silu.
  void (*gate)(const float* gates, bool silu, int64_t n, float* x);
  void (*delta)(const DeltaRows&);
};

extern const Steps kAvx512Steps, kAvx2Steps, kNeonSteps, kPortableSteps;

}  // namespace fate
