// How routers have chosen so far, counted one layer's turn at a time: the twin of fate_moe.memory.statistics, which explains it.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace fate {

// Works on the arrays of memory/statistics.py, all of them C-contiguous, with its constants. Without evidence `table` is null, and
// what follows it unused. One thread at a time.
class RoutingStatistics {
 public:
  int64_t num_layers, width, num_sources, num_decays;
  const float *decays, *gain;                // [num_decays]
  float* recent;                             // [L, E, num_decays]
  float *expected_uses, *used_soon, *value;  // [L, E]
  const float* turn;                         // [L]
  float* distance;                           // [L]
  float *table, *slope;                      // [L S (E + 1), E], [1]
  float *chance, *log;                       // [L, E]
  float rate, slope_rate, rare, discount, steady;  // `rate` is shared by the rows that are summed
  std::shared_ptr<void> owner;                     // of the arrays

  // `layer` chose the n distinct `experts`, for `counts` of num_tokens tokens (null: for all of them).
  void routed(int64_t layer, const int64_t* experts, int64_t n, const int64_t* counts, int64_t num_tokens);

  // The arrays were written to: what they say of each layer's next token, whose predecessor is not known.
  void restored();

 private:
  int64_t top_k_ = -1, last_ = -1;      // experts of a token, -1: not known yet; the layer that was routed last
  std::vector<int64_t> latest_, rows_;  // what each layer chose last, [L, k]; rows that were summed for each layer, [L, S k]
  std::vector<float> frequency_, scratch_;

  void expect(int64_t top_k);
  void learn(int64_t layer, const int64_t* experts);
  void predict(int64_t layer, const int64_t* experts);
  void update(int64_t layer, const int64_t* experts);
  void update_values(int64_t layer);
};

}  // namespace fate
