// AMX (Sapphire Rapids and later): AVX-512 as in avx512.cpp for a few tokens, matrix tiles of bf16 for many.
#include "ops.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "codes512.h"

namespace fate {
namespace {

constexpr int64_t kSteps = 8;          // of 32 columns in a block of 256
constexpr int64_t kStep = kTile * 32;  // numbers of one tile register

// Step s of a block has columns 32s .. 32s + 31; of planes, columns 8s .. 8s + 7 of each quarter of the block in turn.

void pack(const uint16_t* const* rows, int64_t num_tokens, int64_t cols, bool blocked, uint16_t* tile) {
  alignas(64) uint16_t tails[kTile][kCols];
  for (int64_t at = 0; at < cols; at += kCols) {
    const uint16_t* from[kTile];
    for (int64_t t = 0; t < kTile; ++t) {
      from[t] = t < num_tokens ? rows[t] + at : tails[t];
      if (t < num_tokens && at + kCols <= cols) continue;
      std::memset(tails[t], 0, sizeof tails[t]);
      if (t < num_tokens) std::memcpy(tails[t], from[t], size_t(cols - at) * 2);
      from[t] = tails[t];
    }
    for (int64_t s = 0; s < kSteps; ++s, tile += kStep) {
      __m512i pairs[kTile];
      for (int64_t t = 0; t < kTile; ++t) {
        if (!blocked) {
          pairs[t] = _mm512_loadu_si512(from[t] + 32 * s);
          continue;
        }
        const auto eight = [&](int64_t g) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[t] + kGroup * g + 8 * s)); };
        const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(eight(0)), eight(1), 1);
        const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(eight(2)), eight(3), 1);
        pairs[t] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      }
      transpose(pairs);
      for (int64_t t = 0; t < kTile; ++t) _mm512_store_si512(tile + 32 * t, pairs[t]);
    }
  }
}

void pack_columns(const float* inner, int64_t stride, int64_t k, bool blocked, uint16_t* tile) {
  tile += k / kCols * (kSteps * kStep);
  for (int64_t r = 0; r < 16; r += 2) {
    // vcvtneps2bf16 rounds as torch does; two rows of it make pairs.
    const __m256i first = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(inner + r * stride)));
    const __m256i second = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(inner + (r + 1) * stride)));
    const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
    const int64_t in = (k + r) % kCols;
    const int64_t step = blocked ? in % kGroup / 8 : in / 32, pair = (blocked ? in / kGroup * 8 + in % 8 : in % 32) / 2;
    _mm512_store_si512(tile + step * kStep + pair * 32, pairs);
  }
}

void turn(const float* from, int64_t stride, int64_t num_rows, int64_t num_tokens, float* const* outs) {
  __m512i rows[16];
  for (int64_t r = 0; r < 16; ++r) rows[r] = _mm512_loadu_si512(from + r * stride);
  transpose(rows);
  const __mmask16 mask = __mmask16((1u << num_rows) - 1);
  for (int64_t t = 0; t < num_tokens; ++t) _mm512_mask_storeu_ps(outs[t], mask, _mm512_castsi512_ps(rows[t]));
}

// The block's codes of planes in the order of steps: lane n of register r has those of columns 64n + 16r .. 64n + 16r + 15.
template <int64_t G>
inline Codes in_steps(const Codes& codes) {
  const __m512i* const part = codes.part;
  if constexpr (G == 32)  // a lane of a part has 8 codes of two groups
    return {{_mm512_unpacklo_epi64(part[0], part[1]), _mm512_unpacklo_epi64(part[2], part[3]), _mm512_unpackhi_epi64(part[0], part[1]),
             _mm512_unpackhi_epi64(part[2], part[3])}};
  if constexpr (G == 128) {  // two lanes have 32 of one
    const __m512i even = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0), odd = _mm512_set_epi64(15, 14, 7, 6, 11, 10, 3, 2);
    return {{_mm512_permutex2var_epi64(part[0], even, part[2]), _mm512_permutex2var_epi64(part[0], odd, part[2]),
             _mm512_permutex2var_epi64(part[1], even, part[3]), _mm512_permutex2var_epi64(part[1], odd, part[3])}};
  }
  return codes;
}

