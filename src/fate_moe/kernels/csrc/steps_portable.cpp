// A layer's steps in plain C++.
#include "steps.h"

#define FATE_PLAIN_LANES
#include "lanes.h"

namespace fate {
namespace {
#include "steps.inc"
#include "attend.inc"
#include "numbers.inc"
#include "recurrent.inc"
}  // namespace

const Steps kPortableSteps = {normalize, center, softmax, one_sigmoid, turn, turn_pairs, add, attend, put_codes, multiply_numbers,
                            convolve, unit, decays, gate, delta};

}  // namespace fate
