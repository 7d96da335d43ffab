// NEON: a block is 64 columns, or a group of 128. Compiled three times: here, and by neon_dot.cpp and neon_i8mm.cpp for processors with
// SDOT and with SMMLA.
#include "ops.h"

#ifndef FATE_NEON_OPS
#define FATE_NEON_OPS neon_ops
#define FATE_NEON_NAME "neon"
#define FATE_NEON_RUNS true
#endif

#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstring>

namespace fate {
namespace {

constexpr const Steps& kOwnSteps = kNeonSteps;
constexpr bool kPairs = false;

template <int64_t G>
constexpr int64_t kBlock = G < 64 ? 64 / G : 1;
template <int64_t G>
struct Codes {
  uint8x16_t part[kBlock<G> * G / 16];  // columns 16i .. 16i + 15; planes of two groups of 32: quarter i of each
};
using Sums = float32x4_t;

inline Sums zero() { return vdupq_n_f32(0.0f); }
inline float total(Sums sums) { return vaddvq_f32(sums); }

// Four sums side by side: one alone would wait for itself.
struct Lanes {
  float32x4_t part[4] = {zero(), zero(), zero(), zero()};
  float32x4_t sum() const { return vaddq_f32(vaddq_f32(part[0], part[1]), vaddq_f32(part[2], part[3])); }
};

inline void add_products(Sums& sums, const float* a, const float* b, int64_t n) {
  Lanes lanes;
  for (int64_t i = 0; i < n; i += 16)
    for (int j = 0; j < 4; ++j) lanes.part[j] = vfmaq_f32(lanes.part[j], vld1q_f32(a + i + 4 * j), vld1q_f32(b + i + 4 * j));
  sums = vaddq_f32(sums, lanes.sum());
}

inline float half(uint16_t bits) {
  __fp16 value;
  std::memcpy(&value, &bits, 2);
  return float(value);
}

inline void halves(const uint16_t* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(in + i))));
  for (; i < n; ++i) out[i] = half(in[i]);
}

// Each half of part i has its bits in one byte of a 1-bit plane, which is taken eight times, so that each element meets its bit.
template <int64_t G, int i>
inline uint8x16_t with_bits(uint8x16_t part, uint8x16_t plane, uint8_t value) {
  const uint8x16_t spread = vcombine_u8(vdup_n_u8(G == 32 ? i : 2 * i), vdup_n_u8(G == 32 ? 4 + i : 2 * i + 1));
  const uint8x16_t each = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
  return vbslq_u8(vdupq_n_u8(value), vtstq_u8(vqtbl1q_u8(plane, spread), each), part);
}

// Of the register of h that has the part's upper bits in bits 2j and 2j + 1 of its bytes.
template <Kind kind, int64_t G, int i>
inline uint8x16_t part_of(uint8x16_t h, uint8x16_t m, uint8x16_t l) {
  constexpr int j = G == 128 ? i / 2 : i;
  if constexpr (j == 0) h = vshlq_n_u8(h, 2);
  if constexpr (j > 1) h = vshrq_n_u8(h, 2 * j - 2);
  uint8x16_t part = vandq_u8(h, vdupq_n_u8(12));
  if constexpr (kind != Kind::kPlanes1) part = with_bits<G, i>(part, m, 2);
  if constexpr (kind == Kind::kPlanes3) part = with_bits<G, i>(part, l, 1);
  return part;
}

template <Kind kind, int64_t G>
inline Codes<G> codes_of(uint8x16_t h, uint8x16_t second, uint8x16_t m, uint8x16_t l) {
  if constexpr (G == 128)
    return {{part_of<kind, G, 0>(h, m, l), part_of<kind, G, 1>(second, m, l), part_of<kind, G, 2>(h, m, l),
             part_of<kind, G, 3>(second, m, l), part_of<kind, G, 4>(h, m, l), part_of<kind, G, 5>(second, m, l),
             part_of<kind, G, 6>(h, m, l), part_of<kind, G, 7>(second, m, l)}};
  else
    return {{part_of<kind, G, 0>(h, m, l), part_of<kind, G, 1>(h, m, l), part_of<kind, G, 2>(h, m, l), part_of<kind, G, 3>(h, m, l)}};
}

inline uint8x16_t load8(const uint8_t* from) { return vcombine_u8(vld1_u8(from), vdup_n_u8(0)); }

template <Kind kind, int64_t G>
FATE_INLINE Codes<G> decode(const Matrix& m, int64_t at) {
  if constexpr (kind == Kind::kInt8) {
    Codes<G> codes;
    const uint8_t* from = m.planes[0] + at * G;
    for (int64_t i = 0; i < kBlock<G> * G / 16; ++i) codes.part[i] = vld1q_u8(from + 16 * i);
    return codes;
  }
  const uint8x16_t none = vdupq_n_u8(0), h = vld1q_u8(m.planes[0] + at * (G / 4));
  const auto bits = [&](const uint8_t* plane) { return G == 128 ? vld1q_u8(plane + at * 16) : load8(plane + at * (G / 8)); };
  return codes_of<kind, G>(h, G == 128 ? vld1q_u8(m.planes[0] + at * 32 + 16) : none, kind == Kind::kPlanes1 ? none : bits(m.planes[1]),
                           kind == Kind::kPlanes3 ? bits(m.planes[2]) : none);
}

