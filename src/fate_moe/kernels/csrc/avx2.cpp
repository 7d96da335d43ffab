// AVX2: a block is 128 columns in four registers; integer products go through 16 bits. Compiled twice: here, and by avx_vnni.cpp for
// processors that add four products of bytes in one instruction and multiply matrices of bits.
#include "ops.h"

#ifndef FATE_AVX2_OPS
#define FATE_AVX2_OPS avx2_ops
#define FATE_AVX2_NAME "avx2"
#define FATE_AVX2_RUNS true
#endif

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#include <cstring>

#include "gfni.h"

namespace fate {
namespace {

constexpr const Steps& kOwnSteps = kAvx2Steps;
#if defined(__AVXVNNI__)
constexpr bool kPairs = false;
#else
constexpr bool kPairs = true;
#endif

template <int64_t G>
constexpr int64_t kBlock = 128 / G;
struct Codes {
  __m256i part[4];  // planes: quarter j of each group; int8: columns 32j .. 32j + 31
};
using Sums = __m256;

inline Sums zero() { return _mm256_setzero_ps(); }

inline float total(Sums sums) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

inline void add_products(Sums& sums, const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) sums = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), sums);
}

inline void halves(const uint16_t* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  for (; i < n; ++i) out[i] = _cvtsh_ss(in[i]);
}

#if defined(__GFNI__)
template <int b3, int b2, int b1, int b0>
inline __m256i pick(__m256i bytes) {
  return _mm256_gf2p8affine_epi64_epi8(bytes, _mm256_set1_epi64x(bits_from(b3, b2, b1, b0)), 0);
}

// As in codes512.h; bytes of the two 1-bit planes lie by turns in `pairs`, those of codes 8k .. 8k + 7 in the lane of these.
template <Kind kind, int64_t G>
FATE_INLINE Codes codes_of(__m256i h, __m128i m, __m128i l) {
  const __m256i upper = _mm256_set1_epi8(12);
  if constexpr (kind == Kind::kPlanes1) return {{pick<1, 0, 8, 8>(h), _mm256_and_si256(h, upper), pick<5, 4, 8, 8>(h), pick<7, 6, 8, 8>(h)}};
  __m256i pairs = kind == Kind::kPlanes2 ? _mm256_cvtepu8_epi16(m) : _mm256_set_m128i(_mm_unpackhi_epi8(m, l), _mm_unpacklo_epi8(m, l));
  if constexpr (G == 128) pairs = _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
  const __m128i order = G == 32 ? _mm_setr_epi8(4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
                                : _mm_setr_epi8(8, 9, 12, 13, 0, 1, 4, 5, 10, 11, 14, 15, 2, 3, 6, 7);
  const __m256i rows = _mm256_shuffle_epi8(pairs, _mm256_broadcastsi128_si256(order));
  const __m256i ml = _mm256_gf2p8affine_epi64_epi8(_mm256_set1_epi64x(int64_t(0x8040201008040201)), rows, 0);
  const __m256i change = _mm256_and_si256(_mm256_xor_si256(h, ml), _mm256_set1_epi8(int8_t(0xcc)));
  const __m256i odd = _mm256_xor_si256(ml, change), even = _mm256_xor_si256(h, change);
  return {{pick<1, 0, 3, 2>(even), _mm256_and_si256(odd, _mm256_set1_epi8(15)), pick<5, 4, 7, 6>(even), pick<7, 6, 5, 4>(odd)}};
}
#else
// Codes 8k .. 8k + 7 of part j have their bits in one byte of a 1-bit plane, which is taken eight times, so that each meets its bit.
template <int64_t G, int j>
inline __m256i with_bits(__m256i part, __m256i plane, char value) {
  const auto byte = [](int64_t k) { return (32 * k / G * (G / 8) + j * (G / 32) + k % (G / 32)) * 0x0101010101010101; };
  const __m256i spread = _mm256_setr_epi64x(byte(0), byte(1), byte(2), byte(3));
  const __m256i each = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(plane, spread), each), each);
  return _mm256_or_si256(part, _mm256_and_si256(set, _mm256_set1_epi8(value)));
}

template <Kind kind, int64_t G, int j>
inline __m256i part_of(__m256i h, __m256i m, __m256i l) {
  __m256i part = _mm256_and_si256(h, _mm256_set1_epi8(12));  // two bits have come to bits 2 and 3
  if constexpr (kind != Kind::kPlanes1) part = with_bits<G, j>(part, m, 2);
  if constexpr (kind == Kind::kPlanes3) part = with_bits<G, j>(part, l, 1);
  return part;
}

