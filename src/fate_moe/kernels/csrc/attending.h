// Attention in phases, for what calls it alone and for what runs a whole layer.
#pragma once
#include <cmath>

#include "layers.h"
#include "operand.h"
#include "threads.h"

namespace fate {

class Attending {
 public:
  // Sizes everything, for the up to kMostRows rows of `spans`.
  Attending(const Ops& ops, const Attention& a, const std::vector<Span>& spans, const Kv& kv, bool exact, int num_threads)
      : ops_(ops), a_(a), kv_(kv), spans_(spans), own_(own()), num_tokens_(spans.back().end), row_(kv_row(kv.format, a.dim)) {
    const int64_t num_tokens = num_tokens_;
    const Matrix made[] = {a.q.matrix(), a.k.matrix(), a.v.matrix()};
    bool kept = false;
    int quantized = 0;
    for (int i = 2; i >= 0; --i) {
      matrices_[i] = made[i];
      kept = kept || made[i].kind == Kind::kBf16;
      if (made[i].kind != Kind::kBf16) quantized = i;
    }
    last_ = a.o.matrix();
    own_.tokens.resize(ops, num_tokens, made[quantized].kind, made[quantized].cols, made[quantized].group, exact, kept);
    own_.attended.resize(ops, num_tokens, last_.kind, last_.cols, last_.group, exact, true);
    for (int i = 0; i < 3; ++i) cut(tasks_, i, matrices_[i]);
    cut(last_tasks_, 0, last_);
    const int64_t group = a.heads / a.kv_heads;
    width_ = matrices_[0].rows + 2 * a.kv_heads * a.dim, query_width_ = a.gated ? a.heads * a.dim : width_;
    query_norm_ = a.norm_over_heads ? a.heads * a.dim : a.dim, key_norm_ = a.norm_over_heads ? a.kv_heads * a.dim : a.dim;
    const int64_t of_queries = a.gated ? query_width_ : 0;
    rows_ = own_.floats.of<float>(num_tokens * (width_ + of_queries + last_.rows + 2 * a.rotary_dim) + 2 * (query_norm_ + key_norm_) + a.heads);
    queries_ = a.gated ? rows_ + num_tokens * (width_ + last_.rows + 2 * a.rotary_dim) + 2 * (query_norm_ + key_norm_) + a.heads : rows_;
    result_ = rows_ + num_tokens * width_, angles_ = result_ + num_tokens * last_.rows, norms_ = angles_ + num_tokens * 2 * a.rotary_dim;
    sinks_ = norms_ + 2 * (query_norm_ + key_norm_);
    // Rows enough to share what is read of a block, and tasks enough for all threads.
    const int64_t tokens_of_task = std::max<int64_t>(1, kRowsOfTask / group);
    heads_of_task_ = group;
    if (num_tokens * a.kv_heads < num_threads) heads_of_task_ = std::max<int64_t>(1, group * num_tokens * a.kv_heads / num_threads);
    for (const Span& span : spans)
      for (int64_t t = span.begin; t < span.end; t += tokens_of_task) parts_.push_back({&span, t, std::min(span.end, t + tokens_of_task)});
    span_of_.resize(num_tokens);
    for (const Span& span : spans) std::fill(span_of_.begin() + span.begin, span_of_.begin() + span.end, &span);
  }

  float* x(int64_t t) const { return own_.tokens.x(t); }  // [q.cols]
  float* result(int64_t t) const { return result_ + t * last_.rows; }  // [o.rows]
  int64_t size() const { return last_.rows; }

  // After token t's x is written: the rest of phase 0. cos and sin are all tokens'.
  void begin(int64_t t, const float* cos, const float* sin) const {
    own_.tokens.finish(ops_, t);
    read_angles(cos + t * a_.num_angles, angles_ + 2 * t * a_.rotary_dim);
    read_angles(sin + t * a_.num_angles, angles_ + (2 * t + 1) * a_.rotary_dim);
    if (t) return;
    if (a_.q_norm.weight) {
      read_norm(ops_, a_.q_norm, query_norm_, norms_);
      read_norm(ops_, a_.k_norm, key_norm_, norms_ + 2 * query_norm_);
    }
    if (a_.sinks) ops_.to_float(a_.sinks, a_.sinks_dtype, a_.heads, sinks_);
  }

