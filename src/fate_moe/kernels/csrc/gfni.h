// For gf2p8affine, which multiplies each byte by an 8x8 matrix of bits.
#pragma once
#include <cstdint>

namespace fate {

// A matrix that makes bits 3 to 0 of each byte from the byte's bits b3, b2, b1, b0 (8: from none).
constexpr int64_t bits_from(int b3, int b2, int b1, int b0) {
  return int64_t(uint64_t(1 << b3 & 255) << 32 | uint64_t(1 << b2 & 255) << 40 | uint64_t(1 << b1 & 255) << 48 |
                 uint64_t(1 << b0 & 255) << 56);
}

}  // namespace fate