template <Kind kind, int64_t G>
FATE_INLINE Codes codes_of(__m256i h, __m128i m, __m128i l) {
  const __m256i m2 = _mm256_broadcastsi128_si256(m), l2 = _mm256_broadcastsi128_si256(l);
  return {{part_of<kind, G, 0>(_mm256_slli_epi32(h, 2), m2, l2), part_of<kind, G, 1>(h, m2, l2),
           part_of<kind, G, 2>(_mm256_srli_epi32(h, 2), m2, l2), part_of<kind, G, 3>(_mm256_srli_epi32(h, 4), m2, l2)}};
}
#endif

inline __m256i load32(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline __m128i load16(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
inline __m128i load8(const uint8_t* from) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)); }

// A block's planes; of groups that are not there zeros.
struct Planes {
  __m256i h;
  __m128i m, l;
};

template <Kind kind, int64_t G>
FATE_INLINE Planes planes_at(const Matrix& m, int64_t at) {
  const __m128i none = _mm_setzero_si128();
  return {load32(m.planes[0] + at * (G / 4)), kind == Kind::kPlanes1 ? none : load16(m.planes[1] + at * (G / 8)),
          kind == Kind::kPlanes3 ? load16(m.planes[2] + at * (G / 8)) : none};
}

template <Kind kind, int64_t G>
inline Planes some_planes(const Matrix& m, int64_t at, int64_t n) {  // one group of 64, up to three of 32
  static_assert(G != 128);
  const __m128i none = _mm_setzero_si128();
  if constexpr (G == 32) {
    alignas(32) uint8_t planes[3][32] = {};
    for (int i = 0; i < int(kind); ++i) std::memcpy(planes[i], m.planes[i] + at * (i ? 4 : 8), size_t(n * (i ? 4 : 8)));
    return {load32(planes[0]), load16(planes[1]), load16(planes[2])};
  }
  return {_mm256_zextsi128_si256(load16(m.planes[0] + at * 16)), kind == Kind::kPlanes1 ? none : load8(m.planes[1] + at * 8),
          kind == Kind::kPlanes3 ? load8(m.planes[2] + at * 8) : none};
}

template <Kind kind, int64_t G>
FATE_INLINE Codes decode(const Matrix& m, int64_t at) {
  if constexpr (kind == Kind::kInt8) {
    const uint8_t* from = m.planes[0] + at * G;
    return {{load32(from), load32(from + 32), load32(from + 64), load32(from + 96)}};
  } else {
    const Planes planes = planes_at<kind, G>(m, at);
    return codes_of<kind, G>(planes.h, planes.m, planes.l);
  }
}

template <Kind kind, int64_t G>
inline Codes decode_some(const Matrix& m, int64_t at, int64_t n) {  // all of a block of 128
  if constexpr (G == 128) {
    return decode<kind, G>(m, at);
  } else if constexpr (kind == Kind::kInt8) {
    const uint8_t* from = m.planes[0] + at * G;
    const auto load = [&](int64_t i) { return 32 * i < n * G ? load32(from + 32 * i) : _mm256_setzero_si256(); };
    return {{load(0), load(1), load(2), load(3)}};
  } else {
    const Planes planes = some_planes<kind, G>(m, at, n);
    return codes_of<kind, G>(planes.h, planes.m, planes.l);
  }
}

inline __m256i add_bytes(__m256i sums, __m256i codes, __m256i q) {  // codes to 255
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sums, codes, q);
#else
  const __m256i low = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(codes)),
                                        _mm256_cvtepi8_epi16(_mm256_castsi256_si128(q)));
  const __m256i high = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(codes, 1)),
                                         _mm256_cvtepi8_epi16(_mm256_extracti128_si256(q, 1)));
  return _mm256_add_epi32(sums, _mm256_add_epi32(low, high));
#endif
}

inline __m256i load_q(const int8_t* q) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)); }

// Lane l of the result, element i: the sum of the four numbers in lane l of p[i].
inline __m256i add_fours(const __m256i* p) {
  const __m256i a = _mm256_add_epi32(_mm256_unpacklo_epi32(p[0], p[1]), _mm256_unpackhi_epi32(p[0], p[1]));
  const __m256i b = _mm256_add_epi32(_mm256_unpacklo_epi32(p[2], p[3]), _mm256_unpackhi_epi32(p[2], p[3]));
  return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}

