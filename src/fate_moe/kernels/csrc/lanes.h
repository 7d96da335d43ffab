// Sixteen numbers side by side in the registers of the instruction set that the including source is compiled for. `at_once(R)`: how
// many of them R rows keep in registers beside what they are multiplied with.
#pragma once
#include <cstdint>
#include <cstring>

#include "ops.h"

#if defined(FATE_PLAIN_LANES)
#elif defined(__AVX512F__)
#include "transpose512.h"
#elif defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fate {
namespace {

#if defined(__AVX512F__) && !defined(FATE_PLAIN_LANES)

struct Lanes {
  __m512 v;
};
constexpr int at_once(int) { return 4; }  // of 6 rows: 24 of 32 registers
inline Lanes all(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline void store(float* to, Lanes a) { _mm512_storeu_ps(to, a.v); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }  // a > b ? a : b
inline Lanes load_bf16(const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

inline Lanes load_codes(const int8_t* from) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))))};
}

// The tree of tree_sum: lane i + lane i + 8, then + 4, + 2, + 1.
inline float total(Lanes a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// Totals of sums[r][t], four rows' and four tokens', at out[4 * r + t].
constexpr bool kTotalsAtOnce = true;
FATE_INLINE void totals(const Lanes (*sums)[4], float* out) {
  __m512 a[8], b[4], c[2];
  FATE_UNROLL
  for (int i = 0; i < 8; ++i) {  // token i / 2, rows 2 * (i % 2) and the next
    const __m512 x = sums[2 * (i % 2)][i / 2].v, y = sums[2 * (i % 2) + 1][i / 2].v;
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
  }
  FATE_UNROLL
  for (int i = 0; i < 4; ++i)  // a token; lane r is row r's
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88), _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));
  FATE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
    c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xdd)));
}

// Channels [0, 32) of up to 16 keys: channel c of key i to out[c * step + i].
constexpr int64_t kTurned = 32;
inline void turn_keys(const uint16_t* keys, int64_t stride, int64_t count, float* out, int64_t step) {
  __m512i rows[16];
  FATE_UNROLL16
  for (int64_t i = 0; i < 16; ++i) rows[i] = i < count ? _mm512_loadu_si512(keys + i * stride) : _mm512_setzero_si512();
  transpose(rows);
  FATE_UNROLL16
  for (int64_t i = 0; i < 16; ++i) {
    _mm512_storeu_si512(out + 2 * i * step, _mm512_slli_epi32(rows[i], 16));
    _mm512_storeu_si512(out + (2 * i + 1) * step, _mm512_and_si512(rows[i], _mm512_set1_epi32(int(0xffff0000))));
  }
}

// Channels [0, kTurnedCodes) of up to 16 keys, likewise.
constexpr int64_t kTurnedCodes = 64;
inline void turn_codes(const int8_t* keys, int64_t stride, int64_t count, float* out, int64_t step) {
  __m512i rows[16];
  FATE_UNROLL16
  for (int64_t i = 0; i < 16; ++i) rows[i] = i < count ? _mm512_loadu_si512(keys + i * stride) : _mm512_setzero_si512();
  transpose(rows);
  FATE_UNROLL16
  for (int64_t i = 0; i < 16; ++i) {
    const auto put = [&](int64_t k, __m512i high) { _mm512_storeu_ps(out + (4 * i + k) * step, _mm512_cvtepi32_ps(_mm512_srai_epi32(high, 24))); };
    put(0, _mm512_slli_epi32(rows[i], 24)), put(1, _mm512_slli_epi32(rows[i], 16)), put(2, _mm512_slli_epi32(rows[i], 8)), put(3, rows[i]);
  }
}

#elif defined(__AVX2__) && !defined(FATE_PLAIN_LANES)

struct Lanes {
  __m256 low, high;
};
constexpr int at_once(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }  // of 6 rows: 12 of 16 registers
inline Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store(float* to, Lanes a) { _mm256_storeu_ps(to, a.low), _mm256_storeu_ps(to + 8, a.high); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Lanes larger(Lanes a, Lanes b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Lanes load_bf16(const uint16_t* from) {
  const auto half = [](const uint16_t* eight) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(eight)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  };
  return {half(from), half(from + 8)};
}
inline Lanes load_codes(const int8_t* from) {
  const auto half = [](const int8_t* eight) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(eight))));
  };
  return {half(from), half(from + 8)};
}