template <Kind kind, int64_t G>
inline Codes<G> decode_some(const Matrix& m, int64_t at, int64_t) {  // one group of 32; other blocks are never cut
  if constexpr (G != 32) return decode<kind, G>(m, at);
  const uint8x16_t none = vdupq_n_u8(0);
  if constexpr (kind == Kind::kInt8) {
    const uint8_t* from = m.planes[0] + at * G;
    return {{vld1q_u8(from), vld1q_u8(from + 16), none, none}};
  }
  const auto bits = [&](const uint8_t* plane) {
    uint32_t four;
    std::memcpy(&four, plane + at * 4, 4);
    return vreinterpretq_u8_u32(vsetq_lane_u32(four, vdupq_n_u32(0), 0));
  };
  return codes_of<kind, G>(load8(m.planes[0] + at * 8), none, kind == Kind::kPlanes1 ? none : bits(m.planes[1]),
                           kind == Kind::kPlanes3 ? bits(m.planes[2]) : none);
}

// Sums of products of codes up to 15 with `count` times 16 int8 numbers.
template <int count>
inline int32x4_t products_of(const uint8x16_t* codes, const int8_t* q) {
#if defined(__ARM_FEATURE_DOTPROD)
  int32x4_t sums = vdupq_n_s32(0);
  FATE_UNROLL
  for (int i = 0; i < count; ++i) sums = vdotq_s32(sums, vreinterpretq_s8_u8(codes[i]), vld1q_s8(q + 16 * i));
  return sums;
#else
  int16x8_t sums = vdupq_n_s16(0);  // at most 16 * 15 * 127 in 16 bits
  FATE_UNROLL
  for (int i = 0; i < count; ++i) {
    const int8x16_t code = vreinterpretq_s8_u8(codes[i]), number = vld1q_s8(q + 16 * i);
    sums = vmlal_high_s8(vmlal_s8(sums, vget_low_s8(code), vget_low_s8(number)), code, number);
  }
  return vpaddlq_s16(sums);
#endif
}

// The same of two groups of 32, whose quarters lie side by side: sums of the first in the first two lanes, of the second in the others.
inline int32x4_t products_apart(const uint8x16_t* codes, const int8_t* q) {
#if defined(__ARM_FEATURE_DOTPROD)
  return products_of<4>(codes, q);
#else
  int16x8_t first = vdupq_n_s16(0), second = vdupq_n_s16(0);
  FATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int8x16_t code = vreinterpretq_s8_u8(codes[i]), number = vld1q_s8(q + 16 * i);
    first = vmlal_s8(first, vget_low_s8(code), vget_low_s8(number));
    second = vmlal_high_s8(second, code, number);
  }
  return vpaddq_s32(vpaddlq_s16(first), vpaddlq_s16(second));
#endif
}

template <int count>
inline int32x4_t products_of_bytes(const uint8x16_t* codes, const int8_t* q) {  // codes to 255: their halves
  uint8x16_t low[count], high[count];
  FATE_UNROLL
  for (int i = 0; i < count; ++i) {
    low[i] = vandq_u8(codes[i], vdupq_n_u8(15));
    high[i] = vshrq_n_u8(codes[i], 4);
  }
  return vaddq_s32(products_of<count>(low, q), vshlq_n_s32(products_of<count>(high, q), 4));
}

template <Kind kind, int64_t G, int T>
FATE_INLINE void group_sums(const Matrix& m, int64_t at, int64_t n, const Token* tokens, int64_t first, int32_t (*out)[64]) {
  for (int64_t g = 0; g < n; g += kBlock<G>) {
    const bool whole = g + kBlock<G> <= n;
    const Codes<G> codes = whole ? decode<kind, G>(m, at + g) : decode_some<kind, G>(m, at + g, n - g);
    FATE_UNROLL
    for (int t = 0; t < T; ++t) {
      const int8_t* const q = tokens[t].q + (first + g) * G;
      int32_t* const to = out[t] + g;
      if constexpr (kind == Kind::kInt8) {
        for (int64_t i = 0; i < kBlock<G>; ++i) to[i] = vaddvq_s32(products_of_bytes<G / 16>(codes.part + i * G / 16, q + i * G));
      } else if constexpr (G == 32) {
        const int32x4_t sums = products_apart(codes.part, q);
        vst1_s32(to, vpadd_s32(vget_low_s32(sums), vget_high_s32(sums)));
      } else {
        to[0] = vaddvq_s32(products_of<G / 16>(codes.part, q));
      }
    }
  }
}

