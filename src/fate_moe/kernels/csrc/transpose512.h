// Each source that includes this compiles its own copy with its own flags.
#pragma once
#include <immintrin.h>

#include "ops.h"

namespace fate {
namespace {

// 16 x 16 numbers of 32 bits, rows for columns.
inline void transpose(__m512i* rows) {
  __m512i a[16], b[16];
  FATE_UNROLL
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  FATE_UNROLL
  for (int i = 0; i < 16; i += 4) {  // lane l of b[i + c]: rows i .. i + 3, column 4l + c
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  FATE_UNROLL
  for (int c = 0; c < 4; ++c) {
    const __m512i even = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), odd = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88), odd2 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_i32x4(even, even2, 0x88);
    rows[4 + c] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    rows[12 + c] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
}

}  // namespace
}  // namespace fate
