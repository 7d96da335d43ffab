// Weights of 16 rows as bytes, for products with many tokens (panels.inc).
#pragma once
#include "ops.h"

namespace fate {

constexpr int64_t kStepBytes = 64;   // columns of a step: a group of 64, two of 32, or half of one of 128
constexpr int64_t kPanelSteps = 32;  // written out at a time: 2048 columns of 16 rows, 32 KiB
constexpr int64_t kPanelGroups = kPanelSteps * 2;  // the most groups of a panel, of 32

struct alignas(64) Panel {
  uint8_t code[kPanelSteps][kTile][kStepBytes];  // in natural order
  float scale[kTile][kPanelGroups], offset[kTile][kPanelGroups];
};

// The chains of a panel's 16 rows and of all tokens for `count` groups, the tokens' from `first` on; sums are [row][token] by tile.
using MultiplyPanel = void (*)(const Matrix&, const Panel&, const TokenTile* tiles, int64_t num_tokens, int64_t first, int64_t count,
                               float (*sums)[kTile][kTile]);

// By matrix tiles (amx.cpp).
void multiply_tiles(const Matrix&, const Panel&, const TokenTile* tiles, int64_t num_tokens, int64_t first, int64_t count,
                    float (*sums)[kTile][kTile]);
void end_tiles();
const Many* many_by_tiles();  // (avx512.cpp)

}  // namespace fate