  // Phases 1 to 7; calls `done(begin, end)` for rows of all tokens' results that are written.
  template <class Done>
  void run(Phases& phases, Done done) const {
    phases.each(1, own_.tokens.tiles(), [&](int64_t i) { own_.tokens.pack(ops_, i); });
    phases.each(2, int64_t(tasks_.size()), [&](int64_t i) {
      const Rows& task = tasks_[i];
      own_.tokens.multiply(ops_, matrices_[task.expert], task.begin, task.end, rows_ + first_of(task.expert), width_);
    });
    if (a_.norm_over_heads)
      phases.each(3, num_tokens_, [&](int64_t t) { place(t, 0, a_.kv_heads); });
    else
      phases.each(3, num_tokens_ * a_.kv_heads, [&](int64_t i) { place(i / a_.kv_heads, i % a_.kv_heads, i % a_.kv_heads + 1); });
    const int64_t group = a_.heads / a_.kv_heads, pieces = (group + heads_of_task_ - 1) / heads_of_task_;
    const int64_t parts = int64_t(parts_.size());
    phases.each(4, a_.kv_heads * pieces * parts, [&](int64_t i) {
      const int64_t head = i / (pieces * parts), piece = i / parts % pieces;
      attend(head, piece * heads_of_task_, std::min(group, (piece + 1) * heads_of_task_), parts_[i % parts]);
    });
    phases.each(5, num_tokens_, [&](int64_t t) {
      float* const to = own_.attended.x(t);
      if (num_tokens_ > 1) std::copy_n(queries_ + t * query_width_, a_.heads * a_.dim, to);
      for (int64_t h = 0; a_.gated && h < a_.heads; ++h)
        ops_.steps->gate(rows_ + t * width_ + (2 * h + 1) * a_.dim, false, a_.dim, to + h * a_.dim);
      own_.attended.finish(ops_, t);
    });
    phases.each(6, own_.attended.tiles(), [&](int64_t i) { own_.attended.pack(ops_, i); });
    phases.each(7, int64_t(last_tasks_.size()), [&](int64_t i) {
      own_.attended.multiply(ops_, last_, last_tasks_[i].begin, last_tasks_[i].end, result_, last_.rows);
      done(last_tasks_[i].begin, last_tasks_[i].end);
    });
    own_.tokens.end(ops_), own_.attended.end(ops_);
  }

 private:
  static constexpr int64_t kRowsOfTask = 96;

  // The calling thread's own, from call to call.
  struct Own {
    Operand tokens, attended;
    Scratch floats;
  };
  static Own& own() {
    static thread_local Own of_thread;
    return of_thread;
  }

  // Rows [begin, end) of a span that one task attends with.
  struct Part {
    const Span* span;
    int64_t begin, end;
  };

  // Where head h of the first block of a span begins, counted from the layer's keys or values.
  int64_t start_of(const Span& span, int64_t head) const {
    return span.entry * kv_.batch_stride + span.first * row_ + head * kv_.head_stride;
  }

  int64_t first_of(int64_t which) const { return which == 0 ? 0 : matrices_[0].rows + (which - 1) * a_.kv_heads * a_.dim; }

  void read_angles(const float* from, float* to) const {
    std::copy_n(from, a_.num_angles, to);
    if (a_.num_angles < a_.rotary_dim) std::copy_n(from, a_.num_angles, to + a_.num_angles);
  }

  void clip(float* x, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) x[i] = x[i] > a_.clip ? a_.clip : x[i] < -a_.clip ? -a_.clip : x[i];
  }