// The two bytes of the 16 numbers that a group's codes stand for, by lane.
struct Table {
  __m512i low, high;
};

// Of the group whose scale and zero lie in a lane. scale * code is exact in fp32, so that fused subtraction rounds as the twin does.
template <Kind kind>
inline Table table_of(__m512 scale, __m512 zero) {
  constexpr float middle = kind == Kind::kPlanes1 ? 1.5f : kind == Kind::kPlanes2 ? 0.5f : 0.0f;
  __m512 four[4];  // codes 4c .. 4c + 3
  FATE_UNROLL
  for (int c = 0; c < 4; ++c) {
    const float code = float(4 * c) + middle;
    four[c] = _mm512_fmsub_ps(_mm512_set4_ps(code + 3, code + 2, code + 1, code), scale, zero);
  }
  const __m512i first = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(four[1], four[0]));  // of all lanes
  const __m512i second = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(four[3], four[2]));
  alignas(64) static constexpr uint8_t low_bytes[64] = {
      0,  2,  4,  6,  32, 34, 36, 38, 64, 66, 68, 70, 96,  98,  100, 102, 8,  10, 12, 14, 40, 42, 44, 46, 72, 74, 76, 78, 104, 106, 108, 110,
      16, 18, 20, 22, 48, 50, 52, 54, 80, 82, 84, 86, 112, 114, 116, 118, 24, 26, 28, 30, 56, 58, 60, 62, 88, 90, 92, 94, 120, 122, 124, 126};
  const __m512i low = _mm512_load_si512(low_bytes), high = _mm512_or_si512(low, _mm512_set1_epi8(1));
  return {_mm512_permutex2var_epi8(first, low, second), _mm512_permutex2var_epi8(first, high, second)};
}

// A block of one row as bf16: step s at out + s * kStep. A code's two bytes are looked up in its lane's tables of 16.
template <Kind kind, int64_t G>
inline void write_out(const Matrix& m, int64_t at, const Codes& codes, int64_t n, uint16_t* out) {
  const __mmask8 mask = __mmask8((1u << n) - 1);
  const auto floats = [&](const uint16_t* halves) {
    return _mm512_castps256_ps512(_mm256_cvtph_ps(_mm_maskz_loadu_epi16(mask, halves + at)));
  };
  const __m512 scales = floats(m.scale), zeros = floats(m.zero);
  if constexpr (kind == Kind::kInt8) {
    const auto values = [&](__m128i part, int column) {
      const __m512i group = _mm512_set1_epi32(column / int(G));
      return _mm512_fmsub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(part)), _mm512_permutexvar_ps(group, scales),
                             _mm512_permutexvar_ps(group, zeros));
    };
    FATE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m512i part = codes.part[i];
      const __m512 v0 = values(_mm512_castsi512_si128(part), 64 * i), v1 = values(_mm512_extracti32x4_epi32(part, 1), 64 * i + 16);
      const __m512 v2 = values(_mm512_extracti32x4_epi32(part, 2), 64 * i + 32), v3 = values(_mm512_extracti32x4_epi32(part, 3), 64 * i + 48);
      _mm512_store_si512(out + 2 * i * kStep, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v1, v0)));
      _mm512_store_si512(out + (2 * i + 1) * kStep, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v3, v2)));
    }
    return;
  }
  const Codes ordered = in_steps<G>(codes);
  Table table = {};
  FATE_UNROLL
  for (int r = 0; r < 4; ++r) {
    if (r == 0 || (G == 32 && r == 2)) {  // lane n's group is that of column 64n + 16r
      const auto group = [&](int64_t n) { return int((64 * n + 16 * r) / G); };
      const __m512i groups = _mm512_set_epi32(group(3), group(3), group(3), group(3), group(2), group(2), group(2), group(2), group(1), group(1),
                                              group(1), group(1), group(0), group(0), group(0), group(0));
      table = table_of<kind>(_mm512_permutexvar_ps(groups, scales), _mm512_permutexvar_ps(groups, zeros));
    }
    const __m512i lows = _mm512_shuffle_epi8(table.low, ordered.part[r]), highs = _mm512_shuffle_epi8(table.high, ordered.part[r]);
    _mm512_store_si512(out + 2 * r * kStep, _mm512_unpacklo_epi8(lows, highs));
    _mm512_store_si512(out + (2 * r + 1) * kStep, _mm512_unpackhi_epi8(lows, highs));
  }
}

