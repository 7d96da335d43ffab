// Norms over a row, as kernels/elementary.py defines them.
#pragma once
#include "ops.h"

namespace fate {

struct Norm {
  const void *weight, *bias;  // [n] of dtype; no bias: null
  Dtype dtype;
  float eps, offset;  // offset is added to the weight
  bool rounds_first;  // the row over its root mean square is rounded to its dtype before it is multiplied by the weight
  bool centered;      // the mean is taken off first
};

// What apply_norm wants of a norm over n values: fp32 [2 * n].
inline void read_norm(const Ops& ops, const Norm& norm, int64_t n, float* numbers) {
  ops.to_float(norm.weight, norm.dtype, n, numbers);
  for (int64_t i = 0; norm.offset != 0.0f && i < n; ++i) numbers[i] = norm.offset + numbers[i];
  if (norm.bias) ops.to_float(norm.bias, norm.dtype, n, numbers + n);
}

// In place; `dtype` is the row's own, in which `rounds_first` rounds.
inline void apply_norm(const Ops& ops, const Norm& norm, const float* numbers, int64_t n, Dtype dtype, float* row) {
  if (norm.centered) ops.steps->center(row, n);
  ops.steps->normalize(row, numbers, n, norm.eps, norm.rounds_first && dtype == Dtype::kBf16, row);
  for (int64_t i = 0; norm.bias && i < n; ++i) row[i] = row[i] + numbers[n + i];
}

}  // namespace fate
