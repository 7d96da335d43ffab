// Products with many tokens on AVX-512 (part of avx512.cpp, after loops.inc). Weights of 16 rows are written out as bytes, a few thousand
// columns at a time, and meet 16 tokens at once, by dot products or by matrix tiles (amx.cpp). An integer sum has its place by row and
// token from the start, so that nothing has to be added across lanes.
#pragma once
#include "codes512.h"

namespace fate {
namespace {

constexpr int64_t kDepth = 4;
template <Kind>
constexpr int64_t kSplit = 1;

// A block of 256 columns in natural order: 64 to a register.
template <Kind kind, int64_t G>
inline Codes in_order(const Codes& codes) {
  const __m512i* const part = codes.part;
  if constexpr (kind == Kind::kInt8) return codes;
  if constexpr (G == 128)  // two lanes have 32 columns of one group
    return {{_mm512_shuffle_i32x4(part[0], part[1], 0x44), _mm512_shuffle_i32x4(part[2], part[3], 0x44),
             _mm512_shuffle_i32x4(part[0], part[1], 0xee), _mm512_shuffle_i32x4(part[2], part[3], 0xee)}};
  __m512i a = part[0], b = part[1], c = part[2], d = part[3];
  if constexpr (G == 32) {  // a lane has 8 columns of two groups
    a = _mm512_unpacklo_epi64(part[0], part[1]), b = _mm512_unpacklo_epi64(part[2], part[3]);
    c = _mm512_unpackhi_epi64(part[0], part[1]), d = _mm512_unpackhi_epi64(part[2], part[3]);
  }
  const __m512i ab = _mm512_shuffle_i32x4(a, b, 0x44), cd = _mm512_shuffle_i32x4(c, d, 0x44);
  const __m512i ab2 = _mm512_shuffle_i32x4(a, b, 0xee), cd2 = _mm512_shuffle_i32x4(c, d, 0xee);
  return {{_mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xdd), _mm512_shuffle_i32x4(ab2, cd2, 0x88),
           _mm512_shuffle_i32x4(ab2, cd2, 0xdd)}};
}

template <Kind kind, int64_t G, class To>
inline void put(const Codes& codes, To to) {
  const Codes ordered = in_order<kind, G>(codes);
  FATE_UNROLL
  for (int i = 0; i < 4; ++i) _mm512_store_si512(to(64 * i, 0), ordered.part[i]);
}

inline void turn(float (*square)[kTile]) {
  __m512i rows[kTile];
  FATE_UNROLL16
  for (int r = 0; r < kTile; ++r) rows[r] = _mm512_load_si512(square[r]);
  transpose(rows);
  FATE_UNROLL16
  for (int r = 0; r < kTile; ++r) _mm512_store_si512(square[r], rows[r]);
}

// The chains of rows r .. r + 3 and two tiles of tokens for `count` groups of a panel, from group `first` of the tokens on.
template <int64_t G, int U>
inline void multiply_dots(const Panel& panel, const TokenTile* tiles, int64_t first, int64_t count, int64_t r, float (*sums)[kTile][kTile]) {
  __m512 y[4][U];
  FATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    FATE_UNROLL
    for (int u = 0; u < U; ++u) y[i][u] = _mm512_load_ps(sums[u][r + i]);
  }
  for (int64_t g = 0; g < count; ++g) {
    __m512i d[4][U];
    FATE_UNROLL
    for (int i = 0; i < 4; ++i) {
      FATE_UNROLL
      for (int u = 0; u < U; ++u) d[i][u] = _mm512_setzero_si512();
    }
    const uint8_t* const codes = panel.code[g * G / kStepBytes][r] + g * G % kStepBytes;
    for (int64_t k = 0; k < G; k += 4) {
      __m512i q[U];
      FATE_UNROLL
      for (int u = 0; u < U; ++u) q[u] = _mm512_load_si512(tiles[u].q + ((first + g) * G + k) * kTile);
      FATE_UNROLL
      for (int i = 0; i < 4; ++i) {
        int32_t four;
        std::memcpy(&four, codes + k / kStepBytes * (kTile * kStepBytes) + i * kStepBytes + k % kStepBytes, 4);
        const __m512i code = _mm512_set1_epi32(four);
        FATE_UNROLL
        for (int u = 0; u < U; ++u) d[i][u] = _mm512_dpbusd_epi32(d[i][u], code, q[u]);
      }
    }
    FATE_UNROLL
    for (int u = 0; u < U; ++u) {
      const __m512 sum = _mm512_load_ps(tiles[u].sum + (first + g) * kTile), of_token = _mm512_load_ps(tiles[u].scale + (first + g) * kTile);
      FATE_UNROLL
      for (int i = 0; i < 4; ++i) y[i][u] = add_group(y[i][u], d[i][u], &panel.scale[r + i][g], &panel.offset[r + i][g], sum, of_token);
    }
  }
  FATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    FATE_UNROLL
    for (int u = 0; u < U; ++u) _mm512_store_ps(sums[u][r + i], y[i][u]);
  }
}

void multiply_dots(const Matrix& m, const Panel& panel, const TokenTile* tiles, int64_t num_tokens, int64_t first, int64_t count,
                   float (*sums)[kTile][kTile]) {
  const int64_t num_tiles = (num_tokens + kTile - 1) / kTile;
  with_group(m.group, [&](auto size) {
    for (int64_t u = 0; u < num_tiles; u += 2)
      for (int64_t r = 0; r < kTile; r += 4) {
        if (u + 2 <= num_tiles)
          multiply_dots<size(), 2>(panel, tiles + u, first, count, r, sums + u);
        else
          multiply_dots<size(), 1>(panel, tiles + u, first, count, r, sums + u);
      }
  });
}

#include "panels.inc"

// As panels.inc packs, by transposition.
template <int64_t G>
void pack_transposed(const Token* tokens, int64_t num_tokens, int64_t groups, bool blocked, int8_t* q, float* scale, float* sum) {
  const int64_t padded = (groups + 15) / 16 * 16, steps = padded * G / kStepBytes;
  alignas(64) int8_t bytes[kStepBytes];
  for (int64_t s = 0; s < steps; ++s, q += kStepBytes * kTile) {
    __m512i rows[kTile];
    for (int64_t t = 0; t < kTile; ++t) {
      if (t >= num_tokens) {
        rows[t] = _mm512_setzero_si512();
        continue;
      }
      if (!blocked) {
        rows[t] = _mm512_loadu_si512(tokens[t].q + s * kStepBytes);
        continue;
      }
      for (int64_t at = 0; at < kStepBytes; at += G / 4) {
        const int64_t column = s * kStepBytes + at;
        std::memcpy(bytes + at, tokens[t].q + place_of<G>(column / G, column % G / (G / 4), true), G / 4);
      }
      rows[t] = _mm512_load_si512(bytes);
    }
    transpose(rows);
    for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(q + kStepBytes * i, rows[i]);
  }
  pack_factors(tokens, num_tokens, padded, scale, sum);
}

void pack(const Token* tokens, int64_t num_tokens, int64_t groups, int64_t group, bool blocked, int8_t* q, float* scale, float* sum) {
  with_group(group, [&](auto size) { pack_transposed<size()>(tokens, num_tokens, groups, blocked, q, scale, sum); });
}

}  // namespace
}  // namespace fate