inline void bring(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0); }

// Brings the block at group `at` near; rows are too many streams for the processor to foresee.
template <Kind kind, int64_t G>
inline void bring_block(const Matrix& m, int64_t at) {
  bring(m.planes[0] + at * (kind == Kind::kInt8 ? G : G / 4));
  if constexpr (kind == Kind::kInt8) {
    bring(m.planes[0] + at * G + 64);
    bring(m.planes[0] + at * G + 128);
    bring(m.planes[0] + at * G + 192);
  }
  if constexpr (kind == Kind::kPlanes2 || kind == Kind::kPlanes3) bring(m.planes[1] + at * (G / 8));
  if constexpr (kind == Kind::kPlanes3) bring(m.planes[2] + at * (G / 8));
  bring(m.scale + at);
  bring(m.zero + at);
}

struct alignas(64) Panel {
  uint16_t run[2][kSteps * kStep];
};

// One block's steps for T tiles of tokens; sums stay in tile registers 0..2 (first run) and 3..5.
template <int T>
inline void steps(const Panel& panel, const uint16_t* tokens, int64_t tile) {
  for (int64_t s = 0; s < kSteps; ++s, tokens += kStep) {
    _tile_loadd(6, panel.run[0] + s * kStep, 64);
    _tile_loadd(7, tokens, 64);
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (T > 1) {
      _tile_loadd(7, tokens + tile, 64);
      _tile_dpbf16ps(1, 6, 7);
    }
    if constexpr (T > 2) {
      _tile_loadd(7, tokens + 2 * tile, 64);
      _tile_dpbf16ps(2, 6, 7);
    }
    _tile_loadd(6, panel.run[1] + s * kStep, 64);
    if constexpr (T > 2) {
      _tile_dpbf16ps(5, 6, 7);
      _tile_loadd(7, tokens + tile, 64);
    }
    if constexpr (T > 1) {
      _tile_dpbf16ps(4, 6, 7);
      _tile_loadd(7, tokens, 64);
    }
    _tile_dpbf16ps(3, 6, 7);
  }
}

inline void clear() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
}

template <int T>
inline void load_sums(const float* out, int64_t stride) {
  _tile_loadd(0, out, 8 * stride);
  _tile_loadd(3, out + stride, 8 * stride);
  if constexpr (T > 1) {
    _tile_loadd(1, out + 16, 8 * stride);
    _tile_loadd(4, out + stride + 16, 8 * stride);
  }
  if constexpr (T > 2) {
    _tile_loadd(2, out + 32, 8 * stride);
    _tile_loadd(5, out + stride + 32, 8 * stride);
  }
}

template <int T>
inline void store_sums(float* out, int64_t stride) {
  _tile_stored(0, out, 8 * stride);
  _tile_stored(3, out + stride, 8 * stride);
  if constexpr (T > 1) {
    _tile_stored(1, out + 16, 8 * stride);
    _tile_stored(4, out + stride + 16, 8 * stride);
  }
  if constexpr (T > 2) {
    _tile_stored(2, out + 32, 8 * stride);
    _tile_stored(5, out + stride + 32, 8 * stride);
  }
}

