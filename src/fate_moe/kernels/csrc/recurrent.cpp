#include "recurrent.h"

#include <algorithm>
#include <cmath>

#include "operand.h"
#include "threads.h"

namespace fate {
namespace {

constexpr int64_t kChannelsOfTask = 512, kColumnsOfTask = 64;

struct Own {
  Operand tokens, attended;
  Scratch floats;
};

enum { kQ, kK, kV, kZ, kB, kA };

// Channels [begin, end) of a span's rows: silu of their convolution with the rows before them; and what the next call finds before its own,
// in the span's entry of `kv` and in those of its marks.
void run_convolution(const Ops& ops, const Delta& d, const Span& span, const float* inputs, const Kv& kv, int64_t begin, int64_t end,
                     float* out) {
  static thread_local Scratch scratch;
  static thread_local std::vector<const float*> rows;
  const int64_t n = end - begin, channels = d.channels(), count = span.end - span.begin, before = d.kernel - 1;
  float *const earlier = scratch.of<float>(before * n + d.kernel), *const one = earlier + before * n;
  rows.resize(size_t(before + count));
  for (int64_t j = 0; j < before; ++j) rows[size_t(j)] = earlier + j * n;
  for (int64_t t = 0; t < count; ++t) rows[size_t(before + t)] = inputs + (span.begin + t) * channels + begin;
  for (int64_t c = 0; c < n; ++c) {
    if (span.past)
      ops.to_float(at(kv.keys, Dtype::kBf16, span.entry * kv.batch_stride + (begin + c) * d.kernel), Dtype::kBf16, d.kernel, one);
    else
      std::fill_n(one, d.kernel, 0.0f);
    for (int64_t j = 0; j < before; ++j) earlier[j * n + c] = one[j + 1];
  }
  for (int64_t t = 0; t < count; ++t)
    ops.steps->convolve(rows.data() + t, d.convolution.data() + begin, channels, d.kernel, n, out + (span.begin + t) * channels + begin);
  int64_t read = 0;
  const auto keep = [&](int64_t entry) {  // the last `kernel` inputs, the newest last
    for (int64_t c = 0; c < n; ++c) {
      for (int64_t j = 0; j < d.kernel; ++j) one[j] = rows[size_t(read - 1 + j)][c];
      ops.from_float(one, d.kernel, at(kv.keys, Dtype::kBf16, entry * kv.batch_stride + (begin + c) * d.kernel), Dtype::kBf16);
    }
  };
  span.each_part([&](int64_t, int64_t number) { read += number; }, keep);
  keep(span.entry);
}

}  // namespace

void run_delta(const Ops& ops, const Attention& a, const std::vector<Span>& spans, const Kv& kv, float* result, bool exact, int num_threads,
               const std::function<void(int64_t, float*)>& x) {
  static thread_local Own of_thread;
  Own& of = of_thread;  // the calling thread's own
  const Delta& d = a.delta;
  const Matrix last = a.o.matrix();
  std::vector<Matrix> inputs;
  std::vector<int64_t> begins;
  int64_t width = 0;
  size_t quantized = 0;
  for (size_t i = d.inputs.size(); i--;)
    if (!is_numbers(d.inputs[i].place.kind)) quantized = i;
  for (const Weight& weight : d.inputs) inputs.push_back(weight.matrix()), begins.push_back(width), width += inputs.back().rows;
  const int64_t n = spans.back().end, channels = d.channels(), keys = d.key_heads * d.key_dim, values = d.value_heads * d.value_dim;
  const int64_t group = d.value_heads / d.key_heads;
  of.tokens.resize(ops, n, inputs[quantized].kind, inputs[0].cols, inputs[quantized].group, exact, true);
  of.attended.resize(ops, n, last.kind, last.cols, last.group, exact, true);
  std::vector<Rows> tasks, last_tasks;
  for (size_t i = 0; i < inputs.size(); ++i) cut(tasks, int64_t(i), inputs[i]);
  cut(last_tasks, 0, last);
  float* const raw = of.floats.of<float>(n * (width + 2 * channels + 2 * d.value_heads) + 2 * d.value_dim);
  float *const mixed = raw + n * width, *const convolved = mixed + n * channels, *const decays = convolved + n * channels;
  float *const betas = decays + n * d.value_heads, *const norm = betas + n * d.value_heads;
  read_norm(ops, d.norm, d.value_dim, norm);
  const int64_t pieces = (channels + kChannelsOfTask - 1) / kChannelsOfTask, parts = (d.value_dim + kColumnsOfTask - 1) / kColumnsOfTask;
  const float scale = 1.0f / std::sqrt(float(d.key_dim));
  // Part i of key head h in a token's raw row.
  const auto part = [&](int64_t t, int i, int64_t h) { return raw + t * width + d.starts[size_t(i)] + h * d.steps[size_t(i)]; };
  Phases phases(num_threads);
  auto work = [&] {
    phases.each(0, n, [&](int64_t t) {
      x(t, of.tokens.x(t));
      of.tokens.finish(ops, t);
    });
    phases.each(1, of.tokens.tiles(), [&](int64_t i) { of.tokens.pack(ops, i); });
    phases.each(2, int64_t(tasks.size()), [&](int64_t i) {
      const Rows& task = tasks[size_t(i)];
      of.tokens.multiply(ops, inputs[size_t(task.expert)], task.begin, task.end, raw + begins[size_t(task.expert)], width);
    });
    phases.each(3, n, [&](int64_t t) {
      static thread_local Scratch scratch;
      uint16_t* const rounded = scratch.of<uint16_t>(channels);
      float *const to = mixed + t * channels, *const decay = decays + t * d.value_heads, *const beta = betas + t * d.value_heads;
      for (int64_t h = 0; h < d.key_heads; ++h) {
        std::copy_n(part(t, kQ, h), d.key_dim, to + h * d.key_dim);
        std::copy_n(part(t, kK, h), d.key_dim, to + keys + h * d.key_dim);
        std::copy_n(part(t, kV, h), group * d.value_dim, to + 2 * keys + h * group * d.value_dim);
        std::copy_n(part(t, kA, h), group, decay + h * group);
        for (int64_t j = 0; j < group; ++j) beta[h * group + j] = ops.steps->sigmoid(part(t, kB, h)[j]);
      }
      ops.steps->decays(decay, d.biases.data(), d.rates.data(), d.value_heads, decay);
      ops.from_float(to, channels, rounded, Dtype::kBf16);
      ops.to_float(rounded, Dtype::kBf16, channels, to);
    });
    phases.each(4, pieces * int64_t(spans.size()), [&](int64_t i) {
      const Span& span = spans[size_t(i / pieces)];
      const int64_t begin = i % pieces * kChannelsOfTask;
      run_convolution(ops, d, span, mixed, kv, begin, std::min(channels, begin + kChannelsOfTask), convolved);
    });
    phases.each(5, n * d.key_heads, [&](int64_t i) {
      float* const query = convolved + i / d.key_heads * channels + i % d.key_heads * d.key_dim;
      ops.steps->unit(query, d.key_dim, scale);
      ops.steps->unit(query + keys, d.key_dim, 1.0f);
    });
    phases.each(6, parts * d.value_heads * int64_t(spans.size()), [&](int64_t i) {
      const Span& span = spans[size_t(i / (parts * d.value_heads))];
      const int64_t head = i / parts % d.value_heads, column = i % parts * kColumnsOfTask;
      const auto states_of = [&](int64_t entry) {
        return static_cast<float*>(kv.values) + entry * kv.block_stride + head * d.key_dim * d.value_dim + column;
      };
      float* const states = states_of(span.entry);
      DeltaRows rows = {};
      rows.columns = std::min(kColumnsOfTask, d.value_dim - column);
      if (!span.past)
        for (int64_t j = 0; j < d.key_dim; ++j) std::fill_n(states + j * d.value_dim, rows.columns, 0.0f);
      rows.key_stride = rows.value_stride = rows.out_stride = channels, rows.gate_stride = d.value_heads;
      rows.state = states, rows.state_stride = d.value_dim, rows.key_dim = d.key_dim;
      const auto run = [&](int64_t begin, int64_t count) {
        const int64_t t = span.begin + begin;
        const float* const first = convolved + t * channels;
        rows.q = first + head / group * d.key_dim, rows.k = rows.q + keys, rows.v = first + 2 * keys + head * d.value_dim + column;
        rows.decay = decays + t * d.value_heads + head, rows.beta = betas + t * d.value_heads + head;
        rows.out = mixed + t * channels + head * d.value_dim + column;  // its inputs are no longer needed
        rows.num_rows = count;
        ops.steps->delta(rows);
      };
      span.each_part(run, [&](int64_t entry) {
        for (int64_t j = 0; j < d.key_dim; ++j) std::copy_n(states + j * d.value_dim, rows.columns, states_of(entry) + j * d.value_dim);
      });
    });
    phases.each(7, n, [&](int64_t t) {
      float* const to = of.attended.x(t);
      std::copy_n(mixed + t * channels, values, to);
      for (int64_t head = 0; head < d.value_heads; ++head) {
        float* const one = to + head * d.value_dim;
        apply_norm(ops, d.norm, norm, d.value_dim, Dtype::kF32, one);
        ops.steps->gate(part(t, kZ, head / group) + head % group * d.value_dim, true, d.value_dim, one);
      }
      of.attended.finish(ops, t);
    });
    phases.each(8, of.attended.tiles(), [&](int64_t i) { of.attended.pack(ops, i); });
    phases.each(9, int64_t(last_tasks.size()), [&](int64_t i) {
      of.attended.multiply(ops, last, last_tasks[size_t(i)].begin, last_tasks[size_t(i)].end, result, last.rows);
    });
    of.tokens.end(ops), of.attended.end(ops);
  };
  run_phases(num_threads, work);
}

}  // namespace fate
