// A layer's steps in NEON.
#include "steps.h"

#if defined(__aarch64__)
#include "lanes.h"

namespace fate {
namespace {
#include "steps.inc"
#include "attend.inc"
#include "numbers.inc"
}  // namespace

const Steps kNeonSteps = {normalize, softmax, one_sigmoid, turn, add, attend, multiply_numbers};

}  // namespace fate
#endif
