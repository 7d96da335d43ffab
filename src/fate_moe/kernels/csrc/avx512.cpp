// AVX-512 with VNNI, VBMI and GFNI (Ice Lake, Zen 4 and later): a block is 256 columns.
#include "ops.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__GFNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

#include <cstring>

#include "codes512.h"

namespace fate {
namespace {

constexpr const Steps& kOwnSteps = kAvx512Steps;
constexpr bool kPairs = false;

using Sums = __m512;

inline Sums zero() { return _mm512_setzero_ps(); }
inline float total(Sums sums) { return _mm512_reduce_add_ps(sums); }

inline void add_products(Sums& sums, const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) sums = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sums);
}

inline __m512 two(float low, float high) { return _mm512_insertf32x8(_mm512_set1_ps(low), _mm256_set1_ps(high), 1); }

// Lane l of the result, element i: the sum of the four numbers in lane l of p[i].
inline __m512i add_fours(const __m512i* p) {
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(p[0], p[1]), _mm512_unpackhi_epi32(p[0], p[1]));
  const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(p[2], p[3]), _mm512_unpackhi_epi32(p[2], p[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

inline __m512i add_lanes(__m512i x, __m512i y) {  // of neighbours: x0 + x1, x2 + x3, y0 + y1, y2 + y3
  return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
}

// The sums of 16 groups in their order, from what products of blocks (planes) or of groups (int8) leave in lanes.
template <Kind kind, int64_t G>
FATE_INLINE __m512i sixteen_sums(const __m512i* p) {
  if constexpr (kind == Kind::kInt8 && G == 32) {  // a register has two groups
    const __m512i order = _mm512_set_epi32(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
    return _mm512_permutexvar_epi32(order, add_lanes(add_fours(p), add_fours(p + 4)));
  } else if constexpr (kind == Kind::kInt8) {
    return add_lanes(add_lanes(add_fours(p), add_fours(p + 4)), add_lanes(add_fours(p + 8), add_fours(p + 12)));
  } else if constexpr (G == 32) {  // eight groups of two numbers
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_add_epi32(_mm512_permutex2var_epi32(p[0], even, p[1]),
                            _mm512_permutex2var_epi32(p[0], _mm512_or_si512(even, _mm512_set1_epi32(1)), p[1]));
  } else if constexpr (G == 64) {  // four groups, a lane each
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return _mm512_permutexvar_epi32(order, add_fours(p));
  } else {  // two groups, two lanes each
    const __m512i order = _mm512_set_epi32(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
    return _mm512_permutexvar_epi32(order, add_lanes(add_fours(p), add_fours(p + 4)));
  }
}

template <Kind kind>
FATE_INLINE __m512i multiply_codes(const Codes& codes, const int8_t* q) {
  __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes.part[0], _mm512_loadu_si512(q));
  FATE_UNROLL
  for (int j = 1; j < 4; ++j) sums = _mm512_dpbusd_epi32(sums, codes.part[j], _mm512_loadu_si512(q + 64 * j));
  return sums;
}

#define FATE_OWN_TERMS
constexpr int64_t kAtOnce = 16;

// What products with groups at .. at + n leave in lanes, of each token: what sixteen_sums adds.
template <Kind kind, int64_t G, int T, bool whole>
FATE_INLINE void group_products(const Matrix& m, int64_t at, int64_t n, const Token* tokens, int64_t first, __m512i (*p)[16]) {
  if constexpr (kind == Kind::kInt8) {
    constexpr int64_t parts = G == 128 ? 2 : 1, count = G == 32 ? 8 : 16;  // registers of a sum, sums
    FATE_UNROLL
    for (int t = 0; t < T; ++t)
      for (int64_t i = 0; i < count; ++i) {
        p[t][i] = _mm512_setzero_si512();
        FATE_UNROLL
        for (int64_t j = 0; j < parts; ++j) {
          const int64_t byte = 64 * (parts * i + j), rest = n * G - byte;
          if (!whole && rest <= 0) continue;
          const uint8_t* const from = m.planes[0] + at * G + byte;
          const __m512i codes = whole || rest >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((1ull << rest) - 1, from);
          p[t][i] = _mm512_dpbusd_epi32(p[t][i], codes, _mm512_loadu_si512(tokens[t].q + first * G + byte));
        }
      }
  } else {
    FATE_UNROLL
    for (int64_t b = 0; b < 16 / kBlock<G>; ++b) {
      const int64_t group = b * kBlock<G>, rest = n - group;
      if (!whole && rest <= 0) {
        for (int t = 0; t < T; ++t) p[t][b] = _mm512_setzero_si512();
        continue;
      }
      const Codes codes = whole || rest >= kBlock<G> ? decode<kind, G>(m, at + group) : decode_some<kind, G>(m, at + group, rest);
      FATE_UNROLL
      for (int t = 0; t < T; ++t) p[t][b] = multiply_codes<kind>(codes, tokens[t].q + (first + group) * G);
    }
  }
}

template <Kind kind, int64_t G, int T, bool whole>
FATE_INLINE void some_terms(const Matrix& m, int64_t at, int64_t n, const uint16_t* scales, const uint16_t* zeros, float middle,
                            const Token* tokens, int64_t first, float* out) {
  __m512i p[T][16];
  group_products<kind, G, T, whole>(m, at, n, tokens, first, p);
  const auto numbers = [](const uint16_t* from) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); };
  const __m512 scale = numbers(scales), zero = numbers(zeros);
  const __m512 offset = _mm512_sub_ps(_mm512_mul_ps(scale, _mm512_set1_ps(middle)), zero);
  FATE_UNROLL
  for (int t = 0; t < T; ++t) {
    const __m512 added = _mm512_mul_ps(offset, _mm512_loadu_ps(tokens[t].sum + first));
    _mm512_store_ps(out + t * kTermsApart, _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sixteen_sums<kind, G>(p[t])), added));
  }
}

inline void add_chain(const float* w, int64_t stride, int64_t n, const float* a, float* sums) {
  __m512 sum = _mm512_load_ps(sums);
  for (int64_t g = 0; g < n; g += 16) {
    __m512i rows[16];
    FATE_UNROLL16
    for (int r = 0; r < 16; ++r) rows[r] = _mm512_load_si512(w + r * stride + g);
    transpose(rows);
    if (g + 16 <= n) {
      FATE_UNROLL16
      for (int i = 0; i < 16; ++i) sum = _mm512_fmadd_ps(_mm512_set1_ps(a[g + i]), _mm512_castsi512_ps(rows[i]), sum);
    } else {
      alignas(64) float rest[16][16];
      FATE_UNROLL16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(rest[i], rows[i]);
      for (int64_t i = 0; i < n - g; ++i) sum = _mm512_fmadd_ps(_mm512_set1_ps(a[g + i]), _mm512_load_ps(rest[i]), sum);
    }
  }
  _mm512_store_ps(sums, sum);
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

#include "loops.inc"

}  // namespace
}  // namespace fate

#include "panels512.h"

namespace fate {
namespace {

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

const Many kMany = {pack, product_of_many<multiply_dots>, [] {}};
const Ops kOps = {"avx512-vnni", product, quantize, sum_groups, apply, expand, to_float, from_float, combine, &kOwnSteps, &kMany};

}  // namespace

const Many* many_by_tiles() {
  static const Many many = {pack, product_of_many<multiply_tiles>, end_tiles};
  return &many;
}

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
