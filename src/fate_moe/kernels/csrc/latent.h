// Multi-head latent attention, as kernels/attention.py (`attend_latent`) defines it: keys and values are one latent row of a position,
// which all heads share, and a part that turns. Queries go into the latent space, sums come out of it.
#pragma once
#include "layers.h"

namespace fate {

// Up to kMostRows rows of `spans`: result [num_rows, o.rows] from x(t, to), which writes row t [hidden]. A position lies in the cache as
// a row of dim: the latent row, then what turns; values are not written.
template <class Input>
void run_latent(const Ops&, const Attention&, const std::vector<Span>& spans, const float* cos, const float* sin, const Kv&, float* result,
                bool exact, int num_threads, Input x);

}  // namespace fate

#include "latent.inc"
