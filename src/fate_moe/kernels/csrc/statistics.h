// How routers have chosen so far, counted one layer's turn at a time: the twin of fate_moe.memory.statistics, which explains it.
#pragma once
#include <cstdint>
#include <vector>

namespace fate {

// The arrays of memory/statistics.py, all of them C-contiguous, and its constants. Without evidence `table` is null, and what follows it unused.
struct RoutingStatistics {
  int64_t num_layers, width, num_sources, top_k, num_decays;
  const float *decays, *gain;  // [num_decays]
  float* recent;               // [L, E, num_decays]
  float *expected_uses, *used_soon, *value;  // [L, E]
  const float* turn;           // [L]
  float* distance;             // [L]
  float *table, *slope;        // [L S (E + 1), E], [1]
  float *chance, *log;         // [L, E]
  int64_t *latest, *rows;      // [L, k], [L, S k]
  float rate, slope_rate, rare, discount, steady;
};

// `layer` chose `experts`, `top_k` distinct ones; `begins` if it is no later in its token than the layer before was.
void statistics_turn(const RoutingStatistics& of, int64_t layer, const std::vector<int64_t>& experts, bool begins);

}  // namespace fate
