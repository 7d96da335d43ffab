// How a token's experts follow from its logits, as kernels/routing.py defines it.
#pragma once
#include "ops.h"

namespace fate {

enum class Scores : int32_t { kSoftmax = 0, kSigmoid = 1, kSparseMixer = 2 };

struct Router {
  int64_t top_k;
  Scores scores;
  bool normalize;      // weights are divided by their sum, which counts as `floor` where it is less
  float floor, scale;  // weights are multiplied by scale
  const void* correction;  // [experts] of correction_dtype: added to scores where experts are chosen, not where they are weighed; or null
  Dtype correction_dtype;
  int64_t groups, top_groups, group_best;  // only experts of the top_groups groups with the largest sums of group_best scores are chosen
  float spread;                            // of kSparseMixer
  bool rounds_logits, rounds_weights;      // to bf16
};

// Of one token's logits (overwritten) the top_k experts and their weights.
void run_route(const Ops&, const Router&, float* logits, int64_t num_experts, int64_t* chosen, float* weights);

}  // namespace fate
