// NEON with SDOT (Armv8.2's dot product: Cortex-A75, Neoverse N1, Apple's M1 and later).
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#define FATE_NEON_RUNS bool(getauxval(AT_HWCAP) & 1ul << 20)  // HWCAP_ASIMDDP
#elif defined(__ARM_FEATURE_DOTPROD)
#define FATE_NEON_RUNS true  // the build's own baseline, as on macOS
#else
#define FATE_NEON_RUNS false
#endif
#define FATE_NEON_OPS neon_dot_ops
#define FATE_NEON_NAME "neon-dot"
#include "neon.cpp"
