// Products with many tokens on AVX2 and AVX-VNNI (part of avx2.cpp, after loops.inc): panels.inc's parts. A register has 8 tokens.
#pragma once
#include "panels.h"

namespace fate {
namespace {

constexpr int64_t kDepth = 4;
#if defined(__AVXVNNI__)
template <Kind kind>
constexpr int64_t kSplit = 1;
#else
template <Kind kind>
constexpr int64_t kSplit = kind == Kind::kInt8 ? 2 : 1;  // so that sums of products fit in 16 bits
#endif

template <Kind kind, int64_t G, class To>
inline void put(const Codes& codes, To to) {
  if constexpr (kSplit<kind> == 1) return store<kind, G>(codes, [&](int64_t column) { return to(column, 0); });
  const __m256i low = _mm256_set1_epi8(15);
  Codes upper, lower;
  FATE_UNROLL
  for (int j = 0; j < 4; ++j) {
    upper.part[j] = _mm256_and_si256(_mm256_srli_epi16(codes.part[j], 4), low);
    lower.part[j] = _mm256_and_si256(codes.part[j], low);
  }
  store<kind, G>(upper, [&](int64_t column) { return to(column, 0); });
  store<kind, G>(lower, [&](int64_t column) { return to(column, 1); });
}

inline void turn(float (*square)[kTile]) {
  __m256 quarter[4][8];
  for (int i = 0; i < 4; ++i) {
    FATE_UNROLL
    for (int r = 0; r < 8; ++r) quarter[i][r] = _mm256_load_ps(square[i / 2 * 8 + r] + i % 2 * 8);
    transpose(quarter[i]);
  }
  for (int i = 0; i < 4; ++i) {
    FATE_UNROLL
    for (int r = 0; r < 8; ++r) _mm256_store_ps(square[i % 2 * 8 + r] + i / 2 * 8, quarter[i][r]);
  }
}

inline __m256i four_codes(const uint8_t* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return _mm256_set1_epi32(four);
}

// 16-bit sums += products. Of the intrinsic GCC makes sums in another order, for which it keeps all products, in memory.
inline void add_in_order(__m256i& sums, __m256i products) { __asm__("vpaddw %2, %1, %0" : "=x"(sums) : "x"(sums), "x"(products)); }

// Adds the products of 32 columns of R rows with 8 U tokens to d.
template <int R, int U>
FATE_INLINE void add_columns(const uint8_t* codes, const int8_t* q, __m256i (*d)[U]) {
#if !defined(__AVXVNNI__)
  __m256i sixteen[R][U];  // at most 8 * 2 * 15 * 127
#endif
  FATE_UNROLL
  for (int64_t step = 0; step < 8; ++step) {
    __m256i numbers[U];
    FATE_UNROLL
    for (int u = 0; u < U; ++u) numbers[u] = load_q(q + step * kTile * kDepth + 32 * u);
    FATE_UNROLL
    for (int i = 0; i < R; ++i) {
      const __m256i four = four_codes(codes + i * kStepBytes + step * kDepth);
      FATE_UNROLL
      for (int u = 0; u < U; ++u) {
#if defined(__AVXVNNI__)
        d[i][u] = _mm256_dpbusd_avx_epi32(d[i][u], four, numbers[u]);
#else
        const __m256i products = _mm256_maddubs_epi16(four, numbers[u]);
        if (step == 0)
          sixteen[i][u] = products;
        else
          add_in_order(sixteen[i][u], products);
#endif
      }
    }
  }
#if !defined(__AVXVNNI__)
  FATE_UNROLL
  for (int i = 0; i < R; ++i) {
    FATE_UNROLL
    for (int u = 0; u < U; ++u) d[i][u] = _mm256_add_epi32(d[i][u], _mm256_madd_epi16(sixteen[i][u], _mm256_set1_epi16(1)));
  }
#endif
}

// The chains of R rows from r on and of 8 U tokens.
template <int64_t G, int64_t split, int R, int U>
inline void multiply_rows(const Panel& panel, const TokenTile& tile, int64_t first, int64_t count, int64_t r, float (*sums)[kTile]) {
  for (int64_t g = 0; g < count; ++g) {
    __m256i d[R][U];
    FATE_UNROLL
    for (int i = 0; i < R; ++i) {
      FATE_UNROLL
      for (int u = 0; u < U; ++u) d[i][u] = _mm256_setzero_si256();
    }
    FATE_UNROLL
    for (int64_t half = 0; half < split; ++half) {
      FATE_UNROLL
      for (int64_t k = 0; k < G; k += 32) {
        const int64_t step = (g * G + k) / kStepBytes, in = G == 32 ? g % 2 * 32 : k % kStepBytes;
        add_columns<R, U>(panel.code[step * split + half][r] + in, tile.q + ((first + g) * G + k) * kTile, d);
      }
      if (half + 1 == split) break;
      FATE_UNROLL
      for (int i = 0; i < R; ++i) {
        FATE_UNROLL
        for (int u = 0; u < U; ++u) d[i][u] = _mm256_slli_epi32(d[i][u], 4);  // those were the upper halves
      }
    }
    FATE_UNROLL
    for (int u = 0; u < U; ++u) {
      const int64_t at = (first + g) * kTile + 8 * u;
      const __m256 sum = _mm256_load_ps(tile.sum + at), of_token = _mm256_load_ps(tile.scale + at);
      FATE_UNROLL
      for (int i = 0; i < R; ++i) {  // as `terms` and `add_chain`
        float* const y = sums[r + i] + 8 * u;
        const __m256 added = _mm256_mul_ps(_mm256_set1_ps(panel.offset[r + i][g]), sum);
        const __m256 w = _mm256_fmadd_ps(_mm256_set1_ps(panel.scale[r + i][g]), _mm256_cvtepi32_ps(d[i][u]), added);
        _mm256_store_ps(y, _mm256_fmadd_ps(of_token, w, _mm256_load_ps(y)));
      }
    }
  }
}

template <int64_t G, int64_t split>
void multiply_tile(const Panel& panel, const TokenTile& tile, int64_t num_tokens, int64_t first, int64_t count, float (*sums)[kTile]) {
  if (num_tokens > 8) {
    for (int64_t r = 0; r < kTile; r += 4) multiply_rows<G, split, 4, 2>(panel, tile, first, count, r, sums);
  } else {
    for (int64_t r = 0; r < kTile; r += 8) multiply_rows<G, split, 8, 1>(panel, tile, first, count, r, sums);
  }
}

void multiply(const Matrix& m, const Panel& panel, const TokenTile* tiles, int64_t num_tokens, int64_t first, int64_t count,
              float (*sums)[kTile][kTile]) {
  with_group(m.group, [&](auto size) {
    for (int64_t t = 0; t < num_tokens; t += kTile) {
      const int64_t u = t / kTile, now = num_tokens - t;
      if (m.kind == Kind::kInt8)
        multiply_tile<size(), kSplit<Kind::kInt8>>(panel, tiles[u], now, first, count, sums[u]);
      else
        multiply_tile<size(), 1>(panel, tiles[u], now, first, count, sums[u]);
    }
  });
}

#include "panels.inc"

void pack(const Token* tokens, int64_t num_tokens, int64_t groups, int64_t group, bool blocked, int8_t* q, float* scale, float* sum) {
  with_group(group, [&](auto size) { pack_values<size()>(tokens, num_tokens, groups, blocked, q, scale, sum); });
}

const Many kMany = {pack, product_of_many<multiply>, [] {}};

}  // namespace
}  // namespace fate
