// Whole modules of a plain decoder layer, each in one call: RMSNorm, a gated MLP, attention with its KV cache.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "norms.h"
#include "products.h"
#include "routers.h"

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

// Of multi-head latent attention. Attention has one head of keys there, of dim = rank + rotary_dim; q is from what q_a makes, if there is one,
// q_norm is over that, and k_norm over the rank.
struct Latent {
  Weight q_a, kv_a, kv_b;   // kv_a: [rank + rotary_dim, hidden]; kv_b: of each head nope rows for keys, then value_dim for values, [rank]
  int64_t nope, value_dim;  // value_dim 0: it is no such attention
};

// Of a gated delta rule (Yang et al., arXiv 2412.06464; recurrent.h), which has a state of fixed size in place of keys and values. Rows of
// `inputs` one after the other are a token's raw row, where q, k, v, z, b and a of key head h begin at starts[i] + h * steps[i]; the last
// four are those of all value heads that share the key head. Numbers that are not matrices are copies in fp32.
struct Delta {
  std::vector<Weight> inputs;
  int64_t key_heads = 0, value_heads = 0, key_dim = 0, value_dim = 0;  // value_dim 0: it is no such layer
  int64_t kernel = 0;                                                   // rows that the convolution sees, its own among them
  std::vector<int64_t> starts, steps;
  std::vector<float> convolution;   // [kernel][channels], channels are all q, all k, all v
  std::vector<float> biases, rates;  // [value_heads]: dt_bias and e^A_log
  Norm norm;                         // of a value head's result

  int64_t channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
};

enum class Rope : int32_t { kHalves = 0, kPairs = 1, kPairsApart = 2 };  // Steps::turn, turn_pairs, and turn_pairs with `parts`

struct Attention {
  Weight q, k, v, o;
  int64_t heads, kv_heads, dim, rotary_dim;
  int64_t num_angles;  // of a token in cos and in sin: rotary_dim, or half of it where both halves are the same
  Rope rope;
  float scaling;
  Norm q_norm, k_norm;  // over each head [dim], or over [heads * dim] and [kv_heads * dim]; no weight: none
  bool norm_over_heads;
  float clip;         // queries, keys and values are within plus and minus this; 0: as they are
  int64_t window;     // positions that a token sees, itself among them; 0: all before it
  const void* sinks;  // [heads] of sinks_dtype: scores of no position; or null
  Dtype sinks_dtype;
  Latent latent;
  bool norm_after_rope = false;  // q_norm and k_norm come after the turn
  bool gated = false;            // a head of q has its queries, then as many gates, by whose sigmoid its result is multiplied
  std::vector<float> scales;     // queries at position p are multiplied by number p / scale_every of these, or by the last; empty: they are not
  int64_t scale_every = 1;
  Delta delta;

  float scale_at(int64_t position) const { return scales[size_t(std::min<int64_t>(position / scale_every, int64_t(scales.size()) - 1))]; }
  int64_t hidden() const { return o.place.rows; }
};

// Keys and values of one decoder layer. Block b of entry i of a batch begins, for head h, at
// keys + i * batch_stride + b * block_stride + h * head_stride, its positions kv_row apart; strides count as that does. Of a delta rule
// `keys` has the inputs of the convolution, bf16 [channels, kernel] of entry i at i * batch_stride numbers, the newest last, and `values`
// the states, fp32 [value_heads, key_dim, value_dim] of entry i at i * block_stride; of an entry without a past they are not read.
struct Kv {
  void *keys, *values;
  int64_t batch_stride, block_stride, head_stride;
  KvFormat format;

  void* at(void* states, int64_t index) const { return static_cast<char*>(states) + (format == KvFormat::kBf16 ? 2 * index : index); }
  // Writes a row [n] that begins at `index` of keys or values.
  void put(const Ops& ops, const float* x, int64_t n, void* states, int64_t index) const {
    if (format == KvFormat::kBf16) return ops.from_float(x, n, at(states, index), Dtype::kBf16);
    ops.steps->put_codes(x, n, at(states, index));
  }
};

