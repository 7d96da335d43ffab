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

// Step s of a block has columns 32s .. 32s + 31; of planes, codes 16n + 8 (s % 2) .. + 7 of part s / 2, for each n of 0 to 3.

// The first of those columns, for planes in groups of `group`: code p of part j is element p % (group / 4) of a group's quarter j.
inline int64_t column_of(int64_t group, int64_t s, int64_t n) {
  const int64_t quarter = group / 4, code = 16 * n + s % 2 * 8;
  return code / quarter * group + s / 2 * quarter + code % quarter;
}

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

void pack(const uint16_t* const* rows, int64_t num_tokens, int64_t cols, int64_t order, uint16_t* tile) {
  int64_t columns[kSteps][4];
  for (int64_t s = 0; order && s < kSteps; ++s)
    for (int64_t n = 0; n < 4; ++n) columns[s][n] = column_of(order, s, n);
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
        if (!order) {
          pairs[t] = _mm512_loadu_si512(from[t] + 32 * s);
          continue;
        }
        const auto eight = [&](int64_t n) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[t] + columns[s][n])); };
        const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(eight(0)), eight(1), 1);
        const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(eight(2)), eight(3), 1);
        pairs[t] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      }
      transpose(pairs);
      for (int64_t t = 0; t < kTile; ++t) _mm512_store_si512(tile + 32 * t, pairs[t]);
    }
  }
}

void pack_columns(const float* inner, int64_t stride, int64_t k, int64_t order, uint16_t* tile) {
  tile += k / kCols * (kSteps * kStep);
  const auto pairs = [&](int64_t r) {
    // vcvtneps2bf16 rounds as torch does; two rows of it make pairs.
    const __m256i first = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(inner + r * stride)));
    const __m256i second = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(inner + (r + 1) * stride)));
    return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
  };
  if (!order) {
    for (int64_t r = 0; r < 16; r += 2) {
      const int64_t in = (k + r) % kCols;
      _mm512_store_si512(tile + in / 32 * kStep + in % 32 / 2 * 32, pairs(r));
    }
    return;
  }
  with_group(order, [&](auto group) {
    constexpr int64_t size = group(), quarter = size / 4;
    for (int64_t r = 0; r < 16; r += 2) {
      const int64_t in = (k + r) % kCols, code = in / size * quarter + in % quarter;  // of part in % size / quarter
      const int64_t step = in % size / quarter * 2 + code % 16 / 8, pair = (code / 16 * 8 + code % 8) / 2;
      _mm512_store_si512(tile + step * kStep + pair * 32, pairs(r));
    }
  });
}

void turn(const float* from, int64_t stride, int64_t num_rows, int64_t num_tokens, float* const* outs) {
  __m512i rows[16];
  for (int64_t r = 0; r < 16; ++r) rows[r] = _mm512_loadu_si512(from + r * stride);
  transpose(rows);
  const __mmask16 mask = __mmask16((1u << num_rows) - 1);
  for (int64_t t = 0; t < num_tokens; ++t) _mm512_mask_storeu_ps(outs[t], mask, _mm512_castsi512_ps(rows[t]));
}

// The bytes of the 16 numbers that a group's codes stand for, low ones and high ones, by lane.
struct Table {
  __m512i low, high;
};

// Lane n has the numbers of group n.
inline Table table_of(__m512 group0, __m512 group1, __m512 group2, __m512 group3) {
  const __m512i table01 = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(group1, group0));
  const __m512i table23 = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(group3, group2));
  alignas(64) static constexpr uint8_t even[64] = {
      0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28,  30,  32,  34,  36,  38,  40,  42,
      44, 46, 48, 50, 52, 54, 56, 58, 60, 62, 64, 66, 68, 70, 72,  74,  76,  78,  80,  82,  84,  86,
      88, 90, 92, 94, 96, 98, 100, 102, 104, 106, 108, 110, 112, 114, 116, 118, 120, 122, 124, 126};
  const __m512i low_at = _mm512_load_si512(even), high_at = _mm512_or_si512(low_at, _mm512_set1_epi8(1));
  return {_mm512_permutex2var_epi8(table01, low_at, table23), _mm512_permutex2var_epi8(table01, high_at, table23)};
}