template <int T>
inline void block(const Panel& panel, const uint16_t* tokens, int64_t tile, float* out, int64_t stride, bool load, bool store) {
  if (load) load_sums<T>(out, stride);
  steps<T>(panel, tokens, tile);
  if (store) store_sums<T>(out, stride);
}

template <Kind kind, int64_t G>
void multiply_as(const Matrix& m, const int64_t* first, int64_t step, int64_t ahead, const uint16_t* tokens, int64_t num_tiles, float* out) {
  Panel panel;
  const int64_t blocks = (m.groups + kBlock<G> - 1) / kBlock<G>, tile = blocks * kSteps * kStep, stride = num_tiles * kTile;
  const bool spill = num_tiles > 3;  // else sums stay in registers from block to block
  for (int64_t b = 0; b < blocks; ++b, tokens += kSteps * kStep) {
    const int64_t n = std::min(m.groups - b * kBlock<G>, kBlock<G>);
    FATE_UNROLL
    for (int i = 0; i < 2; ++i) {
      for (int64_t r = 0; r < kTile; ++r) {
        const int64_t row = std::min(first[i] + step * r, m.rows - 1), at = row * m.groups + b * kBlock<G>;
        uint16_t* const to = panel.run[i] + 32 * r;
        if (b + 1 < blocks)
          bring_block<kind, G>(m, at + kBlock<G>);
        else if (row + ahead < m.rows)
          bring_block<kind, G>(m, (row + ahead) * m.groups);
        if (n == kBlock<G>)
          write_out<kind, G>(m, at, decode<kind, G>(m, at), kBlock<G>, to);
        else
          write_out<kind, G>(m, at, decode_some<kind, G>(m, at, n), n, to);
      }
    }
    __asm__ volatile("" : : "r"(&panel) : "memory");  // _tile_loadd does not say that it reads memory
    if (!b) clear();
    const bool store = spill || b == blocks - 1;
    for (int64_t t = 0; t < num_tiles;) {
      const int64_t rest = num_tiles - t, now = rest == 4 ? 2 : rest < 3 ? rest : 3;
      const uint16_t* const from = tokens + t * tile;
      if (spill && !b && t) clear();
      if (now == 3) block<3>(panel, from, tile, out + t * kTile, stride, spill && b, store);
      if (now == 2) block<2>(panel, from, tile, out + t * kTile, stride, spill && b, store);
      if (now == 1) block<1>(panel, from, tile, out + t * kTile, stride, spill && b, store);
      t += now;
    }
  }
}

void multiply(const Matrix& m, const int64_t* first, int64_t step, int64_t ahead, const uint16_t* tokens, int64_t num_tiles, float* out) {
  with_layout(m, [&](auto kind, auto group) { multiply_as<kind(), group()>(m, first, step, ahead, tokens, num_tiles, out); });
}

// Eight tiles of 16 rows of 64 bytes. In memory for good: GCC takes _tile_loadconfig to read only eight bytes.
alignas(64) constexpr uint8_t kConfig[64] = {1,  0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  64, 0,  64, 0,  64, 0,
                                             64, 0,  64, 0, 64, 0, 64, 0, 64, 0, 0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,
                                             0,  0,  0, 0,  16, 16, 16, 16, 16, 16, 16, 16};

void begin() { _tile_loadconfig(kConfig); }
void end() { _tile_release(); }

const Tiles kTiles = {pack, multiply, pack_columns, turn, begin, end};

bool runs() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 1) == 0 || (d >> 24 & 1) == 0) return false;  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a >> 5 & 1) == 0) return false;                         // AVX512-BF16
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM: Linux gives the registers' memory only when asked
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

}  // namespace

const Ops* amx_ops() {
  static Ops ops = {};
  if (ops.name) return &ops;
  if (!avx512_ops() || !runs()) return nullptr;
  ops = *avx512_ops();
  ops.name = "amx";
  ops.tiles = &kTiles;
  return &ops;
}

}  // namespace fate
#else
namespace fate {
const Ops* amx_ops() { return nullptr; }
}  // namespace fate
#endif