// The sums of 8 groups in their order, from what products of blocks (planes) or of groups (int8) leave in lanes.
template <Kind kind, int64_t G>
FATE_INLINE __m256i eight_sums(const __m256i* p) {
  if constexpr (kind != Kind::kInt8 && G == 32) {  // four groups of two numbers
    const __m256 x = _mm256_castsi256_ps(p[0]), y = _mm256_castsi256_ps(p[1]);
    const __m256i sums = _mm256_add_epi32(_mm256_castps_si256(_mm256_shuffle_ps(x, y, 0x88)), _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0xdd)));
    return _mm256_permute4x64_epi64(sums, 0xd8);
  } else if constexpr (kind != Kind::kInt8 && G == 64) {  // two groups, a lane each
    return _mm256_permutevar8x32_epi32(add_fours(p), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  } else {
    const __m256i x = add_fours(p), y = add_fours(p + 4);
    return _mm256_add_epi32(_mm256_permute2x128_si256(x, y, 0x20), _mm256_permute2x128_si256(x, y, 0x31));
  }
}

#if defined(__AVXVNNI__)
template <Kind kind, int64_t G, int T>
FATE_INLINE void multiply_block(const Planes& planes, const Token* tokens, int64_t at, __m256i (*sums)[8], int64_t b) {
  const Codes codes = codes_of<kind, G>(planes.h, planes.m, planes.l);
  FATE_UNROLL
  for (int t = 0; t < T; ++t) {
    const int8_t* const q = tokens[t].q + at;
    __m256i sum = _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), codes.part[0], load_q(q));
    FATE_UNROLL
    for (int j = 1; j < 4; ++j) sum = _mm256_dpbusd_avx_epi32(sum, codes.part[j], load_q(q + 32 * j));
    sums[t][b] = sum;
  }
}
#else
inline __m256i masked(__m256i bytes, int mask) { return _mm256_and_si256(bytes, _mm256_set1_epi8(char(mask))); }

// Products of the four 2-bit fields of each byte, sums of two bytes in 16 bits: those of the fields that stand as they are, at most
// 4 * 3 * 127, and four times those of the others.
struct Fields {
  __m256i field[4];
};
template <int low, int high>
inline Fields fields_of(__m256i bytes) {
  const __m256i upper = _mm256_srli_epi16(bytes, 4);
  return {{masked(bytes, low), masked(bytes, high), masked(upper, low), masked(upper, high)}};
}
inline __m256i sums_of(const Fields& fields, const int8_t* q, int i) {
  return _mm256_add_epi16(_mm256_maddubs_epi16(fields.field[i], load_q(q + 32 * i)), _mm256_maddubs_epi16(fields.field[i + 2], load_q(q + 32 * i + 64)));
}

// The planes are multiplied as they lie: D = 4 h . q + (2 m + l) . q, the second product with q in the order of the 1-bit planes. For
// four tokens codes are joined once.
template <Kind kind, int64_t G, int T>
FATE_INLINE void multiply_block(const Planes& planes, const Token* tokens, int64_t at, __m256i (*sums)[8], int64_t b) {
  if constexpr (T > 2 && kind != Kind::kPlanes1) {
    const Codes codes = codes_of<kind, G>(planes.h, planes.m, planes.l);
    FATE_UNROLL
    for (int t = 0; t < T; ++t) {
      const int8_t* const q = tokens[t].q + at;
      __m256i sixteen = _mm256_maddubs_epi16(codes.part[0], load_q(q));  // at most 4 * 2 * 15 * 127 in 16 bits
      FATE_UNROLL
      for (int j = 1; j < 4; ++j) sixteen = _mm256_add_epi16(sixteen, _mm256_maddubs_epi16(codes.part[j], load_q(q + 32 * j)));
      sums[t][b] = _mm256_madd_epi16(sixteen, _mm256_set1_epi16(1));
    }
    return;
  }
  const Fields h = fields_of<3, 12>(planes.h);
  Fields low;
  if constexpr (kind != Kind::kPlanes1) {
    // Of even elements m comes beside l, of odd ones l beside m; then each group's even and odd ones lie together.
    const __m256i even = _mm256_setr_epi32(1, 1, 1, 1, 0, 0, 0, 0), odd = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    __m256i pairs = _mm256_sllv_epi32(_mm256_broadcastsi128_si256(planes.m), even);
    if constexpr (kind == Kind::kPlanes3) {  // else the fields' masks choose
      const __m256i l = _mm256_srlv_epi32(_mm256_broadcastsi128_si256(planes.l), odd);
      pairs = _mm256_xor_si256(l, masked(_mm256_xor_si256(l, pairs), 0xaa));
    }
    if constexpr (G == 64) pairs = _mm256_permute4x64_epi64(pairs, 0xd8);
    if constexpr (G == 32) pairs = _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    low = kind == Kind::kPlanes3 ? fields_of<3, 12>(pairs) : fields_of<2, 8>(pairs);
  }
  FATE_UNROLL
  for (int t = 0; t < T; ++t) {
    const int8_t* const q = tokens[t].q + at;
    __m256i sixteen = _mm256_add_epi16(_mm256_slli_epi16(sums_of(h, q, 0), 2), sums_of(h, q, 1));  // at most 4 * 8 * 3 * 127
    if constexpr (kind != Kind::kPlanes1) {
      const int8_t* const in_pairs = tokens[t].pairs + at;
      sixteen = _mm256_add_epi16(sixteen, _mm256_add_epi16(sums_of(low, in_pairs, 0), _mm256_srai_epi16(sums_of(low, in_pairs, 1), 2)));
    }
    sums[t][b] = _mm256_madd_epi16(sixteen, _mm256_set1_epi16(1));
  }
}
#endif