// What a sequence keeps in a layer with a state, as it is once it has `position` positions, is written to `entry` too.
struct Mark {
  int64_t position, entry;
};

// Rows [begin, end) of a call that follow one another in one sequence, of which `past` positions are in the KV cache before them.
struct Span {
  int64_t begin, end, past;
  int64_t entry, first;   // of the batch, and the positions there that are not the sequence's (padding)
  const int32_t* blocks;  // the ids of its blocks; null: 0, 1, 2, ...
  const std::vector<Mark>* marks = nullptr;  // ascending; those that its rows do not reach mean nothing

  // Calls run(first, count) for the rows between marks, counted from `begin`, and after those up to a mark reached(its entry).
  template <class Run, class Reached>
  void each_part(Run run, Reached reached) const {
    int64_t done = 0;
    for (size_t i = 0; marks && i < marks->size(); ++i) {
      const Mark& mark = (*marks)[i];
      const int64_t count = mark.position - past;
      if (count <= done || count > end - begin) continue;
      run(done, count - done);
      reached(mark.entry);
      done = count;
    }
    if (done < end - begin) run(done, end - begin - done);
  }
};

// out [num_tokens, n] of dtype, as x.
void run_norm(const Ops&, const Norm&, const void* x, Dtype dtype, int64_t num_tokens, int64_t n, void* out, int num_threads);

// out [num_tokens, down.rows] of dtype, as x [num_tokens, gate.cols].
void run_mlp(const Ops&, const Mlp&, const void* x, Dtype dtype, int64_t num_tokens, void* out, bool exact, int num_threads);

// The rows of `spans`, all of x [num_rows, q.cols], whose keys and values are written: out [num_rows, o.rows] of dtype, as x. cos and sin
// [num_rows, num_angles]. A row's bits do not depend on the other rows of the call.
void run_attention(const Ops&, const Attention&, const void* x, Dtype dtype, const std::vector<Span>& spans, const float* cos,
                   const float* sin, const Kv&, void* out, bool exact, int num_threads);

// What of a decoder layer comes before its experts: norm, attention, residual, norm, router.
struct Layer {
  Norm norm, post_norm;
  Attention attention;
  Weight router;       // [experts, hidden] of numbers, address 0 where there are no experts
  Weight shared_gate;  // [1, hidden] of numbers, address 0 where there is none
  Router routing;
  float residual_scale;  // of what attention adds: fma(residual_scale, attended, x)
  Norm block_norm;       // of what the experts and the shared one add together; no weight: none
};

// What run_layer writes of each token; bf16 but for fp32 weights and factors.
struct LayerOut {
  void *residual, *normed;  // [num_tokens, hidden]: the residual stream after attention, and the experts' input
  int64_t* chosen;          // [num_tokens, top_k], in routing order
  float *weights, *factors;  // [num_tokens, top_k], and [num_tokens]: the shared expert's, 1 without a shared gate
};

// As run_attention, for x bf16 [num_tokens, hidden].
void run_layer(const Ops&, const Layer&, const void* x, const std::vector<Span>& spans, const float* cos, const float* sin, const Kv&,
               const LayerOut&, bool exact, int num_threads);

// What comes after: y = the weighted sum of a token's rows [num_rows] (Ops::combine), y = fma(factor, shared, y) unless shared is null, its
// norm, if there is one, out bf16 [num_tokens, n] = fma(residual_scale, y, residual), rounded once more.
void run_layer_end(const Ops&, const void* residual, const float* rows, const float* weights, int64_t num_tokens, int64_t num_rows,
                   const void* shared, const float* factors, float residual_scale, const Norm& block_norm, int64_t n, void* out, int num_threads);

}  // namespace fate
