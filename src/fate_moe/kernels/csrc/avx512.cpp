// AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later): a block is four groups.
#include "ops.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

#include <cstring>

namespace fate {
namespace {

constexpr int64_t kBlock = 4;
struct Codes {
  __m512i part[4];  // planes: elements 16j .. 16j + 15 of four groups; int8: group j
};
using Sums = __m512;

inline Sums zero() { return _mm512_setzero_ps(); }
inline float total(Sums sums) { return _mm512_reduce_add_ps(sums); }

inline void add_products(Sums& sums, const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) sums = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sums);
}

inline void halves(const uint16_t* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
  if (i < n) {
    const __mmask16 mask = __mmask16((1u << (n - i)) - 1);
    _mm512_mask_storeu_ps(out + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, in + i)));
  }
}

// Byte b of a group's 16 receives, from the group's 8 bytes of a 1-bit plane, eight bits of which number `bit` is element 16j + b.
template <int j, int bit>
inline __m512i bits_of(__m512i plane) {
  constexpr int64_t first = 16 * j - bit + 64, step = 0x0101010101010101;
  constexpr int64_t low = first * step + 0x0706050403020100, high = (first + 8) * step + 0x0706050403020100;
  return _mm512_multishift_epi64_epi8(_mm512_set_epi64(high, low, high, low, high, low, high, low), plane);
}

// Bits 2 and 3 of the shifted 2-bit plane, bit 1 of the first 1-bit plane, bit 0 of the second.
template <Kind kind, int j>
inline __m512i part_of(__m512i h, __m512i m, __m512i l) {
  if constexpr (kind == Kind::kPlanes1) return _mm512_and_si512(h, _mm512_set1_epi8(12));
  constexpr int choose = 0xca;  // the first argument's bits choose between the others'
  __m512i code = _mm512_ternarylogic_epi64(_mm512_set1_epi8(12), h, bits_of<j, 1>(m), choose);
  if constexpr (kind == Kind::kPlanes2) return _mm512_and_si512(code, _mm512_set1_epi8(14));
  code = _mm512_ternarylogic_epi64(_mm512_set1_epi8(14), code, bits_of<j, 0>(l), choose);
  return _mm512_and_si512(code, _mm512_set1_epi8(15));
}

template <Kind kind>
inline Codes codes_of(__m512i h, __m256i m, __m256i l) {
  const __m512i twice = _mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i m2 = _mm512_permutexvar_epi64(twice, _mm512_castsi256_si512(m));
  const __m512i l2 = _mm512_permutexvar_epi64(twice, _mm512_castsi256_si512(l));
  return {{part_of<kind, 0>(_mm512_slli_epi32(h, 2), m2, l2), part_of<kind, 1>(h, m2, l2),
           part_of<kind, 2>(_mm512_srli_epi32(h, 2), m2, l2), part_of<kind, 3>(_mm512_srli_epi32(h, 4), m2, l2)}};
}

inline __m256i load32(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

template <Kind kind>
inline Codes decode(const Matrix& m, int64_t at) {
  if constexpr (kind == Kind::kInt8) {
    const uint8_t* from = m.planes[0] + at * 64;
    return {{_mm512_loadu_si512(from), _mm512_loadu_si512(from + 64), _mm512_loadu_si512(from + 128), _mm512_loadu_si512(from + 192)}};
  }
  const __m256i none = _mm256_setzero_si256();
  return codes_of<kind>(_mm512_loadu_si512(m.planes[0] + at * 16),
                        kind == Kind::kPlanes1 ? none : load32(m.planes[1] + at * 8),
                        kind == Kind::kPlanes3 ? load32(m.planes[2] + at * 8) : none);
}

template <Kind kind>
inline Codes decode_some(const Matrix& m, int64_t at, int64_t n) {
  const __m512i zeros = _mm512_setzero_si512();
  if constexpr (kind == Kind::kInt8) {
    const uint8_t* from = m.planes[0] + at * 64;
    return {{_mm512_loadu_si512(from), n > 1 ? _mm512_loadu_si512(from + 64) : zeros,
             n > 2 ? _mm512_loadu_si512(from + 128) : zeros, zeros}};
  }
  const __mmask8 two = __mmask8((1u << 2 * n) - 1), one = __mmask8((1u << n) - 1);
  const __m256i none = _mm256_setzero_si256();
  return codes_of<kind>(_mm512_maskz_loadu_epi64(two, m.planes[0] + at * 16),
                        kind == Kind::kPlanes1 ? none : _mm256_maskz_loadu_epi64(one, m.planes[1] + at * 8),
                        kind == Kind::kPlanes3 ? _mm256_maskz_loadu_epi64(one, m.planes[2] + at * 8) : none);
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
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
  return runs ? &kOps : nullptr;
}

}  // namespace fate
#else
namespace fate {
const Ops* avx512_ops() { return nullptr; }
}  // namespace fate
#endif
