// A layer's steps in NEON.
#include "steps.h"

#if defined(__aarch64__)
#include "lanes.h"

namespace fate {
namespace {
#include "steps.inc"
#include "attend.inc"
#include "numbers.inc"
#include "recurrent.inc"
}  // namespace

const Steps kNeonSteps = {normalize, center, softmax, one_sigmoid, turn, turn_pairs, add, attend, put_codes, multiply_numbers,
                            convolve, unit, decays, gate, delta};

}  // namespace fate
#endif
