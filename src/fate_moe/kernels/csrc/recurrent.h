// Gated delta rule: a layer whose memory of a sequence is a convolution's last inputs and one matrix a head, as kernels/recurrent.py
// (`delta_attention`) defines it. Rows of a sequence go one after the other, so that any cut gives the same bits; sequences, heads and
// columns of their states go side by side.
#pragma once
#include <functional>
#include <vector>

#include "layers.h"

namespace fate {

// Up to kMostRows rows of `spans`: result [num_rows, o.rows] from x(t, to), which writes row t [hidden]. `kv`: layers.h.
void run_delta(const Ops&, const Attention&, const std::vector<Span>& spans, const Kv&, float* result, bool exact, int num_threads,
               const std::function<void(int64_t, float*)>& x);

}  // namespace fate
