#include "products.h"

#include <algorithm>
#include <deque>

#include "inputs.h"
#include "threads.h"

namespace fate {

Matrix Place::at(uint64_t address, int num_planes) const {
  const uint8_t* base = reinterpret_cast<const uint8_t*>(address);
  const Kind used = kind == Kind::kPlanes3 ? Kind(num_planes) : kind;
  Matrix m = {used, rows, cols, group, groups_of(cols, group), {}, nullptr, nullptr, bias < 0 ? nullptr : base + bias, bias_dtype};
  for (int i = 0; i < 3; ++i) m.planes[i] = base + planes[i];
  if (!is_numbers(kind)) {
    m.scale = reinterpret_cast<const uint16_t*>(base + scale);
    m.zero = reinterpret_cast<const uint16_t*>(base + zero);
  }
  return m;
}

namespace {

// One expert's choices [begin, end), or a dense layer's tokens, of one pass; `tile` is the first of theirs if they are many, else -1.
struct Part {
  int64_t expert, begin, end, tile;
};

struct Pass {
  std::vector<Part> parts;
  int64_t begin = 0, end = 0, num_tiles = 0;
};

std::vector<Pass> passes_of(const std::vector<int64_t>& starts, bool many) {
  std::vector<Pass> passes;
  for (int64_t e = 0; e + 1 < int64_t(starts.size()); ++e) {
    const int64_t begin = starts[e], count = starts[e + 1] - begin, pieces = (count + kMostRows - 1) / kMostRows;
    for (int64_t i = 0; i < pieces; ++i) {
      Part part = {e, begin + count * i / pieces, begin + count * (i + 1) / pieces, -1};
      const int64_t rows = part.end - part.begin;
      if (passes.empty() || part.end - passes.back().begin > kMostRows) {
        passes.emplace_back();
        passes.back().begin = part.begin;
      }
      Pass& pass = passes.back();
      if (many && rows >= kManyTokens) part.tile = pass.num_tiles, pass.num_tiles += (rows + kTile - 1) / kTile;
      pass.parts.push_back(part);
      pass.end = part.end;
    }
  }
  return passes;
}

// Rows [begin, end) of the matrix times a part's tokens: token_at(row, out) is one, out_at(row) where its results go.
template <class TokenAt, class OutAt>
void multiply(const Ops& ops, const Matrix& m, const Part& part, const PackedInputs& packed, int64_t begin, int64_t end,
              TokenAt token_at, OutAt out_at) {
  const int64_t count = part.end - part.begin;
  if (part.tile >= 0) {
    TokenTile tiles[kMostTiles];
    float* outs[kMostRows];
    for (int64_t i = 0; i * kTile < count; ++i) tiles[i] = packed.tile(part.tile + i);
    for (int64_t i = 0; i < count; ++i) outs[i] = out_at(part.begin + i);
    for (int64_t row = begin; row < end; row += kTile) ops.many->product(m, tiles, count, outs, row, std::min(row + kTile, end));
    return;
  }
  for (int64_t i = part.begin; i < part.end; i += kTokens) {
    Token some[kTokens];
    const int64_t now = std::min(kTokens, part.end - i);
    for (int64_t j = 0; j < now; ++j) some[j] = token_at(i + j, out_at(i + j));
    ops.product(m, some, now, begin, end);
  }
}

// One task for each tile of a pass: packs its tokens.
template <class TokenAt>
void pack(const Ops& ops, const Pass& pass, int64_t tile, const PackedInputs& packed, Kind kind, TokenAt token_at) {
  const Part* of = nullptr;
  for (const Part& part : pass.parts)
    if (part.tile >= 0 && part.tile <= tile) of = &part;
  Token some[kTile];
  const int64_t begin = of->begin + (tile - of->tile) * kTile, count = std::min(kTile, of->end - begin);
  for (int64_t j = 0; j < count; ++j) some[j] = token_at(begin + j, nullptr);
  packed.pack(ops, tile, some, count, kind);
}

}  // namespace

void run_experts(const Ops& ops, const ExpertPlace& place, const Batch& batch, bool exact, int num_threads) {
  static thread_local Inputs tokens, inners;
  static thread_local PackedInputs packed_tokens, packed_inners;
  static thread_local Scratch gate_ups;
  const int64_t num_experts = int64_t(batch.addresses.size());
  const int64_t hidden = place.up.cols, wide = place.up.rows, inner = place.down.cols;
  const Kind kind = place.up.kind;
  const bool integers = !exact && !is_numbers(kind);
  const std::vector<Pass> passes = passes_of(batch.starts, integers && ops.many);
  int64_t most_rows = 0, most_tiles = 0;
  for (const Pass& pass : passes) most_rows = std::max(most_rows, pass.end - pass.begin), most_tiles = std::max(most_tiles, pass.num_tiles);
  tokens.resize(batch.num_tokens, hidden, place.up.group, !integers);
  inners.resize(most_rows, inner, place.down.group, !integers);
  if (most_tiles) {
    packed_tokens.resize(most_tiles, tokens, place.up.group);
    packed_inners.resize(most_tiles, inners, place.down.group);
  }
  float* const gate_up = gate_ups.of<float>(most_rows * wide);
  std::vector<Matrix> ups, downs;
  for (int64_t e = 0; e < num_experts; ++e) {
    ups.push_back(place.up.at(batch.addresses[e], batch.num_planes[e]));
    downs.push_back(place.down.at(batch.addresses[e], batch.num_planes[e]));
  }
  std::vector<std::vector<Rows>> up_tasks(passes.size()), down_tasks(passes.size());  // Rows::expert is the part
  for (size_t p = 0; p < passes.size(); ++p)
    for (int64_t i = 0; i < int64_t(passes[p].parts.size()); ++i) {
      cut(up_tasks[p], i, ups[passes[p].parts[i].expert]);
      cut(down_tasks[p], i, downs[passes[p].parts[i].expert]);
    }
  // The calling thread's own copies of pointers: thread_local names would mean another thread's in the team.
  Inputs &of_tokens = tokens, &of_inners = inners;
  PackedInputs &of_packed = packed_tokens, &of_packed_inners = packed_inners;
  Phases first(num_threads);
  std::deque<Phases> phases;  // atomics do not move
  for (size_t p = 0; p < passes.size(); ++p) phases.emplace_back(num_threads);
  auto work = [&] {
    first.each(0, batch.num_tokens, [&](int64_t t) {
      ops.to_float(at(batch.x, batch.x_dtype, t * hidden), batch.x_dtype, hidden, of_tokens.x(t));
      of_tokens.finish(ops, t, kind, integers);
    });
    for (size_t p = 0; p < passes.size(); ++p) {
      const Pass& pass = passes[p];
      const auto token_at = [&](int64_t i, float* out) { return of_tokens.token(batch.choices[i] / batch.top_k, integers, out); };
      const auto inner_at = [&](int64_t i, float* out) { return of_inners.token(i - pass.begin, integers, out); };
      const auto gate_up_at = [&](int64_t i) { return gate_up + (i - pass.begin) * wide; };
      const auto out_at = [&](int64_t i) { return batch.out + batch.choices[i] * place.down.rows; };
      if (pass.num_tiles) phases[p].each(0, pass.num_tiles, [&](int64_t i) { pack(ops, pass, i, of_packed, kind, token_at); });
      phases[p].each(1, int64_t(up_tasks[p].size()), [&](int64_t i) {
        const Rows& task = up_tasks[p][i];
        const Part& part = pass.parts[task.expert];
        multiply(ops, ups[part.expert], part, of_packed, task.begin, task.end, token_at, gate_up_at);
      });
      phases[p].each(2, pass.end - pass.begin, [&](int64_t i) {
        ops.activate(place.activation, gate_up + i * wide, inner, of_inners.x(i));
        of_inners.finish(ops, i, kind, integers);
      });
      if (pass.num_tiles) phases[p].each(3, pass.num_tiles, [&](int64_t i) { pack(ops, pass, i, of_packed_inners, kind, inner_at); });
      phases[p].each(4, int64_t(down_tasks[p].size()), [&](int64_t i) {
        const Rows& task = down_tasks[p][i];
        const Part& part = pass.parts[task.expert];
        multiply(ops, downs[part.expert], part, of_packed_inners, task.begin, task.end, inner_at, out_at);
      });
    }
    if (most_tiles) ops.many->end();
  };
  run_phases(num_threads, work);
}

void run_linear(const Ops& ops, const Matrix& m, const void* x, Dtype x_dtype, int64_t num_tokens, void* out, Dtype out_dtype,
                bool exact, int num_threads) {
  static thread_local Inputs tokens;
  static thread_local PackedInputs packed;
  static thread_local Scratch results;
  const bool integers = !exact && !is_numbers(m.kind);
  const std::vector<Pass> passes = passes_of({0, num_tokens}, integers && ops.many);
  int64_t most_rows = 0, most_tiles = 0;
  for (const Pass& pass : passes) most_rows = std::max(most_rows, pass.end - pass.begin), most_tiles = std::max(most_tiles, pass.num_tiles);
  tokens.resize(most_rows, m.cols, m.group, !integers);
  if (most_tiles) packed.resize(most_tiles, tokens, m.group);
  float* const rounded_later = out_dtype == Dtype::kF32 ? nullptr : results.of<float>(most_rows * m.rows);
  std::vector<Rows> tasks;
  cut(tasks, 0, m);
  Inputs& of_tokens = tokens;
  PackedInputs& of_packed = packed;
  std::deque<Phases> phases;
  for (size_t p = 0; p < passes.size(); ++p) phases.emplace_back(num_threads);
  auto work = [&] {
    for (size_t p = 0; p < passes.size(); ++p) {
      const Pass& pass = passes[p];
      float* const result = rounded_later ? rounded_later : static_cast<float*>(out) + pass.begin * m.rows;
      const auto token_at = [&](int64_t t, float* to) { return of_tokens.token(t - pass.begin, integers, to); };
      const auto out_at = [&](int64_t t) { return result + (t - pass.begin) * m.rows; };
      phases[p].each(0, pass.end - pass.begin, [&](int64_t t) {
        ops.to_float(at(x, x_dtype, (pass.begin + t) * m.cols), x_dtype, m.cols, of_tokens.x(t));
        of_tokens.finish(ops, t, m.kind, integers);
      });
      if (pass.num_tiles) phases[p].each(1, pass.num_tiles, [&](int64_t i) { pack(ops, pass, i, of_packed, m.kind, token_at); });
      phases[p].each(2, int64_t(tasks.size()), [&](int64_t i) {
        const Rows& task = tasks[i];
        multiply(ops, m, pass.parts[0], of_packed, task.begin, task.end, token_at, out_at);
        for (int64_t t = pass.begin; rounded_later && t < pass.end; ++t)
          ops.from_float(out_at(t) + task.begin, task.end - task.begin, at(out, out_dtype, t * m.rows + task.begin), out_dtype);
      });
    }
    if (most_tiles) ops.many->end();
  };
  run_phases(num_threads, work);
}

void run_expand(const Ops& ops, const Matrix& m, void* out, Dtype dtype, int num_threads) {
  std::vector<Rows> tasks;
  cut(tasks, 0, m);
  Phases phases(num_threads);
  auto work = [&] {
    phases.each(0, int64_t(tasks.size()), [&](int64_t i) {
      ops.expand(m, tasks[i].begin, tasks[i].end, at(out, dtype, tasks[i].begin * m.cols), dtype);
    });
  };
  run_phases(num_threads, work);
}

void run_combine(const Ops& ops, const float* rows, const void* weights, Dtype weights_dtype, int64_t num_tokens, int64_t top_k,
                 int64_t hidden, void* out, Dtype out_dtype, int num_threads) {
  static thread_local Scratch factors, results;
  float* const factor = factors.of<float>(num_tokens * top_k);
  float* const result = out_dtype == Dtype::kF32 ? static_cast<float*>(out) : results.of<float>(num_tokens * hidden);
  ops.to_float(weights, weights_dtype, num_tokens * top_k, factor);
  Phases phases(num_threads);
  auto work = [&] {
    phases.each(0, num_tokens, [&](int64_t t) {
      ops.combine(rows + t * top_k * hidden, factor + t * top_k, top_k, hidden, result + t * hidden);
      if (out_dtype != Dtype::kF32) ops.from_float(result + t * hidden, hidden, at(out, out_dtype, t * hidden), out_dtype);
    });
  };
  run_phases(num_tokens > 4 ? num_threads : 1, work);
}

uint64_t read_all(const void* memory, int64_t num_bytes, int num_threads) {
  constexpr int64_t step = 1 << 20;
  std::atomic<uint64_t> sum{0};
  Phases phases(num_threads);
  auto work = [&] {
    phases.each(0, (num_bytes + step - 1) / step, [&](int64_t i) {
      const uint64_t* words = reinterpret_cast<const uint64_t*>(static_cast<const char*>(memory) + i * step);
      const int64_t count = std::min(step, num_bytes - i * step) / 8;
      uint64_t lanes[32] = {};
      int64_t w = 0;
      for (; w + 32 <= count; w += 32)
        for (int j = 0; j < 32; ++j) lanes[j] ^= words[w + j];
      for (; w < count; ++w) lanes[0] ^= words[w];
      for (const uint64_t lane : lanes) sum.fetch_xor(lane, std::memory_order_relaxed);
    });
  };
  run_phases(num_threads, work);
  return sum;
}

}  // namespace fate
