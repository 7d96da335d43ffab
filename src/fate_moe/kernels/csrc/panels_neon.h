// Products with many tokens on NEON, with SDOT and with SMMLA where the build has them (part of neon.cpp, after loops.inc): panels.inc's
// parts. A register has 4 tokens.
#pragma once
#include "panels.h"

namespace fate {
namespace {

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int64_t kDepth = 8;
#else
constexpr int64_t kDepth = 4;
#endif
#if defined(__ARM_FEATURE_DOTPROD)
constexpr bool kLessMiddle = true;  // 8-bit codes are written out less 128, signed
template <Kind>
constexpr int64_t kSplit = 1;
#else
constexpr bool kLessMiddle = false;
template <Kind kind>
constexpr int64_t kSplit = kind == Kind::kInt8 ? 2 : 1;  // so that sums of products fit in 16 bits
#endif

template <Kind kind, int64_t G, class To>
inline void put(const Codes<G>& codes, To to) {
  const auto write = [&](int64_t j, int64_t half, uint8x16_t part) {
    if constexpr (kind != Kind::kInt8 && G == 32) {
      vst1_u8(to(8 * j, half), vget_low_u8(part));
      vst1_u8(to(32 + 8 * j, half), vget_high_u8(part));
    } else {
      vst1q_u8(to(16 * j, half), part);
    }
  };
  FATE_UNROLL
  for (int64_t j = 0; j < kBlock<G> * G / 16; ++j) {
    const uint8x16_t part = codes.part[j];
    if constexpr (kSplit<kind> == 2) {
      write(j, 0, vshrq_n_u8(part, 4));
      write(j, 1, vandq_u8(part, vdupq_n_u8(15)));
    } else {
      write(j, 0, kind == Kind::kInt8 ? veorq_u8(part, vdupq_n_u8(128)) : part);
    }
  }
}

inline void turn(float (*square)[kTile]) {
  for (int64_t i = 0; i < kTile; i += 4)
    for (int64_t j = 0; j <= i; j += 4) {
      float32x4_t a[4], b[4];
      transpose(square[i] + j, kTile, a);
      transpose(square[j] + i, kTile, b);
      for (int64_t k = 0; k < 4; ++k) {
        vst1q_f32(square[i + k] + j, b[k]);
        vst1q_f32(square[j + k] + i, a[k]);
      }
    }
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
// d[r + i][u], r even, has rows r and r + 1 of tokens 4u + 2i and 4u + 2i + 1, until `finish`.
template <int R, int U>
FATE_INLINE void add_columns(const uint8_t* codes, const int8_t* q, int32x4_t (*d)[U]) {
  FATE_UNROLL
  for (int64_t k = 0; k < 32; k += 16) {
    FATE_UNROLL
    for (int r = 0; r < R; r += 2) {
      const int64x2_t first = vreinterpretq_s64_u8(vld1q_u8(codes + r * kStepBytes + k));
      const int64x2_t second = vreinterpretq_s64_u8(vld1q_u8(codes + (r + 1) * kStepBytes + k));
      const int8x16_t pair[2] = {vreinterpretq_s8_s64(vzip1q_s64(first, second)), vreinterpretq_s8_s64(vzip2q_s64(first, second))};
      FATE_UNROLL
      for (int u = 0; u < U; ++u) {
        FATE_UNROLL
        for (int i = 0; i < 4; ++i)
          d[r + i % 2][u] = vmmlaq_s32(d[r + i % 2][u], pair[i / 2], vld1q_s8(q + (k + i / 2 * 8) * kTile + 32 * u + 16 * (i % 2)));
      }
    }
  }
}

template <int R, int U>
FATE_INLINE void finish(int32x4_t (*d)[U]) {
  FATE_UNROLL
  for (int r = 0; r < R; r += 2) {
    FATE_UNROLL
    for (int u = 0; u < U; ++u) {
      const int64x2_t first = vreinterpretq_s64_s32(d[r][u]), second = vreinterpretq_s64_s32(d[r + 1][u]);
      d[r][u] = vreinterpretq_s32_s64(vzip1q_s64(first, second));
      d[r + 1][u] = vreinterpretq_s32_s64(vzip2q_s64(first, second));
    }
  }
}
#else
template <int R, int U>
FATE_INLINE void finish(int32x4_t (*)[U]) {}

#if defined(__ARM_FEATURE_DOTPROD)
template <int R, int U, int step>
FATE_INLINE void add_four_columns(const int8x16_t* codes, const int8_t* q, int32x4_t (*d)[U]) {
  FATE_UNROLL
  for (int u = 0; u < U; ++u) {
    const int8x16_t numbers = vld1q_s8(q + step * kTile * kDepth + 16 * u);
    FATE_UNROLL
    for (int r = 0; r < R; ++r) d[r][u] = vdotq_laneq_s32(d[r][u], numbers, codes[r], step);
  }
}

// Adds the products of 32 columns of R rows with 4 U tokens to d.
template <int R, int U>
FATE_INLINE void add_columns(const uint8_t* codes, const int8_t* q, int32x4_t (*d)[U]) {
  FATE_UNROLL
  for (int64_t k = 0; k < 32; k += 16) {
    int8x16_t sixteen[R];
    FATE_UNROLL
    for (int r = 0; r < R; ++r) sixteen[r] = vreinterpretq_s8_u8(vld1q_u8(codes + r * kStepBytes + k));
    add_four_columns<R, U, 0>(sixteen, q + k * kTile, d);
    add_four_columns<R, U, 1>(sixteen, q + k * kTile, d);
    add_four_columns<R, U, 2>(sixteen, q + k * kTile, d);
    add_four_columns<R, U, 3>(sixteen, q + k * kTile, d);
  }
}
#else
template <int R, int U>
FATE_INLINE void add_columns(const uint8_t* codes, const int8_t* q, int32x4_t (*d)[U]) {
  int16x8_t low[R][U], high[R][U];  // two tokens each; at most 8 * 15 * 127
  FATE_UNROLL
  for (int64_t step = 0; step < 8; ++step) {
    FATE_UNROLL
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, codes + r * kStepBytes + step * kDepth, 4);
      const int8x16_t code = vreinterpretq_s8_s32(vdupq_n_s32(four));
      FATE_UNROLL
      for (int u = 0; u < U; ++u) {
        const int8x16_t numbers = vld1q_s8(q + step * kTile * kDepth + 16 * u);
        low[r][u] = step ? vmlal_s8(low[r][u], vget_low_s8(numbers), vget_low_s8(code)) : vmull_s8(vget_low_s8(numbers), vget_low_s8(code));
        high[r][u] = step ? vmlal_high_s8(high[r][u], numbers, code) : vmull_high_s8(numbers, code);
      }
    }
  }
  FATE_UNROLL
  for (int r = 0; r < R; ++r) {
    FATE_UNROLL
    for (int u = 0; u < U; ++u) d[r][u] = vaddq_s32(d[r][u], vpaddq_s32(vpaddlq_s16(low[r][u]), vpaddlq_s16(high[r][u])));
  }
}
#endif
#endif

// The chains of R rows from r on and of 4 U tokens.
template <Kind kind, int64_t G, int R, int U>
inline void multiply_rows(const Panel& panel, const TokenTile& tile, int64_t first, int64_t count, int64_t r, float (*sums)[kTile]) {
  constexpr int64_t split = kSplit<kind>;
  for (int64_t g = 0; g < count; ++g) {
    int32x4_t d[R][U];
    FATE_UNROLL
    for (int i = 0; i < R; ++i) {
      FATE_UNROLL
      for (int u = 0; u < U; ++u) d[i][u] = vdupq_n_s32(0);
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
        for (int u = 0; u < U; ++u) d[i][u] = vshlq_n_s32(d[i][u], 4);  // those were the upper halves
      }
    }
    finish<R, U>(d);
    FATE_UNROLL
    for (int u = 0; u < U; ++u) {
      const int64_t at = (first + g) * kTile + 4 * u;
      const float32x4_t sum = vld1q_f32(tile.sum + at), of_token = vld1q_f32(tile.scale + at);
      const int32x4_t middles = vshlq_n_s32(vcvtq_s32_f32(sum), 7);  // 128 * sum
      FATE_UNROLL
      for (int i = 0; i < R; ++i) {  // as `terms` and `add_chain`
        float* const y = sums[r + i] + 4 * u;
        const int32x4_t whole = kLessMiddle && kind == Kind::kInt8 ? vaddq_s32(d[i][u], middles) : d[i][u];
        const float32x4_t w = vfmaq_n_f32(vmulq_n_f32(sum, panel.offset[r + i][g]), vcvtq_f32_s32(whole), panel.scale[r + i][g]);
        vst1q_f32(y, vfmaq_f32(vld1q_f32(y), of_token, w));
      }
    }
  }
}

