// Whole modules of a plain decoder layer for few tokens, each in one call: RMSNorm, a gated MLP, attention with its KV cache.
#pragma once
#include <cstdint>

#include "products.h"

namespace fate {

// A linear layer whose matrix lies at a fixed address.
struct Weight {
  Place place;
  uint64_t address;
  const void* bias;  // [rows] of bias_dtype, or null
  Dtype bias_dtype;

  Matrix matrix() const;
};

struct Mlp {
  Weight gate, up, down;
  ActivationSpec how;  // not interleaved
};

struct Attention {
  Weight q, k, v, o;
  int64_t heads, kv_heads, dim;
  float scaling;
  const void *q_norm, *k_norm;  // RMSNorm weights [dim] over each head, of norm_dtype, or null
  Dtype norm_dtype;
  float eps;
};

// out [num_tokens, n] of dtype, as x: x / sqrt(mean of x squared + eps), with `rounds_first` rounded to dtype, times weight.
void run_rms_norm(const Ops&, const void* x, Dtype dtype, int64_t num_tokens, int64_t n, const void* weight, Dtype weight_dtype,
                  float eps, bool rounds_first, void* out);

// Of one token's logits (overwritten) the top_k experts, likeliest first, of equal ones the lowest index, and their softmax, with
// `normalize` divided by their sum.
void run_route(const Ops&, float* logits, int64_t num_experts, int64_t top_k, bool normalize, int64_t* chosen, float* weights);

// out [num_tokens, down.rows] of dtype, as x [num_tokens, gate.cols].
void run_mlp(const Ops&, const Mlp&, const void* x, Dtype dtype, int64_t num_tokens, void* out, bool exact, int num_threads);

// One token at position `length` of one sequence: out [o.rows] of dtype from x [q.cols]. cos and sin [dim] of dtype (rotate-half
// rope). keys and values are [kv_heads, room, dim] of bf16 with `length` < room tokens in them; the new token is appended.
void run_attention(const Ops&, const Attention&, const void* x, Dtype dtype, const void* cos, const void* sin, void* keys,
                   void* values, int64_t length, int64_t room, void* out, bool exact, int num_threads);

// What of a decoder layer comes before its experts: norm, attention, residual, norm, router (softmax, then the largest).
struct Layer {
  const void *norm, *post_norm;  // [hidden] of norm_dtype
  Dtype norm_dtype;
  float eps;
  bool rounds_first;  // as in run_rms_norm
  Attention attention;
  Weight router;       // bf16 [experts, hidden]
  Weight shared_gate;  // bf16 [1, hidden], address 0 where there is none
  int64_t top_k;
  bool normalize;  // the chosen experts' weights add up to 1
};

// As run_attention, for x bf16 [hidden]: the residual stream after attention to `residual`, the experts' input to `normed` (both
// bf16 [hidden]), the chosen experts to `chosen`, likeliest first, and their weights to `weights`, fp32 [top_k]. Returns the shared
// expert's factor (1 without a shared gate).
float run_layer(const Ops&, const Layer&, const void* x, const void* cos, const void* sin, void* keys, void* values, int64_t length,
                int64_t room, void* residual, void* normed, int64_t* chosen, float* weights, bool exact, int num_threads);

// What comes after: y = the weighted sum of rows (Ops::combine), y = fma(factor, shared, y) unless shared is null, out bf16 [n] = y +
// residual, rounded once.
void run_layer_end(const Ops&, const void* residual, const float* rows, const float* weights, int64_t num_rows, const void* shared,
                   float factor, int64_t n, void* out);

}  // namespace fate
