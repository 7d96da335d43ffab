// Whole operations for many tokens by matrix tiles. A task is 32 rows of a matrix, written out as bf16 a few columns at a time, and
// meets all tokens of the pass; gate, up and activation of an expert never leave the near cache.
#include <algorithm>
#include <cstring>
#include <deque>

#include "inputs.h"
#include "products.h"
#include "threads.h"

namespace fate {
namespace {

// Tokens of one pass: bounds what is kept of an expert's inputs and inner values, and makes writing weights out cheap beside it.
constexpr int64_t kMostTokens = 256;

// One expert's tokens [begin, end) of the batch, or a dense layer's.
struct Pass {
  int64_t expert, begin, end;
  int64_t num_tiles() const { return (end - begin + kTile - 1) / kTile; }
};

void cut(std::vector<Pass>& passes, int64_t expert, int64_t begin, int64_t end) {
  const int64_t count = (end - begin + kMostTokens - 1) / kMostTokens;
  for (int64_t i = 0; i < count; ++i) passes.push_back({expert, begin + (end - begin) * i / count, begin + (end - begin) * (i + 1) / count});
}

int64_t most_tiles(const std::vector<Pass>& passes) {
  int64_t most = 0;
  for (const Pass& pass : passes) most = std::max(most, pass.num_tiles());
  return most;
}

float bias_of(const Ops& ops, const Matrix& m, int64_t row) {
  if (!m.bias || row >= m.rows) return 0.0f;
  float value;
  ops.to_float(static_cast<const char*>(m.bias) + row * (m.bias_dtype == Dtype::kF32 ? 4 : 2), m.bias_dtype, 1, &value);
  return value;
}

// multiply, bias added: sums [16][2][tokens].
void multiply(const Ops& ops, const Matrix& m, int64_t first, int64_t second, int64_t step, const uint16_t* tokens, int64_t num_tiles,
              float* sums) {
  const int64_t runs[2] = {first, second}, wide = num_tiles * kTile;
  const int64_t rows_of_task = second == first + kTile || step == 2 ? 2 * kTile : kTile;
  ops.tiles->multiply(m, runs, step, 2 * rows_of_task, tokens, num_tiles, sums);  // two tasks ahead
  if (!m.bias) return;
  for (int64_t r = 0; r < kTile; ++r) {
    for (int64_t i = 0; i < 2; ++i) {
      const float bias = bias_of(ops, m, runs[i] + step * r);
      for (int64_t t = 0; t < wide; ++t) sums[(2 * r + i) * wide + t] += bias;
    }
  }
}

}  // namespace

void run_experts_tiled(const Ops& ops, const ExpertPlace& place, const Batch& batch, int num_threads) {
  static thread_local Scratch of_tokens, of_inners;
  const int64_t hidden = place.up.cols, inner = place.down.cols;
  const bool blocked = place.up.kind != Kind::kInt8;
  ActivationSpec activation = place.activation;
  const bool interleaved = activation.interleaved;
  activation.interleaved = false;
  std::vector<Pass> passes;
  for (int64_t e = 0; e < int64_t(batch.addresses.size()); ++e) cut(passes, e, batch.starts[e], batch.starts[e + 1]);
  const int64_t most = most_tiles(passes);
  uint16_t* const tokens = of_tokens.of<uint16_t>(most * packed_size(hidden));
  uint16_t* const inners = of_inners.of<uint16_t>(most * packed_size(inner));
  const uint16_t* const x = static_cast<const uint16_t*>(batch.x);
  std::deque<Phases> phases;  // atomics do not move
  for (size_t p = 0; p < passes.size(); ++p) phases.emplace_back(num_threads);

  auto pack = [&](const Pass& pass, int64_t tile) {
    const uint16_t* rows[kTile];
    const int64_t begin = pass.begin + tile * kTile, count = std::min(kTile, pass.end - begin);
    for (int64_t t = 0; t < count; ++t) rows[t] = x + batch.choices[begin + t] / batch.top_k * hidden;
    ops.tiles->pack(rows, count, hidden, blocked, tokens + tile * packed_size(hidden));
    constexpr int64_t last = 256 * kTile;  // of inner values only what the activation writes may differ from zero
    std::memset(inners + (tile + 1) * packed_size(inner) - last, 0, last * 2);
  };
  auto activate = [&](const Pass& pass, const Matrix& up, int64_t task) {
    alignas(64) float sums[2 * kTile * kMostTokens], values[2 * kTile * kMostTokens];
    const int64_t num_tiles = pass.num_tiles(), wide = num_tiles * kTile, runs = activation.gated ? 1 : 2, k = task * runs * kTile;
    if (!activation.gated)
      multiply(ops, up, k, k + kTile, 1, tokens, num_tiles, sums);
    else if (interleaved)
      multiply(ops, up, 2 * k, 2 * k + 1, 2, tokens, num_tiles, sums);
    else
      multiply(ops, up, k, inner + k, 1, tokens, num_tiles, sums);
    for (int64_t r = 0; r < kTile; ++r) {
      ops.activate(activation, sums + r * 2 * wide, runs * wide, values + r * runs * wide);
      for (int64_t i = 0; i < runs; ++i)
        if (k + i * kTile + r >= inner) std::fill_n(values + (r * runs + i) * wide, wide, 0.0f);
    }
    for (int64_t i = 0; i < runs && k + i * kTile < inner; ++i)
      for (int64_t t = 0; t < num_tiles; ++t)
        ops.tiles->pack_columns(values + i * wide + t * kTile, runs * wide, k + i * kTile, blocked, inners + t * packed_size(inner));
  };
  auto give = [&](const Pass& pass, const Matrix& down, int64_t row) {
    alignas(64) float sums[2 * kTile * kMostTokens];
    const int64_t num_tiles = pass.num_tiles(), wide = num_tiles * kTile;
    multiply(ops, down, row, row + kTile, 1, inners, num_tiles, sums);
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t begin = pass.begin + t * kTile, count = std::min(kTile, pass.end - begin);
      for (int64_t i = 0; i < 2 && row + i * kTile < hidden; ++i) {
        float* outs[kTile];
        for (int64_t j = 0; j < count; ++j) outs[j] = batch.out + batch.choices[begin + j] * hidden + row + i * kTile;
        ops.tiles->turn(sums + i * wide + t * kTile, 2 * wide, std::min(kTile, hidden - row - i * kTile), count, outs);
      }
    }
  };
  auto work = [&] {
    ops.tiles->begin();
    for (size_t p = 0; p < passes.size(); ++p) {
      const Pass& pass = passes[p];
      const int64_t step = activation.gated ? kTile : 2 * kTile;
      const Matrix up = place.up.at(batch.addresses[pass.expert], batch.num_planes[pass.expert]);
      const Matrix down = place.down.at(batch.addresses[pass.expert], batch.num_planes[pass.expert]);
      phases[p].each(0, pass.num_tiles(), [&](int64_t i) { pack(pass, i); });
      phases[p].each(1, (inner + step - 1) / step, [&](int64_t i) { activate(pass, up, i); });
      phases[p].each(2, (hidden + 2 * kTile - 1) / (2 * kTile), [&](int64_t i) { give(pass, down, i * 2 * kTile); });
    }
    ops.tiles->end();
  };
  run_phases(num_threads, work);
}

