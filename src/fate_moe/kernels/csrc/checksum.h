// XXH3 with 64 bits, seed 0 (github.com/Cyan4973/xxHash, doc/xxhash_spec.md): the checksum of a store's sections.
#pragma once
#include <cstdint>

namespace fate {

constexpr int64_t kShortest = 241;  // bytes; shorter inputs are hashed in other ways, which are not here

// Of at least kShortest bytes.
uint64_t xxh3_64(const uint8_t* data, int64_t length);

}  // namespace fate
