// Blocks of 256 columns as AVX-512 with VBMI and GFNI reads them; each source that includes this compiles its own copy with its own flags.
#pragma once
#include <immintrin.h>

#include "gfni.h"
#include "panels.h"
#include "transpose512.h"

namespace fate {
namespace {

constexpr int64_t kCols = 256;
template <int64_t G>
constexpr int64_t kBlock = kCols / G;
struct Codes {
  __m512i part[4];  // planes: quarter j of each group; int8: columns 64j .. 64j + 63
};

inline void halves(const uint16_t* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
  if (i < n) {
    const __mmask16 mask = __mmask16((1u << (n - i)) - 1);
    _mm512_mask_storeu_ps(out + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, in + i)));
  }
}

template <int b3, int b2, int b1, int b0>
inline __m512i pick(__m512i bytes) {
  return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(bits_from(b3, b2, b1, b0)), 0);
}

// Bytes of the 1-bit planes m (0 to 31) and l (32 to 63) of 256 columns as 8x8 matrices, one for every 8 codes of a part: rows are, from
// the top, the bytes in which the codes of parts 2, 3, 0, 1 have their m and l.
struct alignas(64) Rows512 {
  uint8_t row[64];
};
template <int64_t G>
constexpr Rows512 rows512() {
  Rows512 rows = {};
  for (int64_t k = 0; k < 8; ++k) {  // codes 8k .. 8k + 7 of each part: of group 8k / (G / 4)
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t part = i ^ 2, byte = 32 * k / G * (G / 8) + part * (G / 32) + k % (G / 32);
      rows.row[8 * k + 2 * i] = uint8_t(byte), rows.row[8 * k + 2 * i + 1] = uint8_t(32 + byte);
    }
  }
  return rows;
}
template <int64_t G>
constexpr Rows512 kRows = rows512<G>();

// Byte b of a group's h has the upper bits of elements b, G/4 + b, G/2 + b, 3G/4 + b in bits 0-1, 2-3, 4-5, 6-7. Multiplied by a unit
// vector a byte, the matrices above are transposed: `ml` has the lower bits of the same elements in bits 2-3, 0-1, 6-7, 4-5. So two
// selections bring together each element's four bits, and one instruction puts them in their places.
template <Kind kind, int64_t G>
FATE_INLINE Codes codes_of(__m512i h, __m256i m, __m256i l) {
  if constexpr (kind == Kind::kPlanes1)
    return {{pick<1, 0, 8, 8>(h), _mm512_and_si512(h, _mm512_set1_epi8(12)), pick<5, 4, 8, 8>(h), pick<7, 6, 8, 8>(h)}};
  const __m512i order = _mm512_load_si512(kRows<G>.row), units = _mm512_set1_epi64(int64_t(0x8040201008040201));
  const __m512i rows = kind == Kind::kPlanes2
                           ? _mm512_maskz_permutexvar_epi8(0x5555555555555555, order, _mm512_castsi256_si512(m))
                           : _mm512_permutexvar_epi8(order, _mm512_inserti64x4(_mm512_castsi256_si512(m), l, 1));
  const __m512i ml = _mm512_gf2p8affine_epi64_epi8(units, rows, 0);
  constexpr int choose = 0xca;  // the first argument's bits choose between the others'
  const __m512i upper = _mm512_set1_epi8(int8_t(0xcc));
  const __m512i odd = _mm512_ternarylogic_epi64(upper, h, ml, choose), even = _mm512_ternarylogic_epi64(upper, ml, h, choose);
  return {{pick<1, 0, 3, 2>(even), _mm512_and_si512(odd, _mm512_set1_epi8(15)), pick<5, 4, 7, 6>(even), pick<7, 6, 5, 4>(odd)}};
}

inline __m256i load32(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

template <Kind kind, int64_t G>
FATE_INLINE Codes decode(const Matrix& m, int64_t at) {
  if constexpr (kind == Kind::kInt8) {
    const uint8_t* from = m.planes[0] + at * G;
    return {{_mm512_loadu_si512(from), _mm512_loadu_si512(from + 64), _mm512_loadu_si512(from + 128), _mm512_loadu_si512(from + 192)}};
  }
  const __m256i none = _mm256_setzero_si256();
  return codes_of<kind, G>(_mm512_loadu_si512(m.planes[0] + at * (G / 4)),
                           kind == Kind::kPlanes1 ? none : load32(m.planes[1] + at * (G / 8)),
                           kind == Kind::kPlanes3 ? load32(m.planes[2] + at * (G / 8)) : none);
}

template <Kind kind, int64_t G>
inline Codes decode_some(const Matrix& m, int64_t at, int64_t n) {
  if constexpr (kind == Kind::kInt8) {
    const uint8_t* from = m.planes[0] + at * G;
    const auto load = [&](int64_t i) {  // what of bytes 64i .. 64i + 63 belongs to the n groups
      const int64_t bytes = n * G - 64 * i;
      if (bytes <= 0) return _mm512_setzero_si512();
      return _mm512_maskz_loadu_epi8(bytes >= 64 ? ~0ull : (1ull << bytes) - 1, from + 64 * i);
    };
    return {{load(0), load(1), load(2), load(3)}};
  }
  const __mmask16 two = __mmask16((1u << n * (G / 16)) - 1);  // bytes come in fours
  const __mmask8 one = __mmask8((1u << n * (G / 32)) - 1);
  const __m256i none = _mm256_setzero_si256();
  return codes_of<kind, G>(_mm512_maskz_loadu_epi32(two, m.planes[0] + at * (G / 4)),
                           kind == Kind::kPlanes1 ? none : _mm256_maskz_loadu_epi32(one, m.planes[1] + at * (G / 8)),
                           kind == Kind::kPlanes3 ? _mm256_maskz_loadu_epi32(one, m.planes[2] + at * (G / 8)) : none);
}

// y of 16 rows (registers) and 16 tokens, after one more group with sums D: as `terms` and `add_chain` of loops.inc.
inline __m512 add_group(__m512 y, __m512i sums, const float* scale, const float* offset, __m512 sum, __m512 of_token) {
  const __m512 w = _mm512_fmadd_ps(_mm512_set1_ps(*scale), _mm512_cvtepi32_ps(sums), _mm512_mul_ps(_mm512_set1_ps(*offset), sum));
  return _mm512_fmadd_ps(of_token, w, y);
}

}  // namespace
}  // namespace fate
