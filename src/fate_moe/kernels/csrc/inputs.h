// What a product reads of its tokens, and the memory that this lies in.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "ops.h"

namespace fate {

// Memory that a calling thread keeps from call to call; starts on a cache line.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  template <class T>
  T* of(int64_t count) {
    const size_t wanted = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    if (wanted > size_) {
      std::free(memory_);
      memory_ = nullptr, size_ = 0;
      if (!(memory_ = std::aligned_alloc(64, wanted))) throw std::bad_alloc();
      size_ = wanted;
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

inline int64_t groups_of(int64_t cols) { return (cols + kGroup - 1) / kGroup; }

// The inputs of one product: fp32 values padded to whole groups, and what `product` needs of them.
class Inputs {
 public:
  void resize(int64_t count, int64_t cols) {
    cols_ = cols, groups_ = (groups_of(cols) + 15) / 16 * 16;  // padded to whole blocks and registers
    x_ = values_.of<float>(count * groups_ * kGroup);
    q_ = codes_.of<int8_t>(count * groups_ * kGroup);
    scale_ = scales_.of<float>(count * groups_);
    sum_ = sums_.of<float>(count * groups_);
  }

  float* x(int64_t i) const { return x_ + i * groups_ * kGroup; }

  // After x(i)'s first cols values are written.
  void finish(const Ops& ops, int64_t i, Kind kind, bool integers) const {
    std::fill(x(i) + cols_, x(i) + groups_ * kGroup, 0.0f);
    if (integers) {
      ops.quantize(x(i), groups_, kind != Kind::kInt8, q_ + i * groups_ * kGroup, scale_ + i * groups_, sum_ + i * groups_);
    } else if (kind != Kind::kBf16) {
      ops.sum_groups(x(i), groups_, sum_ + i * groups_);
    }
  }

  Token token(int64_t i, bool integers, float* out) const {
    return {q_ + i * groups_ * kGroup, integers ? scale_ + i * groups_ : nullptr, sum_ + i * groups_, x(i), out};
  }

 private:
  int64_t cols_ = 0, groups_ = 0;
  Scratch values_, codes_, scales_, sums_;
  float *x_ = nullptr, *scale_ = nullptr, *sum_ = nullptr;
  int8_t* q_ = nullptr;
};

}  // namespace fate
