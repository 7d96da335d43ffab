// A layer's steps in AVX2.
#include "steps.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "lanes.h"

namespace fate {
namespace {
#include "steps.inc"
#include "attend.inc"
#include "numbers.inc"
}  // namespace

const Steps kAvx2Steps = {normalize, softmax, one_sigmoid, turn, add, attend, multiply_numbers};

}  // namespace fate
#endif
