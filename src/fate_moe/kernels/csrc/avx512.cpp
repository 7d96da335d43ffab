// AVX-512 with VNNI, VBMI and GFNI (Ice Lake, Zen 4 and later): a block is four groups.
#include "ops.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__GFNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

#include <cstring>

#include "codes512.h"

namespace fate {
namespace {

using Sums = __m512;

inline Sums zero() { return _mm512_setzero_ps(); }
inline float total(Sums sums) { return _mm512_reduce_add_ps(sums); }

inline void add_products(Sums& sums, const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) sums = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sums);
}

template <Kind kind>
inline void dot(Sums& sums, const Codes& codes, const int8_t* q, const float* factors) {
  if constexpr (kind == Kind::kInt8) {
    FATE_UNROLL
    for (int g = 0; g < 4; ++g) {
      const __m512i products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes.part[g], _mm512_loadu_si512(q + 64 * g));
      sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_set1_ps(factors[g]), sums);
    }
    return;
  }
  __m512i products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes.part[0], _mm512_loadu_si512(q));
  FATE_UNROLL
  for (int j = 1; j < 4; ++j) products = _mm512_dpbusd_epi32(products, codes.part[j], _mm512_loadu_si512(q + 64 * j));
  const __m512i four_of_each = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  const __m512 spread = _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_load_ps(factors)), four_of_each);
  sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), spread, sums);
}

template <int quarter>
inline __m512 numbers(__m512i codes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(codes, quarter)));
}

// Quarter `lane` of part j is 16 codes: of group j, or of group `lane`.
template <Kind kind, int lane>
inline void dot_lane(Sums& sums, const Codes& codes, const float* x, const float* factors) {
  if constexpr (kind == Kind::kInt8) {
    FATE_UNROLL
    for (int j = 0; j < 4; ++j)
      sums = _mm512_fmadd_ps(_mm512_mul_ps(numbers<lane>(codes.part[j]), _mm512_loadu_ps(x + 64 * j + 16 * lane)),
                             _mm512_set1_ps(factors[j]), sums);
    return;
  }
  __m512 products = _mm512_setzero_ps();
  FATE_UNROLL
  for (int j = 0; j < 4; ++j)
    products = _mm512_fmadd_ps(numbers<lane>(codes.part[j]), _mm512_loadu_ps(x + 64 * lane + 16 * j), products);
  sums = _mm512_fmadd_ps(products, _mm512_set1_ps(factors[lane]), sums);
}

template <Kind kind>
inline void dot(Sums& sums, const Codes& codes, const float* x, const float* factors) {
  dot_lane<kind, 0>(sums, codes, x, factors);
  dot_lane<kind, 1>(sums, codes, x, factors);
  dot_lane<kind, 2>(sums, codes, x, factors);
  dot_lane<kind, 3>(sums, codes, x, factors);
}

inline void dot_bf16(Sums& sums, const uint16_t* w, const float* x) {
  for (int i = 0; i < 64; i += 16) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i)));
    sums = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)), _mm512_loadu_ps(x + i), sums);
  }
}

inline __m512 value(__m512 codes, float scale, float middle, float zero) {
  const __m512 centred = _mm512_add_ps(codes, _mm512_set1_ps(middle));
  return _mm512_sub_ps(_mm512_mul_ps(centred, _mm512_set1_ps(scale)), _mm512_set1_ps(zero));
}

inline __m256i to_bf16(__m512 values) {  // finite ones, to nearest even
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

template <Kind kind>
void expand_codes(const Matrix& m, int64_t at, const Codes& codes, int64_t n, float* out);
template <Kind kind>
void expand_codes(const Matrix& m, int64_t at, const Codes& codes, int64_t n, uint16_t* out);

inline float middle(Kind kind);

// As in loops.inc, with nothing between conversion and use: rows of a few hundred bytes leave no time for three passes over them.
#define FATE_OWN_FACTORS
template <Kind kind, bool exact, int T>
inline void factors(const uint16_t* scales, const uint16_t* zeros, int64_t count, const Token* tokens, int64_t first, Sums* sums,
                    float* scale, float (*factor)[kMostGroups]) {
  for (int64_t g = 0; g < count; g += 16) {
    const __mmask16 some = __mmask16(count - g < 16 ? (1u << (count - g)) - 1 : 0xffff);
    const __m512 s = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, scales + g));
    const __m512 z = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, zeros + g));
    const __m512 offset = _mm512_sub_ps(_mm512_mul_ps(s, _mm512_set1_ps(middle(kind))), z);
    if constexpr (exact) _mm512_store_ps(scale + g, s);
    FATE_UNROLL
    for (int t = 0; t < T; ++t) {
      sums[t] = _mm512_fmadd_ps(offset, _mm512_loadu_ps(tokens[t].sum + first + g), sums[t]);
      if constexpr (!exact) _mm512_store_ps(factor[t] + g, _mm512_mul_ps(s, _mm512_loadu_ps(tokens[t].scale + first + g)));
    }
  }
}

