// The tokens that several matrices of a layer are multiplied with.
#pragma once
#include "inputs.h"

namespace fate {

class Operand {
 public:
  // For up to kMostRows tokens and matrices of one width; the quantized ones of them are of `kind` in groups of `group`. Unless `kept`,
  // x(t) has to be finished by the thread that wrote it, before it writes another, and no matrix may be of numbers.
  void resize(const Ops& ops, int64_t num_tokens, Kind kind, int64_t cols, int64_t group, bool exact, bool kept) {
    num_tokens_ = num_tokens, kind_ = kind, integers_ = !exact && !is_numbers(kind);
    tiles_ = integers_ && ops.many && num_tokens >= kManyTokens ? (num_tokens + kTile - 1) / kTile : 0;
    inputs_.resize(num_tokens, cols, group, kept || !integers_);
    if (tiles_) packed_.resize(tiles_, inputs_, group);
  }

  float* x(int64_t t) const { return inputs_.x(t); }
  void finish(const Ops& ops, int64_t t) const { inputs_.finish(ops, t, kind_, integers_); }
  void finish(const Ops& ops, int64_t t, int64_t begin, int64_t end) const { inputs_.finish(ops, t, kind_, integers_, begin, end); }

  // Tiles to pack once all tokens are finished, and before the first product.
  int64_t tiles() const { return tiles_; }
  void pack(const Ops& ops, int64_t tile) const {
    Token some[kTile];
    const int64_t first = tile * kTile, count = std::min(kTile, num_tokens_ - first);
    for (int64_t i = 0; i < count; ++i) some[i] = inputs_.token(first + i, true, nullptr);
    packed_.pack(ops, tile, some, count, kind_);
  }

  // Token t's rows [begin, end) to out + t * stride + row.
  void multiply(const Ops& ops, const Matrix& m, int64_t begin, int64_t end, float* out, int64_t stride) const {
    const bool integers = integers_ && !is_numbers(m.kind);
    if (tiles_ && integers) {
      TokenTile tiles[kMostTiles];
      float* outs[kMostRows];
      for (int64_t i = 0; i < tiles_; ++i) tiles[i] = packed_.tile(i);
      for (int64_t t = 0; t < num_tokens_; ++t) outs[t] = out + t * stride;
      for (int64_t row = begin; row < end; row += kTile) ops.many->product(m, tiles, num_tokens_, outs, row, std::min(row + kTile, end));
      return;
    }
    for (int64_t t = 0; t < num_tokens_; t += kTokens) {
      Token some[kTokens];
      const int64_t count = std::min(kTokens, num_tokens_ - t);
      for (int64_t j = 0; j < count; ++j) some[j] = inputs_.token(t + j, integers, out + (t + j) * stride);
      ops.product(m, some, count, begin, end);
    }
  }

  // After a thread's last product.
  void end(const Ops& ops) const {
    if (tiles_) ops.many->end();
  }

 private:
  Inputs inputs_;
  PackedInputs packed_;
  Kind kind_ = Kind::kBf16;
  int64_t num_tokens_ = 0, tiles_ = 0;
  bool integers_ = false;
};

}  // namespace fate