  // Heads [begin, end) of keys and values of token t, with their queries: normalized, turned, and in the cache.
  void place(int64_t t, int64_t begin, int64_t end) const {
    const int64_t dim = a_.dim, group = a_.heads / a_.kv_heads, turned = a_.rotary_dim;
    float *const query = queries_ + t * query_width_, *const key = rows_ + t * width_ + first_of(1), *const value = rows_ + t * width_ + first_of(2);
    const float* const key_norm = norms_ + 2 * query_norm_;
    if (a_.norm_over_heads && a_.q_norm.weight) {
      apply_norm(ops_, a_.q_norm, norms_, query_norm_, Dtype::kF32, query);
      apply_norm(ops_, a_.k_norm, key_norm, key_norm_, Dtype::kF32, key);
    }
    const bool by_head = a_.q_norm.weight && !a_.norm_over_heads;
    const float *const cos = angles_ + 2 * t * turned, *const sin = cos + turned;
    const auto finish = [&](float* head, const Norm& norm, const float* numbers) {
      if (a_.clip != 0.0f) clip(head, dim);
      if (by_head && !a_.norm_after_rope) apply_norm(ops_, norm, numbers, dim, Dtype::kF32, head);
      if (turned && a_.rope == Rope::kHalves) ops_.steps->turn(head, turned, cos, sin);
      if (turned && a_.rope != Rope::kHalves) ops_.steps->turn_pairs(head, turned, cos, sin, a_.rope == Rope::kPairsApart);
      if (by_head && a_.norm_after_rope) apply_norm(ops_, norm, numbers, dim, Dtype::kF32, head);
    };
    const Span& span = *span_of_[t];
    const int64_t position = span.past + t - span.begin, block = position / kPositions;
    const float scale = a_.scales.empty() ? 1.0f : a_.scale_at(position);
    for (int64_t h = begin; h < end; ++h) {
      for (int64_t i = h * group; i < (h + 1) * group; ++i) {
        float* const head = query + i * dim;
        if (a_.gated) std::copy_n(rows_ + t * width_ + 2 * i * dim, dim, head);
        finish(head, a_.q_norm, norms_);
        for (int64_t c = 0; !a_.scales.empty() && c < dim; ++c) head[c] *= scale;
      }
      finish(key + h * dim, a_.k_norm, key_norm);
      if (a_.clip != 0.0f) clip(value + h * dim, dim);
      const int64_t to = start_of(span, h) + (span.blocks ? span.blocks[block] : block) * kv_.block_stride + position % kPositions * row_;
      kv_.put(ops_, key + h * dim, dim, kv_.keys, to);
      kv_.put(ops_, value + h * dim, dim, kv_.values, to);
    }
  }

  // Query heads [first, last) of a key head: results in place of the queries, of a single row where it is read next.
  void attend(int64_t key_head, int64_t first, int64_t last, const Part& part) const {
    static thread_local Scratch scratch;
    const int64_t dim = a_.dim, head = key_head * (a_.heads / a_.kv_heads) + first, from = start_of(*part.span, key_head);
    float* const q = queries_ + part.begin * query_width_ + head * dim;
    Queries of = {};
    of.q = q, of.out = num_tokens_ > 1 ? q : own_.attended.x(0) + head * dim;
    of.stride = query_width_, of.num_tokens = part.end - part.begin, of.heads = last - first, of.dim = dim;
    of.first = part.span->past + part.begin - part.span->begin;
    of.window = a_.window, of.scaling = a_.scaling, of.sinks = a_.sinks ? sinks_ + head : nullptr;
    of.format = kv_.format, of.keys = kv_.at(kv_.keys, from), of.values = kv_.at(kv_.values, from);
    of.blocks = part.span->blocks, of.block_stride = kv_.block_stride;
    of.scratch = scratch.of<float>(attend_floats(of.num_tokens * of.heads, dim));
    ops_.steps->attend(of);
  }

  const Ops& ops_;
  const Attention& a_;
  const Kv kv_;
  const std::vector<Span>& spans_;
  Own& own_;
  int64_t num_tokens_, row_, width_, query_width_, heads_of_task_, query_norm_, key_norm_;
  std::vector<Part> parts_;
  std::vector<const Span*> span_of_;
  Matrix matrices_[3], last_;
  std::vector<Rows> tasks_, last_tasks_;
  float *rows_, *queries_, *result_, *angles_, *norms_, *sinks_;
};

}  // namespace fate
