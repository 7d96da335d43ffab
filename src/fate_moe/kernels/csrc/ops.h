// What every instruction set implements: products of quantized rows with a few tokens, and the small loops around them.
// The plain torch twin of each function is in kernels/reference.py or kernels/elementary.py and defines it.
#pragma once
#include <cstdint>
#include <type_traits>

#include "steps.h"

// Before loops over registers: compilers keep arrays of them in registers only where such loops are unrolled early.
#if defined(__clang__)
#define FATE_UNROLL _Pragma("unroll")
#define FATE_UNROLL16 _Pragma("unroll")
#else
#define FATE_UNROLL _Pragma("GCC unroll 8")
#define FATE_UNROLL16 _Pragma("GCC unroll 16")
#endif

// In loops that must become vectors, and in all that runs for each block: what a compiler inlines by itself depends on the file's size
// (without it, three group sizes instead of one cost a row of 2048 a fifth more time).
#define FATE_INLINE inline __attribute__((always_inline))

namespace fate {

constexpr int64_t kGroup = 64;  // the step in which unquantized rows are read, and what counts as their group
constexpr int64_t kMostGroups = 512;  // of a pass, 32768 columns in groups of 64; longer rows are summed in passes
constexpr int64_t kChains = 16;  // rows whose chains of groups run side by side (loops.inc)
constexpr int64_t kStage = 64;   // groups between sums and chains: what is kept of them stays in the nearest cache
constexpr int64_t kTermsApart = kChains * kStage;
constexpr int64_t kTokens = 4;  // tokens of one pass over a row: 2 rows x 4 tokens fill the accumulators of AVX2

enum class Kind : int32_t { kPlanes1 = 1, kPlanes2 = 2, kPlanes3 = 3, kInt8 = 8, kBf16 = 16, kF32 = 32 };  // kPlanesN: N planes of 2+1+1
constexpr bool is_numbers(Kind kind) { return kind == Kind::kBf16 || kind == Kind::kF32; }
enum class Dtype : int32_t { kF32 = 0, kBf16 = 1, kF16 = 2 };
enum class Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kRelu2 = 4 };

// A matrix [rows, cols] as it lies in a slot. Quantized: planes[i] is [rows, groups, bytes], scale and zero are fp16 [rows, groups].
// Numbers: planes[0] is [rows, cols] of bf16 or, of few matrices, of fp32.
struct Matrix {
  Kind kind;
  int64_t rows, cols, group, groups;  // group weights share a scale and a zero: 32, 64 or 128; groups = ceil(cols / group)
  const uint8_t* planes[3];
  const uint16_t* scale;
  const uint16_t* zero;
  const void* bias;  // [rows] of bias_dtype, or null
  Dtype bias_dtype;
};

// One token's input to a product. With int8 activations x = scale * q in each group; with exact ones scale is null.
struct Token {
  const int8_t* q;     // [padded * group] where padded is groups rounded up to a multiple of 16; zero beyond cols
  const int8_t* pairs;  // the same in the order of the 1-bit planes (kPairs in loops.inc), where the instruction set reads them so
  const float* scale;  // [padded]
  const float* sum;    // [padded]: the sum of the group's q, or of its x with exact activations
  const float* x;      // [padded * group] fp32, zero beyond cols (exact activations and bf16 weights)
  float* out;          // [rows]: what the product writes
};

// act(min(gate, limit) * ...) as the families have it: g * sigmoid(alpha * g) for kSilu; the other factor is clamp(up) + up_offset.
struct ActivationSpec {
  Activation activation;
  bool gated;        // two rows an inner value (gate and up), else one
  bool interleaved;  // gate0, up0, gate1, ... instead of all gates, then all ups
  float alpha, limit, up_offset;
};

constexpr int64_t kTile = 16;      // tokens side by side, and matrix rows, of a product with many tokens
constexpr int64_t kMostTiles = 16;  // of tokens in one such product
// Rows of one pass: bounds what is kept of their inner values, and makes reading a matrix again for the next pass cheap beside it.
constexpr int64_t kMostRows = kMostTiles * kTile;
// From so many tokens on they are packed side by side: a tile of 16 takes about as long as so many by `product`.
constexpr int64_t kManyTokens = 6;