// A block of one row as bf16: step s at out + s * kStep. A code's two bytes come from tables of 16 that lie by group in the lanes where
// `Codes` has the group's codes; a lane of groups of 32 has two. scale * code is exact in fp32, so that fused subtraction rounds as
// the twin does.
template <Kind kind, int64_t G>
inline void write_out(const Matrix& m, int64_t at, const Codes& codes, int64_t n, uint16_t* out) {
  alignas(32) float scale[8], zero[8];
  const __mmask8 mask = __mmask8((1u << n) - 1);
  if constexpr (G == 32) {
    _mm256_store_ps(scale, _mm256_cvtph_ps(_mm_maskz_loadu_epi16(mask, m.scale + at)));
    _mm256_store_ps(zero, _mm256_cvtph_ps(_mm_maskz_loadu_epi16(mask, m.zero + at)));
  } else {
    _mm_store_ps(scale, _mm_cvtph_ps(_mm_maskz_loadu_epi16(mask, m.scale + at)));
    _mm_store_ps(zero, _mm_cvtph_ps(_mm_maskz_loadu_epi16(mask, m.zero + at)));
  }
  if constexpr (kind == Kind::kInt8) {
    FATE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const auto values = [&](__m128i part, int column) {
        const int g = column / int(G);
        return _mm512_fmsub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(part)), _mm512_set1_ps(scale[g]), _mm512_set1_ps(zero[g]));
      };
      const __m512i part = codes.part[i];
      const __m512 v0 = values(_mm512_castsi512_si128(part), 64 * i), v1 = values(_mm512_extracti32x4_epi32(part, 1), 64 * i + 16);
      const __m512 v2 = values(_mm512_extracti32x4_epi32(part, 2), 64 * i + 32), v3 = values(_mm512_extracti32x4_epi32(part, 3), 64 * i + 48);
      _mm512_store_si512(out + 2 * i * kStep, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v1, v0)));
      _mm512_store_si512(out + (2 * i + 1) * kStep, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v3, v2)));
    }
    return;
  }
  constexpr float middle = kind == Kind::kPlanes1 ? 1.5f : kind == Kind::kPlanes2 ? 0.5f : 0.0f;
  const __m512 all = _mm512_add_ps(_mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_ps(middle));
  __m512 values[kBlock<G>];
  FATE_UNROLL
  for (int g = 0; g < kBlock<G>; ++g) values[g] = _mm512_fmsub_ps(all, _mm512_set1_ps(scale[g]), _mm512_set1_ps(zero[g]));
  Table table, second;
  if constexpr (G == 32) {
    table = table_of(values[0], values[2], values[4], values[6]);
    second = table_of(values[1], values[3], values[5], values[7]);
  } else if constexpr (G == 64) {
    table = table_of(values[0], values[1], values[2], values[3]);
  } else {
    table = table_of(values[0], values[0], values[1], values[1]);
  }
  FATE_UNROLL
  for (int j = 0; j < 4; ++j) {
    __m512i lows = _mm512_shuffle_epi8(table.low, codes.part[j]), highs = _mm512_shuffle_epi8(table.high, codes.part[j]);
    if constexpr (G == 32) {
      constexpr __mmask64 upper = 0xff00ff00ff00ff00;
      lows = _mm512_mask_shuffle_epi8(lows, upper, second.low, codes.part[j]);
      highs = _mm512_mask_shuffle_epi8(highs, upper, second.high, codes.part[j]);
    }
    _mm512_store_si512(out + 2 * j * kStep, _mm512_unpacklo_epi8(lows, highs));
    _mm512_store_si512(out + (2 * j + 1) * kStep, _mm512_unpackhi_epi8(lows, highs));
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
