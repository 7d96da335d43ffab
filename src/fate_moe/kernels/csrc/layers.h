// Whole modules of a plain decoder layer, each in one call: RMSNorm, a gated MLP, attention with its KV cache.
#pragma once
#include <cstdint>
#include <vector>

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
  int64_t heads, kv_heads, dim, rotary_dim;
  float scaling;
  const void *q_norm, *k_norm;  // RMSNorm weights over each head [dim], or [heads * dim] and [kv_heads * dim], of norm_dtype; or null
  Dtype norm_dtype;
  float eps;
  bool norm_over_heads;
  float clip;      // queries, keys and values are within plus and minus this; 0: as they are
  int64_t window;  // positions that a token sees, itself among them; 0: all before it
};

// Keys and values of one decoder layer in bf16. Block b of entry i of a batch begins, for head h, at
// keys + i * batch_stride + b * block_stride + h * head_stride and lies there as [kPositions, dim]; strides count numbers.
struct Kv {
  void *keys, *values;
  int64_t batch_stride, block_stride, head_stride;
};

// Rows [begin, end) of a call that follow one another in one sequence, of which `past` positions are in the KV cache before them.
struct Span {
  int64_t begin, end, past;
  int64_t entry, first;   // of the batch, and the positions there that are not the sequence's (padding)
  const int32_t* blocks;  // the ids of its blocks; null: 0, 1, 2, ...
};

// out [num_tokens, n] of dtype, as x: x / sqrt(mean of x squared + eps), with `rounds_first` rounded to dtype, times weight.
void run_rms_norm(const Ops&, const void* x, Dtype dtype, int64_t num_tokens, int64_t n, const void* weight, Dtype weight_dtype,
                  float eps, bool rounds_first, void* out, int num_threads);

// Of one token's logits (overwritten) the top_k experts, likeliest first, of equal ones the lowest index, and their softmax, with
// `normalize` divided by their sum, times scale.
void run_route(const Ops&, float* logits, int64_t num_experts, int64_t top_k, bool normalize, float scale, int64_t* chosen,
               float* weights);

// out [num_tokens, down.rows] of dtype, as x [num_tokens, gate.cols].
void run_mlp(const Ops&, const Mlp&, const void* x, Dtype dtype, int64_t num_tokens, void* out, bool exact, int num_threads);

// The rows of `spans`, all of x [num_rows, q.cols], whose keys and values are written: out [num_rows, o.rows] of dtype. cos and sin
// [num_rows, rotary_dim] of dtype (rotate-half rope). A row's bits do not depend on the other rows of the call.
void run_attention(const Ops&, const Attention&, const void* x, Dtype dtype, const std::vector<Span>& spans, const void* cos, const void* sin,
                   const Kv&, void* out, bool exact, int num_threads);

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
  float scale;           // of these weights
  float residual_scale;  // of what attention adds: fma(residual_scale, attended, x)
};

// What run_layer writes of each token; bf16 but for fp32 weights and factors.
struct LayerOut {
  void *residual, *normed;  // [num_tokens, hidden]: the residual stream after attention, and the experts' input
  int64_t* chosen;          // [num_tokens, top_k], likeliest first
  float *weights, *factors;  // [num_tokens, top_k], and [num_tokens]: the shared expert's, 1 without a shared gate
};

// As run_attention, for x bf16 [num_tokens, hidden].
void run_layer(const Ops&, const Layer&, const void* x, const std::vector<Span>& spans, const void* cos, const void* sin, const Kv&,
               const LayerOut&, bool exact, int num_threads);

// What comes after: y = the weighted sum of a token's rows [num_rows] (Ops::combine), y = fma(factor, shared, y) unless shared is null,
// out bf16 [num_tokens, n] = fma(residual_scale, y, residual), rounded once more.
void run_layer_end(const Ops&, const void* residual, const float* rows, const float* weights, int64_t num_tokens, int64_t num_rows,
                   const void* shared, const float* factors, float residual_scale, int64_t n, void* out, int num_threads);

}  // namespace fate