template <Kind kind, int64_t G>
void multiply_tile(const Panel& panel, const TokenTile& tile, int64_t num_tokens, int64_t first, int64_t count, float (*sums)[kTile]) {
#if defined(__ARM_FEATURE_DOTPROD)
  constexpr int rows = 4;
#else
  constexpr int rows = 2;  // their sums take two registers
#endif
  if (num_tokens > 8) {
    for (int64_t r = 0; r < kTile; r += rows) multiply_rows<kind, G, rows, 4>(panel, tile, first, count, r, sums);
  } else {
    for (int64_t r = 0; r < kTile; r += 2 * rows) multiply_rows<kind, G, 2 * rows, 2>(panel, tile, first, count, r, sums);
  }
}

void multiply(const Matrix& m, const Panel& panel, const TokenTile* tiles, int64_t num_tokens, int64_t first, int64_t count,
              float (*sums)[kTile][kTile]) {
  with_group(m.group, [&](auto size) {
    for (int64_t t = 0; t < num_tokens; t += kTile) {
      const int64_t u = t / kTile, now = num_tokens - t;
      if (m.kind == Kind::kInt8)
        multiply_tile<Kind::kInt8, size()>(panel, tiles[u], now, first, count, sums[u]);
      else
        multiply_tile<Kind::kPlanes3, size()>(panel, tiles[u], now, first, count, sums[u]);
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
