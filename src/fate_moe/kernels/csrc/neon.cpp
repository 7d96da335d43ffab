// NEON: a register holds the 2-bit plane of a group. Compiled twice: here, and by neon_dot.cpp for processors with SDOT.
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

constexpr int64_t kBlock = 1;
struct Codes {
  uint8x16_t part[4];  // elements 16j .. 16j + 15
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

// Part j takes bytes 2j and 2j + 1 of a 1-bit plane's 8: each eight times, so that each element meets its bit.
template <int j>
inline uint8x16_t with_bits(uint8x16_t part, uint8x16_t plane, uint8_t value) {
  const uint8x16_t spread = vcombine_u8(vdup_n_u8(2 * j), vdup_n_u8(2 * j + 1));
  const uint8x16_t each = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
  return vbslq_u8(vdupq_n_u8(value), vtstq_u8(vqtbl1q_u8(plane, spread), each), part);
}

template <Kind kind, int j>
inline uint8x16_t part_of(uint8x16_t h, uint8x16_t m, uint8x16_t l) {
  uint8x16_t part = vandq_u8(h, vdupq_n_u8(12));  // two bits have come to bits 2 and 3
  if constexpr (kind != Kind::kPlanes1) part = with_bits<j>(part, m, 2);
  if constexpr (kind == Kind::kPlanes3) part = with_bits<j>(part, l, 1);
  return part;
}

inline uint8x16_t load8(const uint8_t* from) { return vcombine_u8(vld1_u8(from), vdup_n_u8(0)); }

template <Kind kind>
inline Codes decode(const Matrix& m, int64_t at) {
  if constexpr (kind == Kind::kInt8) {
    const uint8_t* from = m.planes[0] + at * 64;
    return {{vld1q_u8(from), vld1q_u8(from + 16), vld1q_u8(from + 32), vld1q_u8(from + 48)}};
  }
  const uint8x16_t none = vdupq_n_u8(0), h = vld1q_u8(m.planes[0] + at * 16);
  const uint8x16_t mid = kind == Kind::kPlanes1 ? none : load8(m.planes[1] + at * 8);
  const uint8x16_t low = kind == Kind::kPlanes3 ? load8(m.planes[2] + at * 8) : none;
  return {{part_of<kind, 0>(vshlq_n_u8(h, 2), mid, low), part_of<kind, 1>(h, mid, low), part_of<kind, 2>(vshrq_n_u8(h, 2), mid, low),
           part_of<kind, 3>(vshrq_n_u8(h, 4), mid, low)}};
}

template <Kind kind>
inline Codes decode_some(const Matrix& m, int64_t at, int64_t) {  // blocks of one group are never cut
  return decode<kind>(m, at);
}

// Sums of products of codes up to 15 with a group's int8 numbers.
inline int32x4_t products_of(const uint8x16_t* codes, const int8_t* q) {
#if defined(__ARM_FEATURE_DOTPROD)
  int32x4_t sums = vdupq_n_s32(0);
  FATE_UNROLL
  for (int j = 0; j < 4; ++j) sums = vdotq_s32(sums, vreinterpretq_s8_u8(codes[j]), vld1q_s8(q + 16 * j));
  return sums;
#else
  int16x8_t sums = vdupq_n_s16(0);  // at most 8 * 15 * 127 in 16 bits
  FATE_UNROLL
  for (int j = 0; j < 4; ++j) {
    const int8x16_t code = vreinterpretq_s8_u8(codes[j]), number = vld1q_s8(q + 16 * j);
    sums = vmlal_high_s8(vmlal_s8(sums, vget_low_s8(code), vget_low_s8(number)), code, number);
  }
  return vpaddlq_s16(sums);
#endif
}

template <Kind kind>
inline void dot(Sums& sums, const Codes& codes, const int8_t* q, const float* factors) {
  int32x4_t products;
  if constexpr (kind == Kind::kInt8) {  // codes to 255: their halves
    Codes low, high;
    FATE_UNROLL
    for (int j = 0; j < 4; ++j) {
      low.part[j] = vandq_u8(codes.part[j], vdupq_n_u8(15));
      high.part[j] = vshrq_n_u8(codes.part[j], 4);
    }
    products = vaddq_s32(products_of(low.part, q), vshlq_n_s32(products_of(high.part, q), 4));
  } else {
    products = products_of(codes.part, q);
  }
  sums = vfmaq_n_f32(sums, vcvtq_f32_s32(products), factors[0]);
}

inline void numbers(uint8x16_t codes, float32x4_t* out) {
  const uint16x8_t low = vmovl_u8(vget_low_u8(codes)), high = vmovl_high_u8(codes);
  out[0] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(low)));
  out[1] = vcvtq_f32_u32(vmovl_high_u16(low));
  out[2] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(high)));
  out[3] = vcvtq_f32_u32(vmovl_high_u16(high));
}

template <Kind kind>
inline void dot(Sums& sums, const Codes& codes, const float* x, const float* factors) {
  Lanes lanes;
  FATE_UNROLL
  for (int j = 0; j < 4; ++j) {
    float32x4_t code[4];
    numbers(codes.part[j], code);
    for (int i = 0; i < 4; ++i) lanes.part[i] = vfmaq_f32(lanes.part[i], code[i], vld1q_f32(x + 16 * j + 4 * i));
  }
  sums = vfmaq_n_f32(sums, lanes.sum(), factors[0]);
}

inline void dot_bf16(Sums& sums, const uint16_t* w, const float* x) {
  Lanes lanes;
  FATE_UNROLL
  for (int i = 0; i < 64; i += 8) {
    const uint16x8_t bits = vld1q_u16(w + i);
    float32x4_t* const part = lanes.part + i / 8 % 2 * 2;
    part[0] = vfmaq_f32(part[0], vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)), vld1q_f32(x + i));
    part[1] = vfmaq_f32(part[1], vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16)), vld1q_f32(x + i + 4));
  }
  sums = vaddq_f32(sums, lanes.sum());
}

template <Kind kind>
void expand_codes(const Matrix& m, int64_t at, const Codes& codes, int64_t n, float* out);
template <Kind kind>
void expand_codes(const Matrix& m, int64_t at, const Codes& codes, int64_t n, uint16_t* out);

#include "loops.inc"

template <Kind kind>
inline void expand_codes(const Matrix& m, int64_t at, const Codes& codes, int64_t, float* out) {
  const float scale = half(m.scale[at]);
  const float32x4_t zero = vdupq_n_f32(half(m.zero[at])), mid = vdupq_n_f32(middle(kind));
  for (int j = 0; j < 4; ++j) {
    float32x4_t code[4];
    numbers(codes.part[j], code);
    for (int i = 0; i < 4; ++i) vst1q_f32(out + 16 * j + 4 * i, vsubq_f32(vmulq_n_f32(vaddq_f32(code[i], mid), scale), zero));
  }
}

template <Kind kind>
inline void expand_codes(const Matrix& m, int64_t at, const Codes& codes, int64_t n, uint16_t* out) {
  float values[64];
  expand_codes<kind>(m, at, codes, n, values);
  for (int i = 0; i < 64; ++i) out[i] = round_to_bf16(values[i]);
}

const Ops kOps = {FATE_NEON_NAME, product, quantize, sum_groups, gate, expand, to_float, from_float, combine};

}  // namespace

const Ops* FATE_NEON_OPS() { return FATE_NEON_RUNS ? &kOps : nullptr; }

}  // namespace fate
#else
namespace fate {
const Ops* FATE_NEON_OPS() { return nullptr; }
}  // namespace fate
#endif
