// NEON with SDOT and SMMLA (Armv8.6's 8-bit matrix products: Neoverse V1 and N2, Apple's M2 and later).
#include "ops.h"

#if defined(__linux__) && defined(__ARM_FEATURE_MATMUL_INT8)
#include <sys/auxv.h>
#define FATE_NEON_RUNS bool(getauxval(AT_HWCAP2) & 1ul << 13)  // HWCAP2_I8MM
#define FATE_NEON_OPS neon_i8mm_ops
#define FATE_NEON_NAME "neon-i8mm"
#include "neon.cpp"
#else
namespace fate {
const Ops* neon_i8mm_ops() { return nullptr; }
}  // namespace fate
#endif
