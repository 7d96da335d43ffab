// AMX (Sapphire Rapids and later): AVX-512 as in avx512.cpp for a few tokens, matrix tiles of bytes for many.
#include "ops.h"

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "codes512.h"

namespace fate {
namespace {

// Tiles 0 and 1 are sums [16 rows][16 tokens], 2 and 3 codes [16 rows][K bytes], 4 and 5 tokens [K / 4][16 tokens][4 bytes]. In memory
// for good: GCC takes _tile_loadconfig to read only eight bytes.
template <int K>
struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, K, K, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, K / 4, K / 4};
};
template <int K>
const Config<K> kConfig = {};

thread_local int64_t configured = 0;  // K of this thread's tiles

// The integer sums of group g, to `out`, by one half of the tiles or by the other; the instructions' macros want numerals.
template <int64_t G, int which>
inline void group_tile(const Panel& panel, const TokenTile& tokens, int64_t first, int64_t g, int32_t* out) {
  const uint8_t* codes = panel.code[g * G / kStepBytes][0] + g * G % kStepBytes;
  const int8_t* q = tokens.q + (first + g) * G * kTile;
  if constexpr (which == 0)
    _tile_zero(0);
  else
    _tile_zero(1);
  FATE_UNROLL
  for (int64_t k = 0; k < G; k += kStepBytes, codes += kTile * kStepBytes, q += kTile * kStepBytes) {
    if constexpr (which == 0) {
      _tile_loadd(2, codes, kStepBytes);
      _tile_loadd(4, q, 64);
      _tile_dpbusd(0, 2, 4);
    } else {
      _tile_loadd(3, codes, kStepBytes);
      _tile_loadd(5, q, 64);
      _tile_dpbusd(1, 3, 5);
    }
  }
  if constexpr (which == 0)
    _tile_stored(0, out, 64);
  else
    _tile_stored(1, out, 64);
}

template <int64_t G>
void multiply(const Panel& panel, const TokenTile& tokens, int64_t first, int64_t count, float (*sums)[kTile]) {
  alignas(64) int32_t d[2][kTile][kTile];
  __m512 y[kTile];
  FATE_UNROLL16
  for (int r = 0; r < kTile; ++r) y[r] = _mm512_load_ps(sums[r]);
  __asm__ volatile("" : : "r"(&panel), "r"(tokens.q) : "memory");  // _tile_loadd does not say that it reads memory
  group_tile<G, 0>(panel, tokens, first, 0, d[0][0]);
  for (int64_t g = 0; g < count; ++g) {
    if (g + 1 < count) {  // while the tiles work on the next group
      if (g % 2)
        group_tile<G, 0>(panel, tokens, first, g + 1, d[0][0]);
      else
        group_tile<G, 1>(panel, tokens, first, g + 1, d[1][0]);
    }
    __asm__ volatile("" : : "r"(d) : "memory");  // nor _tile_stored that it writes
    const __m512 sum = _mm512_load_ps(tokens.sum + (first + g) * kTile), of_token = _mm512_load_ps(tokens.scale + (first + g) * kTile);
    FATE_UNROLL16
    for (int r = 0; r < kTile; ++r)
      y[r] = add_group(y[r], _mm512_load_si512(d[g % 2][r]), &panel.scale[r][g], &panel.offset[r][g], sum, of_token);
  }
  FATE_UNROLL16
  for (int r = 0; r < kTile; ++r) _mm512_store_ps(sums[r], y[r]);
}

bool runs() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 1) == 0 || (d >> 25 & 1) == 0) return false;  // AMX-TILE, AMX-INT8
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM: Linux gives the registers' memory only when asked
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

}  // namespace

void multiply_tiles(const Matrix& m, const Panel& panel, const TokenTile* tiles, int64_t num_tokens, int64_t first, int64_t count,
                    float (*sums)[kTile][kTile]) {
  const int64_t k = m.group < kStepBytes ? m.group : kStepBytes;
  if (configured != k) {
    if (k == 32)
      _tile_loadconfig(&kConfig<32>);
    else
      _tile_loadconfig(&kConfig<64>);
    configured = k;
  }
  with_group(m.group, [&](auto size) {
    for (int64_t u = 0; u * kTile < num_tokens; ++u) multiply<size()>(panel, tiles[u], first, count, sums[u]);
  });
}

void end_tiles() {
  if (configured) _tile_release();
  configured = 0;
}

const Ops* amx_ops() {
  static Ops ops = {};
  if (ops.name) return &ops;
  if (!avx512_ops() || !runs()) return nullptr;
  ops = *avx512_ops();
  ops.name = "amx";
  ops.many = many_by_tiles();
  return &ops;
}

}  // namespace fate
#else
#include "panels.h"

namespace fate {
void multiply_tiles(const Matrix&, const Panel&, const TokenTile*, int64_t, int64_t, int64_t, float (*)[kTile][kTile]) {}
void end_tiles() {}
const Ops* amx_ops() { return nullptr; }
}  // namespace fate
#endif
