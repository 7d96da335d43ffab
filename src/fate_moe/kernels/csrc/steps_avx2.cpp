// A layer's steps in AVX2.
#include "steps.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "lanes.h"

namespace fate {
namespace {
#include "steps.inc"
#include "attend.inc"
#include "numbers.inc"
#include "recurrent.inc"
}  // namespace

const Steps kAvx2Steps = {normalize, center, softmax, one_sigmoid, turn, turn_pairs, add, attend, put_codes, multiply_numbers,
                            convolve, unit, decays, gate, delta};

}  // namespace fate
#endif
