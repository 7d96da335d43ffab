// AVX-512 with VNNI, VBMI and GFNI (Ice Lake, Zen 4 and later): a block is 256 columns.
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

inline __m512 two(float low, float high) { return _mm512_insertf32x8(_mm512_set1_ps(low), _mm256_set1_ps(high), 1); }

// The factors of a block's groups where dpbusd leaves their sums: in 16 / kBlock lanes each.
template <int64_t G>
inline __m512 spread(const float* factors) {
  if constexpr (G == 32) {
    const __m512i two_of_each = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return _mm512_permutexvar_ps(two_of_each, _mm512_castps256_ps512(_mm256_load_ps(factors)));
  } else if constexpr (G == 64) {
    const __m512i four_of_each = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_load_ps(factors)), four_of_each);
  } else {
    return two(factors[0], factors[1]);
  }
}

template <Kind kind, int64_t G>
FATE_INLINE void dot(Sums& sums, const Codes& codes, const int8_t* q, const float* factors) {
  if constexpr (kind == Kind::kInt8) {
    FATE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m512i products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes.part[i], _mm512_loadu_si512(q + 64 * i));
      const __m512 factor = G == 32 ? two(factors[2 * i], factors[2 * i + 1]) : _mm512_set1_ps(factors[64 * i / G]);
      sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), factor, sums);
    }
    return;
  }
  __m512i products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes.part[0], _mm512_loadu_si512(q));
  FATE_UNROLL
  for (int j = 1; j < 4; ++j) products = _mm512_dpbusd_epi32(products, codes.part[j], _mm512_loadu_si512(q + 64 * j));
  sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), spread<G>(factors), sums);
}

template <int lane>
inline __m512 numbers(__m512i codes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(codes, lane)));
}

// Lane `lane` of part j is 16 codes: of columns 64j + 16 lane on, or of group 16 lane / (G / 4); of groups of 32 it is 8 of two.
template <Kind kind, int64_t G, int lane>
inline void dot_lane(Sums& sums, const Codes& codes, const float* x, const float* factors) {
  if constexpr (kind == Kind::kInt8) {
    FATE_UNROLL
    for (int j = 0; j < 4; ++j)
      sums = _mm512_fmadd_ps(_mm512_mul_ps(numbers<lane>(codes.part[j]), _mm512_loadu_ps(x + 64 * j + 16 * lane)),
                             _mm512_set1_ps(factors[(64 * j + 16 * lane) / G]), sums);
    return;
  }
  constexpr int64_t group = 64 * lane / G, in = 16 * lane % (G / 4);
  __m512 products = _mm512_setzero_ps();
  FATE_UNROLL
  for (int j = 0; j < 4; ++j) {
    const float* const from = x + G * group + G / 4 * j + in;
    const __m512 values = G == 32 ? _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(from)), _mm256_loadu_ps(from + G), 1)
                                  : _mm512_loadu_ps(from);
    products = _mm512_fmadd_ps(numbers<lane>(codes.part[j]), values, products);
  }
  sums = _mm512_fmadd_ps(products, G == 32 ? two(factors[group], factors[group + 1]) : _mm512_set1_ps(factors[group]), sums);
}