void run_linear_tiled(const Ops& ops, const Matrix& m, const void* x, int64_t num_tokens, void* out, Dtype out_dtype, int num_threads) {
  static thread_local Scratch of_tokens;
  const bool blocked = m.kind != Kind::kInt8;
  const int64_t number = out_dtype == Dtype::kF32 ? 4 : 2;
  std::vector<Pass> passes;
  cut(passes, 0, 0, num_tokens);
  uint16_t* const tokens = of_tokens.of<uint16_t>(most_tiles(passes) * packed_size(m.cols));
  std::deque<Phases> phases;  // atomics do not move
  for (size_t p = 0; p < passes.size(); ++p) phases.emplace_back(num_threads);

  auto pack = [&](const Pass& pass, int64_t tile) {
    const uint16_t* rows[kTile];
    const int64_t begin = pass.begin + tile * kTile, count = std::min(kTile, pass.end - begin);
    for (int64_t t = 0; t < count; ++t) rows[t] = static_cast<const uint16_t*>(x) + (begin + t) * m.cols;
    ops.tiles->pack(rows, count, m.cols, blocked, tokens + tile * packed_size(m.cols));
  };
  auto give = [&](const Pass& pass, int64_t row) {
    alignas(64) float sums[2 * kTile * kMostTokens], turned[kTile][2 * kTile];
    const int64_t num_tiles = pass.num_tiles(), wide = num_tiles * kTile, num_rows = std::min(2 * kTile, m.rows - row);
    multiply(ops, m, row, row + kTile, 1, tokens, num_tiles, sums);
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t begin = pass.begin + t * kTile, count = std::min(kTile, pass.end - begin);
      for (int64_t i = 0; i < 2; ++i) {
        float* outs[kTile];
        for (int64_t j = 0; j < count; ++j) outs[j] = turned[j] + i * kTile;
        ops.tiles->turn(sums + i * wide + t * kTile, 2 * wide, kTile, count, outs);
      }
      for (int64_t j = 0; j < count; ++j)
        ops.from_float(turned[j], num_rows, static_cast<char*>(out) + ((begin + j) * m.rows + row) * number, out_dtype);
    }
  };
  auto work = [&] {
    ops.tiles->begin();
    for (size_t p = 0; p < passes.size(); ++p) {
      const Pass& pass = passes[p];
      phases[p].each(0, pass.num_tiles(), [&](int64_t i) { pack(pass, i); });
      phases[p].each(1, (m.rows + 2 * kTile - 1) / (2 * kTile), [&](int64_t i) { give(pass, i * 2 * kTile); });
    }
    ops.tiles->end();
  };
  run_phases(num_threads, work);
}

}  // namespace fate
