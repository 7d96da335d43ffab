#include "routers.h"

#include <algorithm>
#include <limits>

#include "inputs.h"

namespace fate {
namespace {

constexpr float kLeast = -std::numeric_limits<float>::infinity();

void round_all(const Ops& ops, float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint16_t bits;
    ops.from_float(values + i, 1, &bits, Dtype::kBf16);
    ops.to_float(&bits, Dtype::kBf16, 1, values + i);
  }
}

// The index of the largest value that is not taken, of equal ones the lowest; NaN counts as the least. -1: all are taken.
int64_t largest(const float* values, const uint8_t* taken, int64_t n) {
  int64_t best = -1;
  float most = kLeast;
  for (int64_t i = 0; i < n; ++i) {
    const float value = values[i] == values[i] ? values[i] : kLeast;
    if (!taken[i] && (best < 0 || value > most)) best = i, most = value;
  }
  return best;
}

// Takes all experts but those of the best groups; `taken` has room for the groups behind the experts.
void take_groups(const Router& router, const float* values, int64_t num_experts, uint8_t* taken, float* sums) {
  const int64_t size = num_experts / router.groups;
  uint8_t* const taken_groups = taken + num_experts;
  for (int64_t g = 0; g < router.groups; ++g) {
    sums[g] = 0.0f;
    for (int64_t j = 0; j < router.group_best; ++j) {
      const int64_t best = largest(values + g * size, taken + g * size, size);
      const float value = values[g * size + best];
      sums[g] += value == value ? value : kLeast;
      taken[g * size + best] = 1;
    }
  }
  std::fill(taken, taken + num_experts, 1);
  for (int64_t j = 0; j < router.top_groups; ++j) {
    const int64_t best = largest(sums, taken_groups, router.groups);
    taken_groups[best] = 1;
    std::fill(taken + best * size, taken + (best + 1) * size, 0);
  }
}

// One expert after the other: the largest logit, weighed among those not taken that are not far below it.
void mix_sparsely(const Ops& ops, const Router& router, const float* logits, int64_t n, uint8_t* taken, float* near, int64_t* chosen,
                  float* weights) {
  for (int64_t k = 0; k < router.top_k; ++k) {
    const int64_t best = largest(logits, taken, n);
    const float most = logits[best];
    for (int64_t i = 0; i < n; ++i) {
      const float size = __builtin_fabsf(logits[i]), by = size < most ? most : size;
      near[i] = taken[i] || (most - logits[i]) / by > router.spread ? kLeast : logits[i];
    }
    ops.steps->softmax(near, n);
    chosen[k] = best, weights[k] = near[best], taken[best] = 1;
  }
}

}  // namespace

void run_route(const Ops& ops, const Router& router, float* logits, int64_t num_experts, int64_t* chosen, float* weights) {
  static thread_local Scratch floats, bytes;
  float *const values = floats.of<float>(num_experts + router.groups), *const sums = values + num_experts;
  uint8_t* const taken = bytes.of<uint8_t>(num_experts + router.groups);
  std::fill(taken, taken + num_experts + router.groups, 0);
  if (router.rounds_logits) round_all(ops, logits, num_experts);
  if (router.scores == Scores::kSparseMixer) {
    mix_sparsely(ops, router, logits, num_experts, taken, values, chosen, weights);
  } else {
    if (router.scores == Scores::kSoftmax)
      ops.steps->softmax(logits, num_experts);
    else
      for (int64_t i = 0; i < num_experts; ++i) logits[i] = ops.steps->sigmoid(logits[i]);
    if (router.correction)
      ops.to_float(router.correction, router.correction_dtype, num_experts, values);
    else
      std::fill(values, values + num_experts, 0.0f);
    for (int64_t i = 0; i < num_experts; ++i) values[i] = logits[i] + values[i];
    if (router.groups > router.top_groups) take_groups(router, values, num_experts, taken, sums);
    for (int64_t k = 0; k < router.top_k; ++k) {
      chosen[k] = largest(values, taken, num_experts);
      weights[k] = logits[chosen[k]], taken[chosen[k]] = 1;
    }
  }
  if (router.normalize) {
    float sum = 0.0f;
    for (int64_t k = 0; k < router.top_k; ++k) sum += weights[k];
    sum = sum < router.floor ? router.floor : sum;
    for (int64_t k = 0; k < router.top_k; ++k) weights[k] /= sum;
  }
  for (int64_t k = 0; k < router.top_k; ++k) weights[k] *= router.scale;
  if (router.rounds_weights) round_all(ops, weights, router.top_k);
}

}  // namespace fate