// 16 tokens side by side. A group's values are in natural order, four (on NEON with SMMLA eight) of each token in turn.
struct TokenTile {
  const int8_t* q;     // [padded * group / 4][16][4] where padded is groups rounded up to a multiple of 16; zeros where there is no token
  const float* scale;  // [padded][16]
  const float* sum;    // [padded][16]
};

// Products with many tokens, with int8 activations: the bits of `product`.
struct Many {
  // A tile of up to 16 tokens; their q are `blocked` or in natural order.
  void (*pack)(const Token* tokens, int64_t num_tokens, int64_t groups, int64_t group, bool blocked, int8_t* q, float* scale, float* sum);
  // outs[t][row] for rows [begin, end), at most 16, bias included, of up to kMostTiles * 16 tokens.
  void (*product)(const Matrix&, const TokenTile* tiles, int64_t num_tokens, float* const* outs, int64_t begin, int64_t end);
  // After a thread's last product.
  void (*end)();
};

struct Ops {
  const char* name;
  // out[row] of each token for rows [begin, end), bias included.
  void (*product)(const Matrix&, const Token* tokens, int64_t num_tokens, int64_t begin, int64_t end);
  // One token's groups of `group` values: int8 codes, scale = amax / 127, and the sum of codes. Blocked: in the orders in which this
  // instruction set reads planes (see loops.inc), else as they come (kInt8).
  void (*quantize)(const float* x, int64_t groups, int64_t group, bool blocked, int8_t* q, int8_t* pairs, float* scale, float* sum);
  // Sums of x in each group, for exact activations.
  void (*sum_groups)(const float* x, int64_t groups, int64_t group, float* sum);
  // inner [n] of gate_up [2n] (or [n] without a gate).
  void (*activate)(const ActivationSpec&, const float* gate_up, int64_t n, float* inner);
  // Rows [begin, end) as numbers of `dtype` (fp32 or bf16), row r at out + (r - begin) * cols.
  void (*expand)(const Matrix&, int64_t begin, int64_t end, void* out, Dtype dtype);
  void (*to_float)(const void* in, Dtype dtype, int64_t n, float* out);
  void (*from_float)(const float* in, int64_t n, void* out, Dtype dtype);
  // out[i] = 0, then fma(weights[j], rows[j * n + i], out[i]) for each j in order.
  void (*combine)(const float* rows, const float* weights, int64_t num_rows, int64_t n, float* out);
  const Steps* steps;
  const Many* many;  // null where rows of tokens go through `product`, four at a time
};

// Calls act(group) with the group size as a constant, so that inner loops know it.
template <class Act>
FATE_INLINE void with_group(int64_t group, Act act) {
  if (group == 32) return act(std::integral_constant<int64_t, 32>());
  if (group == 128) return act(std::integral_constant<int64_t, 128>());
  act(std::integral_constant<int64_t, 64>());
}

// Calls act(kind, group) with both of a quantized matrix as constants; of numbers nothing.
template <class Act>
FATE_INLINE void with_layout(const Matrix& m, Act act) {
  with_group(m.group, [&](auto group) {
    switch (m.kind) {
      case Kind::kPlanes1: return act(std::integral_constant<Kind, Kind::kPlanes1>(), group);
      case Kind::kPlanes2: return act(std::integral_constant<Kind, Kind::kPlanes2>(), group);
      case Kind::kPlanes3: return act(std::integral_constant<Kind, Kind::kPlanes3>(), group);
      case Kind::kInt8: return act(std::integral_constant<Kind, Kind::kInt8>(), group);
      case Kind::kBf16: case Kind::kF32: return;
    }
  });
}

// Null where this build or this processor has no such instructions.
const Ops* amx_ops();
const Ops* avx512_ops();
const Ops* avx_vnni_ops();
const Ops* avx2_ops();
const Ops* neon_i8mm_ops();
const Ops* neon_dot_ops();
const Ops* neon_ops();
const Ops* portable_ops();

}  // namespace fate