// 4 x 4 numbers, rows for columns.
inline void transpose(const float* from, int64_t stride, float32x4_t* columns) {
  const float32x4x2_t first = vtrnq_f32(vld1q_f32(from), vld1q_f32(from + stride));
  const float32x4x2_t second = vtrnq_f32(vld1q_f32(from + 2 * stride), vld1q_f32(from + 3 * stride));
  columns[0] = vcombine_f32(vget_low_f32(first.val[0]), vget_low_f32(second.val[0]));
  columns[1] = vcombine_f32(vget_low_f32(first.val[1]), vget_low_f32(second.val[1]));
  columns[2] = vcombine_f32(vget_high_f32(first.val[0]), vget_high_f32(second.val[0]));
  columns[3] = vcombine_f32(vget_high_f32(first.val[1]), vget_high_f32(second.val[1]));
}

inline void add_chain(const float* w, int64_t stride, int64_t n, const float* a, float* sums) {
  for (int64_t row = 0; row < 16; row += 4) {
    float32x4_t sum = vld1q_f32(sums + row);
    for (int64_t g = 0; g < n; g += 4) {
      float32x4_t columns[4];
      transpose(w + row * stride + g, stride, columns);
      for (int64_t i = 0; i < 4 && g + i < n; ++i) sum = vfmaq_n_f32(sum, columns[i], a[g + i]);
    }
    vst1q_f32(sums + row, sum);
  }
}

inline void numbers(uint8x16_t codes, float32x4_t* out) {
  const uint16x8_t low = vmovl_u8(vget_low_u8(codes)), high = vmovl_high_u8(codes);
  out[0] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(low)));
  out[1] = vcvtq_f32_u32(vmovl_high_u16(low));
  out[2] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(high)));
  out[3] = vcvtq_f32_u32(vmovl_high_u16(high));
}

// The column, in its block, of number 4i of part j.
template <Kind kind, int64_t G>
constexpr int64_t column_of(int64_t j, int64_t i) {
  return kind != Kind::kInt8 && G == 32 ? 32 * (i / 2) + 8 * j + 4 * (i % 2) : 16 * j + 4 * i;
}

template <Kind kind, int64_t G>
inline void dot(Sums& sums, const Codes<G>& codes, const float* x, const float* factors) {
  Lanes lanes[kBlock<G>];
  FATE_UNROLL
  for (int64_t j = 0; j < kBlock<G> * G / 16; ++j) {
    float32x4_t code[4];
    numbers(codes.part[j], code);
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t column = column_of<kind, G>(j, i);
      float32x4_t& lane = lanes[column / G].part[i];
      lane = vfmaq_f32(lane, code[i], vld1q_f32(x + column));
    }
  }
  for (int64_t g = 0; g < kBlock<G>; ++g) sums = vfmaq_n_f32(sums, lanes[g].sum(), factors[g]);
}

template <Kind kind, int64_t G>
void expand_codes(const Matrix& m, int64_t at, const Codes<G>& codes, int64_t n, float* out);
template <Kind kind, int64_t G>
void expand_codes(const Matrix& m, int64_t at, const Codes<G>& codes, int64_t n, uint16_t* out);

#include "loops.inc"

template <Kind kind, int64_t G>
inline void expand_codes(const Matrix& m, int64_t at, const Codes<G>& codes, int64_t n, float* out) {
  float scale[kBlock<G>], zero[kBlock<G>];
  halves(m.scale + at, n, scale);
  halves(m.zero + at, n, zero);
  for (int64_t j = 0; j < kBlock<G> * G / 16; ++j) {
    float32x4_t code[4];
    numbers(codes.part[j], code);
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t column = column_of<kind, G>(j, i), g = column / G;
      if (g >= n) continue;
      const float32x4_t centred = vaddq_f32(code[i], vdupq_n_f32(middle(kind)));
      vst1q_f32(out + column, vsubq_f32(vmulq_n_f32(centred, scale[g]), vdupq_n_f32(zero[g])));
    }
  }
}

template <Kind kind, int64_t G>
inline void expand_codes(const Matrix& m, int64_t at, const Codes<G>& codes, int64_t n, uint16_t* out) {
  float values[kBlock<G> * G];
  expand_codes<kind, G>(m, at, codes, n, values);
  for (int64_t i = 0; i < n * G; ++i) out[i] = round_to_bf16(values[i]);
}

}  // namespace
}  // namespace fate

#include "panels_neon.h"

namespace fate {
namespace {

const Ops kOps = {FATE_NEON_NAME, product, quantize, sum_groups, apply, expand, to_float, from_float, combine, &kOwnSteps, &kMany};

}  // namespace

const Ops* FATE_NEON_OPS() { return FATE_NEON_RUNS ? &kOps : nullptr; }

}  // namespace fate
#else
namespace fate {
const Ops* FATE_NEON_OPS() { return nullptr; }
}  // namespace fate
#endif
