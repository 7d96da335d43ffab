// Plain C++: what runs where nothing else does, and what the others are compared with.
#include "ops.h"

#include <cstring>

namespace fate {
namespace {

constexpr const Steps& kOwnSteps = kPortableSteps;
constexpr bool kPairs = false;

template <int64_t G>
constexpr int64_t kBlock = 1;
template <int64_t G>
struct Codes {
  uint8_t code[G];
};
struct Sums {
  float lane[16];
};

inline Sums zero() { return {}; }

inline void add_products(Sums& sums, const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; i += 16)
    for (int64_t j = 0; j < 16; ++j) sums.lane[j] += a[i + j] * b[i + j];
}

inline void halves(const uint16_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {  // the exponent's bias by one multiplication, which also makes subnormals right
    const uint32_t magnitude = uint32_t(in[i] & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits |= magnitude >= 0x0f800000 ? 0x7f800000 : 0;  // infinities and NaN
    bits |= uint32_t(in[i] & 0x8000) << 16;
    std::memcpy(out + i, &bits, 4);
  }
}

template <Kind kind, int64_t G>
inline Codes<G> decode(const Matrix& m, int64_t at) {
  Codes<G> codes;
  if constexpr (kind == Kind::kInt8) {
    std::memcpy(codes.code, m.planes[0] + at * G, G);
    return codes;
  }
  const uint8_t* h = m.planes[0] + at * (G / 4);
  for (int j = 0; j < 4; ++j)
    for (int b = 0; b < G / 4; ++b) codes.code[G / 4 * j + b] = uint8_t((h[b] >> (2 * j) & 3) << 2);
  if constexpr (kind != Kind::kPlanes1)
    for (int e = 0; e < G; ++e) codes.code[e] |= uint8_t((m.planes[1][at * (G / 8) + e / 8] >> (e % 8) & 1) << 1);
  if constexpr (kind == Kind::kPlanes3)
    for (int e = 0; e < G; ++e) codes.code[e] |= uint8_t(m.planes[2][at * (G / 8) + e / 8] >> (e % 8) & 1);
  return codes;
}

template <Kind kind, int64_t G>
inline Codes<G> decode_some(const Matrix& m, int64_t at, int64_t) {  // blocks of one group are never cut
  return decode<kind, G>(m, at);
}

template <Kind kind, int64_t G, int T>
inline void group_sums(const Matrix& m, int64_t at, int64_t n, const Token* tokens, int64_t first, int32_t (*out)[64]) {
  for (int64_t g = 0; g < n; ++g) {
    const Codes<G> codes = decode<kind, G>(m, at + g);
    for (int t = 0; t < T; ++t) {
      const int8_t* q = tokens[t].q + (first + g) * G;
      int32_t sum = 0;
      for (int i = 0; i < G; ++i) sum += int32_t(codes.code[i]) * q[i];
      out[t][g] = sum;
    }
  }
}

inline void add_chain(const float* w, int64_t stride, int64_t n, const float* a, float* sums) {
  for (int64_t g = 0; g < n; ++g)
    for (int64_t r = 0; r < 16; ++r) sums[r] = __builtin_fmaf(a[g], w[r * stride + g], sums[r]);
}

template <Kind kind, int64_t G>
inline void dot(Sums& sums, const Codes<G>& codes, const float* x, const float* factors) {
  float lane[16] = {};
  for (int i = 0; i < G; i += 16)
    for (int j = 0; j < 16; ++j) lane[j] += float(codes.code[i + j]) * x[i + j];
  for (int j = 0; j < 16; ++j) sums.lane[j] += factors[0] * lane[j];
}

inline float total(Sums sums);

template <Kind kind, int64_t G>
void expand_codes(const Matrix& m, int64_t at, const Codes<G>& codes, int64_t n, float* out);
template <Kind kind, int64_t G>
void expand_codes(const Matrix& m, int64_t at, const Codes<G>& codes, int64_t n, uint16_t* out);

#include "loops.inc"

inline float total(Sums sums) { return tree_sum(sums.lane); }

template <Kind kind, int64_t G>
inline void expand_codes(const Matrix& m, int64_t at, const Codes<G>& codes, int64_t, float* out) {
  float scale, zero;
  halves(m.scale + at, 1, &scale);
  halves(m.zero + at, 1, &zero);
  for (int i = 0; i < G; ++i) out[i] = (float(codes.code[i]) + middle(kind)) * scale - zero;
}

template <Kind kind, int64_t G>
inline void expand_codes(const Matrix& m, int64_t at, const Codes<G>& codes, int64_t n, uint16_t* out) {
  float values[G];
  expand_codes<kind, G>(m, at, codes, n, values);
  for (int i = 0; i < G; ++i) out[i] = round_to_bf16(values[i]);
}

const Ops kOps = {"portable", product, quantize, sum_groups, apply, expand, to_float, from_float, combine, &kOwnSteps};

}  // namespace

const Ops* portable_ops() { return &kOps; }

}  // namespace fate
