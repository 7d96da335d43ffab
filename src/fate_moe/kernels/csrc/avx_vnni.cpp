// AVX2 with AVX-VNNI and GFNI, for processors without AVX-512 (Alder Lake and later).
#include "ops.h"

#if defined(__AVXVNNI__) && defined(__GFNI__)
#include <cpuid.h>

namespace fate {
namespace {

bool has_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1) != 0;
}

}  // namespace
}  // namespace fate

#define FATE_AVX2_OPS avx_vnni_ops
#define FATE_AVX2_NAME "avx-vnni"
#define FATE_AVX2_RUNS (__builtin_cpu_supports("gfni") && has_vnni())
#include "avx2.cpp"
#else
namespace fate {
const Ops* avx_vnni_ops() { return nullptr; }
}  // namespace fate
#endif