template <Kind kind, int64_t G>
inline void dot(Sums& sums, const Codes& codes, const float* x, const float* factors) {
  dot_lane<kind, G, 0>(sums, codes, x, factors);
  dot_lane<kind, G, 1>(sums, codes, x, factors);
  dot_lane<kind, G, 2>(sums, codes, x, factors);
  dot_lane<kind, G, 3>(sums, codes, x, factors);
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

template <Kind kind, int64_t G>
void expand_codes(const Matrix& m, int64_t at, const Codes& codes, int64_t n, float* out);
template <Kind kind, int64_t G>
void expand_codes(const Matrix& m, int64_t at, const Codes& codes, int64_t n, uint16_t* out);

inline float middle(Kind kind);

// As in loops.inc, with nothing between conversion and use: rows of a few hundred bytes leave no time for three passes over them.
#define FATE_OWN_FACTORS
template <Kind kind, bool exact, int T>
FATE_INLINE void factors(const uint16_t* scales, const uint16_t* zeros, int64_t count, const Token* tokens, int64_t first, Sums* sums,
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

// Codes i .. i + 15 of group g, from a block's parts in memory.
template <Kind kind, int64_t G>
inline __m128i sixteen(const uint8_t* parts, int64_t g, int64_t i) {
  const auto load = [](const uint8_t* from) { return reinterpret_cast<const __m128i*>(from); };
  if constexpr (kind == Kind::kInt8) return _mm_load_si128(load(parts + G * g + i));
  const uint8_t* const from = parts + 64 * (i / (G / 4)) + G / 4 * g + i % (G / 4);
  if constexpr (G == 32) return _mm_unpacklo_epi64(_mm_loadl_epi64(load(from)), _mm_loadl_epi64(load(from + 64)));
  return _mm_load_si128(load(from));
}

template <Kind kind, int64_t G>
inline void expand_codes(const Matrix& m, int64_t at, const Codes& codes, int64_t n, float* out) {
  alignas(64) uint8_t parts[kCols];
  for (int j = 0; j < 4; ++j) _mm512_store_si512(parts + 64 * j, codes.part[j]);
  for (int64_t g = 0; g < n; ++g) {
    float scale, zero;
    halves(m.scale + at + g, 1, &scale);
    halves(m.zero + at + g, 1, &zero);
    for (int64_t i = 0; i < G; i += 16) {
      const __m512i wide = _mm512_cvtepu8_epi32(sixteen<kind, G>(parts, g, i));
      _mm512_storeu_ps(out + G * g + i, value(_mm512_cvtepi32_ps(wide), scale, middle(kind), zero));
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

template <Kind kind>
inline __m512i tables_of(const Matrix& m, int64_t at) {  // of two groups
  return _mm512_inserti64x4(_mm512_castsi256_si512(table_of<kind>(m, at)), table_of<kind>(m, at + 1), 1);
}

// The groups of half a block: tables of 16 values side by side, looked up by code + 16 * group.
template <Kind kind, int64_t G, int half>
inline void expand_half(const Matrix& m, int64_t at, const Codes& codes, uint16_t* out) {
  const auto index_of = [&](int j) { return _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(codes.part[j], half)); };
  if constexpr (G == 32) {
    const __m512i low = tables_of<kind>(m, at), high = tables_of<kind>(m, at + 2);
    const __m512i group = _mm512_set_epi64(0x0030003000300030, 0x0030003000300030, 0x0020002000200020, 0x0020002000200020,
                                           0x0010001000100010, 0x0010001000100010, 0, 0);
    FATE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const __m512i numbers = _mm512_permutex2var_epi16(low, _mm512_or_si512(index_of(j), group), high);
      const auto store = [&](int64_t g, __m128i eight) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out + G * g + 8 * j), eight); };
      store(0, _mm512_castsi512_si128(numbers));
      store(1, _mm512_extracti32x4_epi32(numbers, 1));
      store(2, _mm512_extracti32x4_epi32(numbers, 2));
      store(3, _mm512_extracti32x4_epi32(numbers, 3));
    }
  } else if constexpr (G == 64) {
    const __m512i table = tables_of<kind>(m, at), second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    FATE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const __m512i numbers = _mm512_permutexvar_epi16(_mm512_or_si512(index_of(j), second), table);
      store_bf16(out + 16 * j, _mm512_castsi512_si256(numbers));
      store_bf16(out + 64 + 16 * j, _mm512_extracti64x4_epi64(numbers, 1));
    }
  } else {
    const __m512i table = _mm512_castsi256_si512(table_of<kind>(m, at));
    FATE_UNROLL
    for (int j = 0; j < 4; ++j) _mm512_storeu_si512(out + 32 * j, _mm512_permutexvar_epi16(index_of(j), table));
  }
}

template <Kind kind, int64_t G>
inline void expand_codes(const Matrix& m, int64_t at, const Codes& codes, int64_t n, uint16_t* out) {
  if (kind != Kind::kInt8 && n == kBlock<G>) {
    expand_half<kind, G, 0>(m, at, codes, out);
    expand_half<kind, G, 1>(m, at + kBlock<G> / 2, codes, out + kCols / 2);
    return;
  }
  alignas(64) float values[kCols];
  expand_codes<kind, G>(m, at, codes, n, values);
  for (int64_t i = 0; i < G * n; i += 16) store_bf16(out + i, to_bf16(_mm512_load_ps(values + i)));
}

const Ops kOps = {"avx512-vnni", product, quantize, sum_groups, apply, expand, to_float, from_float, combine};

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
