#include "statistics.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace fate {
namespace {

// Correct the rows that predicted this token by the error of their prediction.
void learn(const RoutingStatistics& of, int64_t layer, const std::vector<int64_t>& experts, std::vector<float>& error) {
  const int64_t width = of.width, num_rows = of.num_sources * of.top_k, *rows = of.rows + layer * num_rows;
  const float *chance = of.chance + layer * width, *log = of.log + layer * width;
  for (int64_t e = 0; e < width; ++e) error[e] = -chance[e];
  for (int64_t e : experts) error[e] += 1;
  float along = 0;
  for (int64_t e = 0; e < width; ++e) along += error[e] * log[e];
  *of.slope += of.slope_rate * along;
  for (int64_t e = 0; e < width; ++e) error[e] *= of.rate;
  for (int64_t r = 0; r < num_rows; ++r) {
    if (r && rows[r] == rows[r - 1]) continue;  // "nothing known", once and not for each expert
    float* row = of.table + rows[r] * width;
    for (int64_t e = 0; e < width; ++e) row[e] += error[e];
  }
}

// Choose the rows that predict the next token, and compute each expert's chance from them.
void predict(const RoutingStatistics& of, int64_t layer, const std::vector<int64_t>& experts, const float* frequency, std::vector<float>& logits) {
  const int64_t width = of.width, top_k = of.top_k;
  float *chance = of.chance + layer * width, *log = of.log + layer * width;
  std::copy(experts.begin(), experts.end(), of.latest + layer * top_k);
  int64_t* row = of.rows + layer * of.num_sources * top_k;
  std::fill(logits.begin(), logits.end(), 0.0f);
  for (int64_t s = 0; s < of.num_sources; ++s) {
    const int64_t first = (layer * of.num_sources + s) * (width + 1);
    const int64_t* chose = of.latest + std::max<int64_t>(layer - s, 0) * top_k;
    for (int64_t i = 0; i < top_k; ++i, ++row) {
      *row = first + chose[i];
      const float* weights = of.table + *row * width;
      for (int64_t e = 0; e < width; ++e) logits[e] += weights[e];
    }
  }
  for (int64_t e = 0; e < width; ++e) log[e] = std::log(frequency[e] + of.rare);
  for (int64_t e = 0; e < width; ++e) chance[e] = 1 / (1 + std::exp(-(logits[e] + *of.slope * log[e])));
}

}  // namespace

void statistics_turn(const RoutingStatistics& of, int64_t layer, const std::vector<int64_t>& experts, bool begins) {
  const int64_t width = of.width;
  if (layer < 0 || layer >= of.num_layers || int64_t(experts.size()) != of.top_k) throw std::out_of_range("no such turn");
  for (int64_t e : experts)
    if (e < 0 || e >= width) throw std::out_of_range("no such expert");
  thread_local std::vector<float> frequency, scratch;
  frequency.assign(size_t(width), 0.0f);
  scratch.resize(size_t(width));
  float* recent = of.recent + layer * width * of.num_decays;
  for (int64_t e = 0; e < width; ++e)
    for (int64_t d = 0; d < of.num_decays; ++d) recent[e * of.num_decays + d] *= of.decays[d];
  for (int64_t e : experts)
    for (int64_t d = 0; d < of.num_decays; ++d) recent[e * of.num_decays + d] += of.gain[d];
  for (int64_t e = 0; e < width; ++e)
    for (int64_t d = 0; d < of.num_decays; ++d) frequency[e] += recent[e * of.num_decays + d];

  if (of.table) {
    learn(of, layer, experts, scratch);
    predict(of, layer, experts, frequency.data(), scratch);
  }
  const float* chance = of.table ? of.chance + layer * width : frequency.data();
  float *expected_uses = of.expected_uses + layer * width, *used_soon = of.used_soon + layer * width;
  for (int64_t e = 0; e < width; ++e) {
    const float later = of.discount * (of.steady * frequency[e] + (1 - of.steady) * chance[e] + of.rare);
    expected_uses[e] = chance[e];
    used_soon[e] = chance[e] + (1 - chance[e]) * (later / (1 - of.discount + later));
  }
  if (begins) std::copy(of.turn, of.turn + of.num_layers, of.distance);
  of.distance[layer] = of.turn[layer] * of.discount;
  for (int64_t l = 0; l < of.num_layers; ++l)
    for (int64_t e = 0; e < width; ++e) of.value[l * width + e] = of.used_soon[l * width + e] * of.distance[l];
}

}  // namespace fate