#define FATE_OWN_TERMS
constexpr int64_t kAtOnce = 8;

// What products with groups at .. at + n leave in lanes, of each token: what eight_sums adds.
template <Kind kind, int64_t G, int T, bool whole>
FATE_INLINE void group_products(const Matrix& m, int64_t at, int64_t n, const Token* tokens, int64_t first, __m256i (*p)[8]) {
  if constexpr (kind == Kind::kInt8) {
    FATE_UNROLL
    for (int t = 0; t < T; ++t) {
      FATE_UNROLL
      for (int64_t i = 0; i < 8; ++i) {
        p[t][i] = _mm256_setzero_si256();
        if (!whole && i >= n) continue;
        const uint8_t* const from = m.planes[0] + (at + i) * G;
        const int8_t* const q = tokens[t].q + (first + i) * G;
        FATE_UNROLL
        for (int64_t j = 0; j < G; j += 32) p[t][i] = add_bytes(p[t][i], load32(from + j), load_q(q + j));
      }
    }
  } else {
    FATE_UNROLL
    for (int64_t b = 0; b < 8 / kBlock<G>; ++b) {
      const int64_t group = b * kBlock<G>, rest = n - group;
      if (!whole && rest <= 0) {
        for (int t = 0; t < T; ++t) p[t][b] = _mm256_setzero_si256();
        continue;
      }
      if constexpr (whole || G == 128) {
        multiply_block<kind, G, T>(planes_at<kind, G>(m, at + group), tokens, (first + group) * G, p, b);
      } else {
        const Planes planes = rest >= kBlock<G> ? planes_at<kind, G>(m, at + group) : some_planes<kind, G>(m, at + group, rest);
        multiply_block<kind, G, T>(planes, tokens, (first + group) * G, p, b);
      }
    }
  }
}

template <Kind kind, int64_t G, int T, bool whole>
FATE_INLINE void some_terms(const Matrix& m, int64_t at, int64_t n, const uint16_t* scales, const uint16_t* zeros, float middle,
                            const Token* tokens, int64_t first, float* out) {
  __m256i p[T][8];
  group_products<kind, G, T, whole>(m, at, n, tokens, first, p);
  const auto numbers = [](const uint16_t* from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); };
  const __m256 scale = numbers(scales), zero = numbers(zeros);
  const __m256 offset = _mm256_sub_ps(_mm256_mul_ps(scale, _mm256_set1_ps(middle)), zero);
  FATE_UNROLL
  for (int t = 0; t < T; ++t) {
    const __m256 added = _mm256_mul_ps(offset, _mm256_loadu_ps(tokens[t].sum + first));
    _mm256_store_ps(out + t * kTermsApart, _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(eight_sums<kind, G>(p[t])), added));
  }
}