inline float total(Lanes a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
constexpr bool kTotalsAtOnce = false;
inline void totals(const Lanes (*)[4], float*) {}

// `act(i, of)` with the i-th 32 bits of eight keys, of which `count` are there, for i < 8.
template <class Number, class Act>
FATE_INLINE void turn_eight(const Number* keys, int64_t stride, int64_t count, Act act) {
  __m256i a[8], b[8];
  const auto row = [&](int64_t i) {
    return i < count ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i * stride)) : _mm256_setzero_si256();
  };
  FATE_UNROLL
  for (int64_t i = 0; i < 8; i += 2) {
    const __m256i even = row(i), odd = row(i + 1);
    a[i] = _mm256_unpacklo_epi32(even, odd), a[i + 1] = _mm256_unpackhi_epi32(even, odd);
  }
  FATE_UNROLL
  for (int64_t i = 0; i < 8; i += 4) {  // lane l of b[i + c]: keys i .. i + 3, their 4l + c-th
    b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]), b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]), b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  FATE_UNROLL
  for (int64_t i = 0; i < 8; ++i) {
    const __m256i low = _mm256_permute2x128_si256(b[i % 4], b[4 + i % 4], 0x20), high = _mm256_permute2x128_si256(b[i % 4], b[4 + i % 4], 0x31);
    act(i, i < 4 ? low : high);
  }
}

constexpr int64_t kTurned = 16;
inline void turn_keys(const uint16_t* keys, int64_t stride, int64_t count, float* out, int64_t step) {
  for (int64_t first = 0; first < 16; first += 8, out += 8)
    turn_eight(keys + first * stride, stride, count - first, [&](int64_t i, __m256i turned) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 2 * i * step), _mm256_slli_epi32(turned, 16));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (2 * i + 1) * step), _mm256_and_si256(turned, _mm256_set1_epi32(int(0xffff0000))));
    });
}

constexpr int64_t kTurnedCodes = 32;
inline void turn_codes(const int8_t* keys, int64_t stride, int64_t count, float* out, int64_t step) {
  for (int64_t first = 0; first < 16; first += 8, out += 8)
    turn_eight(keys + first * stride, stride, count - first, [&](int64_t i, __m256i turned) {
      const auto put = [&](int64_t k, __m256i high) { _mm256_storeu_ps(out + (4 * i + k) * step, _mm256_cvtepi32_ps(_mm256_srai_epi32(high, 24))); };
      put(0, _mm256_slli_epi32(turned, 24)), put(1, _mm256_slli_epi32(turned, 16)), put(2, _mm256_slli_epi32(turned, 8)), put(3, turned);
    });
}

#elif defined(__aarch64__) && !defined(FATE_PLAIN_LANES)

struct Lanes {
  float32x4_t v[4];
};
template <class Make>
FATE_INLINE Lanes each(Make make) {
  return {{make(0), make(1), make(2), make(3)}};
}
constexpr int at_once(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }  // of 6 rows: 24 of 32 registers
inline Lanes all(float x) { return each([&](int) { return vdupq_n_f32(x); }); }
inline Lanes load(const float* from) { return each([&](int i) { return vld1q_f32(from + 4 * i); }); }
inline void store(float* to, Lanes a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, a.v[i]);
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return each([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); }); }
inline Lanes operator*(Lanes a, Lanes b) { return each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); }); }
inline Lanes operator+(Lanes a, Lanes b) { return each([&](int i) { return vaddq_f32(a.v[i], b.v[i]); }); }
inline Lanes operator/(Lanes a, Lanes b) { return each([&](int i) { return vdivq_f32(a.v[i], b.v[i]); }); }
inline Lanes larger(Lanes a, Lanes b) { return each([&](int i) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); }); }
inline Lanes load_bf16(const uint16_t* from) {
  return each([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from + 4 * i), 16)); });
}
inline Lanes load_codes(const int8_t* from) {
  const int16x8_t low = vmovl_s8(vld1_s8(from)), high = vmovl_s8(vld1_s8(from + 8));
  return each([&](int i) {
    const int16x8_t eight = i < 2 ? low : high;
    return vcvtq_f32_s32(vmovl_s16(i % 2 ? vget_high_s16(eight) : vget_low_s16(eight)));
  });
}

