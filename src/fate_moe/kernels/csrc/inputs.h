// What operations on several threads have in common: scratch memory, a product's inputs, and how a matrix is cut into tasks.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "ops.h"

namespace fate {

constexpr int64_t kTaskBytes = 32 << 10;  // weights of one task: far below a core's cache, far above the cost of taking it

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

inline int64_t groups_of(int64_t cols, int64_t group = kGroup) { return (cols + group - 1) / group; }

inline int64_t row_bytes(const Matrix& m) {
  if (is_numbers(m.kind)) return m.cols * (m.kind == Kind::kBf16 ? 2 : 4);
  const int64_t bits = m.kind == Kind::kInt8 ? 8 : 1 + int64_t(m.kind);
  return m.groups * (m.group * bits / 8 + 4);
}

// Rows of one task, a multiple of 16: so many chains run side by side.
inline int64_t rows_of_task(const Matrix& m) { return std::max<int64_t>(1, kTaskBytes / (16 * std::max<int64_t>(1, row_bytes(m)))) * 16; }

// The inputs of one product: fp32 values padded to whole groups, and what `product` needs of them.
class Inputs {
 public:
  // For `count` tokens and matrices whose groups are all of `group` weights. Without `values` a token's x has to be finished by the
  // thread that has written it, before it writes another's: only what integer products need is kept.
  void resize(int64_t count, int64_t cols, int64_t group, bool values = true) {
    cols_ = cols, group_ = group, groups_ = (groups_of(cols, group) + 15) / 16 * 16;  // padded to whole blocks and registers
    kept_ = values;
    if (values) x_ = values_.of<float>(count * groups_ * group);
    q_ = codes_.of<int8_t>(2 * count * groups_ * group), pairs_ = q_ + count * groups_ * group;
    scale_ = scales_.of<float>(count * groups_);
    sum_ = sums_.of<float>(count * groups_);
  }

  float* x(int64_t i) const {
    if (kept_) return x_ + i * groups_ * group_;
    static thread_local Scratch own;
    return own.of<float>(groups_ * group_);
  }

  // After x(i)'s first cols values are written.
  void finish(const Ops& ops, int64_t i, Kind kind, bool integers) const { finish(ops, i, kind, integers, 0, cols_); }

  // After x(i)'s values [begin, end) are written; `begin` is a multiple of 256, the largest block, and so is `end` unless it is cols.
  void finish(const Ops& ops, int64_t i, Kind kind, bool integers, int64_t begin, int64_t end) const {
    if (end == cols_) {
      std::fill(x(i) + cols_, x(i) + groups_ * group_, 0.0f);
      end = groups_ * group_;
    }
    const int64_t at = i * groups_ + begin / group_, count = (end - begin) / group_;
    if (integers) {
      ops.quantize(x(i) + begin, count, group_, kind != Kind::kInt8, q_ + at * group_, pairs_ + at * group_, scale_ + at, sum_ + at);
    } else if (!is_numbers(kind)) {
      ops.sum_groups(x(i) + begin, count, group_, sum_ + at);
    }
  }

  Token token(int64_t i, bool integers, float* out) const {
    const int64_t at = i * groups_ * group_;
    return {q_ + at, pairs_ + at, integers ? scale_ + i * groups_ : nullptr, sum_ + i * groups_, kept_ ? x(i) : nullptr, out};
  }

  int64_t padded_groups() const { return groups_; }

 private:
  int64_t cols_ = 0, group_ = kGroup, groups_ = 0;
  bool kept_ = true;
  Scratch values_, codes_, scales_, sums_;
  float *x_ = nullptr, *scale_ = nullptr, *sum_ = nullptr;
  int8_t *q_ = nullptr, *pairs_ = nullptr;
};

// Tokens of a pass, 16 side by side, for products with many.
class PackedInputs {
 public:
  void resize(int64_t num_tiles, const Inputs& inputs, int64_t group) {
    group_ = group, groups_ = inputs.padded_groups();
    q_ = codes_.of<int8_t>(num_tiles * groups_ * group * kTile);
    factors_ = floats_.of<float>(2 * num_tiles * groups_ * kTile);
  }

  void pack(const Ops& ops, int64_t i, const Token* tokens, int64_t num_tokens, Kind kind) const {
    float* const scale = factors_ + 2 * i * groups_ * kTile;
    ops.many->pack(tokens, num_tokens, groups_, group_, kind != Kind::kInt8, q_ + i * groups_ * group_ * kTile, scale, scale + groups_ * kTile);
  }

  TokenTile tile(int64_t i) const {
    const float* const scale = factors_ + 2 * i * groups_ * kTile;
    return {q_ + i * groups_ * group_ * kTile, scale, scale + groups_ * kTile};
  }

 private:
  int64_t group_ = kGroup, groups_ = 0;
  Scratch codes_, floats_;
  int8_t* q_ = nullptr;
  float* factors_ = nullptr;
};

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

inline const void* at(const void* memory, Dtype dtype, int64_t index) { return static_cast<const char*>(memory) + index * size_of(dtype); }
inline void* at(void* memory, Dtype dtype, int64_t index) { return static_cast<char*>(memory) + index * size_of(dtype); }

// A task: rows [begin, end) of one expert's matrix.
struct Rows {
  int64_t expert, begin, end;
};

inline void cut(std::vector<Rows>& tasks, int64_t expert, const Matrix& m) {
  const int64_t step = rows_of_task(m);
  for (int64_t row = 0; row < m.rows; row += step) tasks.push_back({expert, row, std::min(row + step, m.rows)});
}

}  // namespace fate