// 8 x 8 numbers, rows for columns.
inline void transpose(__m256* rows) {
  __m256 a[8], b[8];
  FATE_UNROLL
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  FATE_UNROLL
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  FATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

inline void add_chain(const float* w, int64_t stride, int64_t n, const float* a, float* sums) {
  for (int64_t row = 0; row < 16; row += 8) {
    __m256 sum = _mm256_load_ps(sums + row);
    for (int64_t g = 0; g < n; g += 8) {
      __m256 rows[8];
      FATE_UNROLL
      for (int r = 0; r < 8; ++r) rows[r] = _mm256_load_ps(w + (row + r) * stride + g);
      transpose(rows);
      FATE_UNROLL
      for (int i = 0; i < 8; ++i)
        if (g + i < n) sum = _mm256_fmadd_ps(_mm256_set1_ps(a[g + i]), rows[i], sum);
    }
    _mm256_store_ps(sums + row, sum);
  }
}

inline __m256 numbers(const uint8_t* codes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
}

// The block's codes, those of column c and what follows at to(c); never across a multiple of 32 columns.
template <Kind kind, int64_t G, class To>
inline void store(const Codes& codes, To to) {
  const auto half = [&](int64_t column) { return reinterpret_cast<__m128i*>(to(column)); };
  FATE_UNROLL
  for (int j = 0; j < 4; ++j) {
    if constexpr (kind == Kind::kInt8 || G == 128) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(to(32 * j)), codes.part[j]);
      continue;
    }
    const __m128i low = _mm256_castsi256_si128(codes.part[j]), high = _mm256_extracti128_si256(codes.part[j], 1);
    if constexpr (G == 64) {
      _mm_store_si128(half(16 * j), low);
      _mm_store_si128(half(64 + 16 * j), high);
    } else {
      _mm_storel_epi64(half(8 * j), low);
      _mm_storel_epi64(half(32 + 8 * j), _mm_unpackhi_epi64(low, low));
      _mm_storel_epi64(half(64 + 8 * j), high);
      _mm_storel_epi64(half(96 + 8 * j), _mm_unpackhi_epi64(high, high));
    }
  }
}

template <Kind kind, int64_t G>
inline void dot(Sums& sums, const Codes& codes, const float* x, const float* factors) {
  alignas(32) uint8_t bytes[128];
  store<kind, G>(codes, [&](int64_t column) { return bytes + column; });
  FATE_UNROLL
  for (int g = 0; g < kBlock<G>; ++g) {
    __m256 products = _mm256_setzero_ps();
    for (int64_t i = G * g; i < G * g + G; i += 8) products = _mm256_fmadd_ps(numbers(bytes + i), _mm256_loadu_ps(x + i), products);
    sums = _mm256_fmadd_ps(products, _mm256_set1_ps(factors[g]), sums);
  }
}

template <Kind kind, int64_t G>
void expand_codes(const Matrix& m, int64_t at, const Codes& codes, int64_t n, float* out);
template <Kind kind, int64_t G>
void expand_codes(const Matrix& m, int64_t at, const Codes& codes, int64_t n, uint16_t* out);

#include "loops.inc"

template <Kind kind, int64_t G>
inline void expand_codes(const Matrix& m, int64_t at, const Codes& codes, int64_t n, float* out) {
  alignas(32) uint8_t bytes[128];
  store<kind, G>(codes, [&](int64_t column) { return bytes + column; });
  for (int64_t g = 0; g < n; ++g) {
    const __m256 scale = _mm256_set1_ps(_cvtsh_ss(m.scale[at + g])), zero = _mm256_set1_ps(_cvtsh_ss(m.zero[at + g]));
    for (int64_t i = G * g; i < G * g + G; i += 8) {
      const __m256 centred = _mm256_add_ps(numbers(bytes + i), _mm256_set1_ps(middle(kind)));
      _mm256_storeu_ps(out + i, _mm256_sub_ps(_mm256_mul_ps(centred, scale), zero));
    }
  }
}

template <Kind kind, int64_t G>
inline void expand_codes(const Matrix& m, int64_t at, const Codes& codes, int64_t n, uint16_t* out) {
  alignas(32) float values[128];
  expand_codes<kind, G>(m, at, codes, n, values);
  for (int64_t i = 0; i < G * n; ++i) out[i] = round_to_bf16(values[i]);
}

}  // namespace
}  // namespace fate

#include "panels256.h"

namespace fate {
namespace {

const Ops kOps = {FATE_AVX2_NAME, product, quantize, sum_groups, apply, expand, to_float, from_float, combine, &kOwnSteps, &kMany};

}  // namespace

const Ops* FATE_AVX2_OPS() {
  __builtin_cpu_init();
  const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return runs && FATE_AVX2_RUNS ? &kOps : nullptr;
}

}  // namespace fate
#else
namespace fate {
const Ops* FATE_AVX2_OPS() { return nullptr; }
}  // namespace fate
#endif