inline float total(Lanes a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(vpadd_f32(two, two), 0);
}
constexpr bool kTotalsAtOnce = false;
inline void totals(const Lanes (*)[4], float*) {}

// `act(i, of)` with the i-th 32 bits of four keys, of which `count` are there, for i < 4.
template <class Number, class Act>
FATE_INLINE void turn_four(const Number* keys, int64_t stride, int64_t count, Act act) {
  const auto row = [&](int64_t i) {
    return i < count ? vreinterpretq_u32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(keys + i * stride))) : vdupq_n_u32(0);
  };
  const uint32x4x2_t a = vtrnq_u32(row(0), row(1)), b = vtrnq_u32(row(2), row(3));
  act(0, vcombine_u32(vget_low_u32(a.val[0]), vget_low_u32(b.val[0]))), act(1, vcombine_u32(vget_low_u32(a.val[1]), vget_low_u32(b.val[1])));
  act(2, vcombine_u32(vget_high_u32(a.val[0]), vget_high_u32(b.val[0]))), act(3, vcombine_u32(vget_high_u32(a.val[1]), vget_high_u32(b.val[1])));
}

constexpr int64_t kTurned = 8;
inline void turn_keys(const uint16_t* keys, int64_t stride, int64_t count, float* out, int64_t step) {
  for (int64_t first = 0; first < 16; first += 4, out += 4)
    turn_four(keys + first * stride, stride, count - first, [&](int64_t i, uint32x4_t turned) {
      vst1q_f32(out + 2 * i * step, vreinterpretq_f32_u32(vshlq_n_u32(turned, 16)));
      vst1q_f32(out + (2 * i + 1) * step, vreinterpretq_f32_u32(vandq_u32(turned, vdupq_n_u32(0xffff0000))));
    });
}

constexpr int64_t kTurnedCodes = 16;
inline void turn_codes(const int8_t* keys, int64_t stride, int64_t count, float* out, int64_t step) {
  for (int64_t first = 0; first < 16; first += 4, out += 4)
    turn_four(keys + first * stride, stride, count - first, [&](int64_t i, uint32x4_t turned) {
      const auto put = [&](int64_t k, uint32x4_t high) {
        vst1q_f32(out + (4 * i + k) * step, vcvtq_f32_s32(vshrq_n_s32(vreinterpretq_s32_u32(high), 24)));
      };
      put(0, vshlq_n_u32(turned, 24)), put(1, vshlq_n_u32(turned, 16)), put(2, vshlq_n_u32(turned, 8)), put(3, turned);
    });
}

#else

struct Lanes {
  float v[16];
};
template <class Make>
FATE_INLINE Lanes each(Make make) {
  Lanes lanes;
  for (int i = 0; i < 16; ++i) lanes.v[i] = make(i);
  return lanes;
}
inline float wide(uint16_t bits) {
  const uint32_t shifted = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &shifted, 4);
  return value;
}
constexpr int at_once(int) { return 1; }
inline Lanes all(float x) { return each([&](int) { return x; }); }
inline Lanes load(const float* from) { return each([&](int i) { return from[i]; }); }
inline void store(float* to, Lanes a) { std::memcpy(to, a.v, sizeof a.v); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return each([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); }); }
inline Lanes operator*(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline Lanes operator+(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline Lanes operator/(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline Lanes larger(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline Lanes load_bf16(const uint16_t* from) { return each([&](int i) { return wide(from[i]); }); }
inline Lanes load_codes(const int8_t* from) { return each([&](int i) { return float(from[i]); }); }

inline float total(Lanes a) {
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  return a.v[0];
}
constexpr bool kTotalsAtOnce = false;
inline void totals(const Lanes (*)[4], float*) {}

constexpr int64_t kTurned = 1;
inline void turn_keys(const uint16_t* keys, int64_t stride, int64_t count, float* out, int64_t) {
  for (int64_t i = 0; i < 16; ++i) out[i] = i < count ? wide(keys[i * stride]) : 0.0f;
}

constexpr int64_t kTurnedCodes = 1;
inline void turn_codes(const int8_t* keys, int64_t stride, int64_t count, float* out, int64_t) {
  for (int64_t i = 0; i < 16; ++i) out[i] = i < count ? float(keys[i * stride]) : 0.0f;
}

#endif

}  // namespace
}  // namespace fate