#include "loops.inc"

template <Kind kind>
inline void expand_codes(const Matrix& m, int64_t at, const Codes& codes, int64_t n, float* out) {
  alignas(64) uint8_t bytes[256];
  for (int j = 0; j < 4; ++j) _mm512_store_si512(bytes + 64 * j, codes.part[j]);
  for (int64_t g = 0; g < n; ++g) {
    float scale, zero;
    halves(m.scale + at + g, 1, &scale);
    halves(m.zero + at + g, 1, &zero);
    for (int j = 0; j < 4; ++j) {
      const uint8_t* from = bytes + (kind == Kind::kInt8 ? 64 * g + 16 * j : 64 * j + 16 * g);
      const __m512i wide = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(from)));
      _mm512_storeu_ps(out + 64 * g + 16 * j, value(_mm512_cvtepi32_ps(wide), scale, middle(kind), zero));
    }
  }
}

inline void store_bf16(uint16_t* out, __m256i numbers) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), numbers); }

// The 16 values of a group's four-bit codes.
template <Kind kind>
inline __m256i table_of(const Matrix& m, int64_t at) {
  const __m512 scale = _mm512_cvtph_ps(_mm256_set1_epi16(short(m.scale[at])));
  const __m512 zero = _mm512_cvtph_ps(_mm256_set1_epi16(short(m.zero[at])));
  const __m512 all = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return to_bf16(_mm512_sub_ps(_mm512_mul_ps(_mm512_add_ps(all, _mm512_set1_ps(middle(kind))), scale), zero));
}

// Two groups of a block at a time: a table of 32 values, looked up by code, or by 16 + code.
template <Kind kind, int pair>
inline void expand_pair(const Matrix& m, int64_t at, const Codes& codes, uint16_t* out) {
  const __m512i table = _mm512_inserti64x4(_mm512_castsi256_si512(table_of<kind>(m, at)), table_of<kind>(m, at + 1), 1);
  const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  FATE_UNROLL
  for (int j = 0; j < 4; ++j) {
    const __m512i index = _mm512_or_si512(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(codes.part[j], pair)), second);
    const __m512i numbers = _mm512_permutexvar_epi16(index, table);
    store_bf16(out + 16 * j, _mm512_castsi512_si256(numbers));
    store_bf16(out + 64 + 16 * j, _mm512_extracti64x4_epi64(numbers, 1));
  }
}

template <Kind kind>
inline void expand_codes(const Matrix& m, int64_t at, const Codes& codes, int64_t n, uint16_t* out) {
  if (kind != Kind::kInt8 && n == 4) {
    expand_pair<kind, 0>(m, at, codes, out);
    expand_pair<kind, 1>(m, at + 2, codes, out + 128);
    return;
  }
  alignas(64) float values[256];
  expand_codes<kind>(m, at, codes, n, values);
  for (int64_t i = 0; i < 64 * n; i += 16) store_bf16(out + i, to_bf16(_mm512_load_ps(values + i)));
}

const Ops kOps = {"avx512-vnni", product, quantize, sum_groups, gate, expand, to_float, from_float, combine};

}  // namespace

const Ops* avx512_ops() {
  __builtin_cpu_init();
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                    __builtin_cpu_supports("gfni");
  return runs ? &kOps : nullptr;
}

}  // namespace fate
#else
namespace fate {
const Ops* avx512_ops() { return nullptr; }
}  // namespace fate
#endif
