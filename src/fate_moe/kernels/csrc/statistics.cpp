#include "statistics.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace fate {

void RoutingStatistics::routed(int64_t layer, const int64_t* experts, int64_t n, const int64_t* counts, int64_t num_tokens) {
  if (layer < 0 || layer >= num_layers || num_tokens < 1) throw std::out_of_range("no such turn");
  for (int64_t i = 0; i < n; ++i)
    if (experts[i] < 0 || experts[i] >= width) throw std::out_of_range("no such expert");
  float* of_layer = recent + layer * width * num_decays;
  if (num_tokens == 1) {
    expect(n);
    for (int64_t e = 0; e < width; ++e)
      for (int64_t d = 0; d < num_decays; ++d) of_layer[e * num_decays + d] *= decays[d];
    for (int64_t i = 0; i < n; ++i)
      for (int64_t d = 0; d < num_decays; ++d) of_layer[experts[i] * num_decays + d] += gain[d];
  } else {  // as if the tokens had come one by one, in equal proportions
    for (int64_t d = 0; d < num_decays; ++d) {
      const float decay = std::pow(decays[d], float(num_tokens)), all = (1 - decay) / float(num_decays);
      for (int64_t e = 0; e < width; ++e) of_layer[e * num_decays + d] *= decay;
      for (int64_t i = 0; i < n; ++i)
        of_layer[experts[i] * num_decays + d] += all * (float(counts ? counts[i] : num_tokens) / float(num_tokens));
    }
  }
  update(layer, num_tokens == 1 ? experts : nullptr);
  update_values(layer);
}

void RoutingStatistics::restored() {
  if (top_k_ < 0) expect(1);
  for (int64_t layer = 0; layer < num_layers; ++layer) update(layer, nullptr);
  std::copy(turn, turn + num_layers, distance);
  for (int64_t layer = 0; layer < num_layers; ++layer) distance[layer] *= discount;
  last_ = num_layers - 1;
  update_values(-1);
}

// Tokens choose top_k experts from now on; if that is new, nothing is known of what they chose last.
void RoutingStatistics::expect(int64_t top_k) {
  if (top_k == top_k_) return;
  top_k_ = top_k;
  if (!table) return;
  latest_.assign(size_t(num_layers * top_k), width);
  rows_.resize(size_t(num_layers * num_sources * top_k));
  for (int64_t i = 0; i < int64_t(rows_.size()); ++i) rows_[size_t(i)] = i / top_k * (width + 1) + width;
}

// `layer` has had its turn: what its frequency, and what it chose (null: not known, of many tokens), say of the next token.
void RoutingStatistics::update(int64_t layer, const int64_t* experts) {
  frequency_.assign(size_t(width), 0.0f);
  const float* of_layer = recent + layer * width * num_decays;
  for (int64_t e = 0; e < width; ++e)
    for (int64_t d = 0; d < num_decays; ++d) frequency_[size_t(e)] += of_layer[e * num_decays + d];
  if (table) {
    if (top_k_ < 0) expect(1);
    scratch_.resize(size_t(width));
    if (experts) learn(layer, experts);
    predict(layer, experts);
  }
  const float* expected = table ? chance + layer * width : frequency_.data();
  for (int64_t e = 0; e < width; ++e) {
    const float later = discount * (steady * frequency_[size_t(e)] + (1 - steady) * expected[e] + rare);
    expected_uses[layer * width + e] = expected[e];
    used_soon[layer * width + e] = expected[e] + (1 - expected[e]) * (later / (1 - discount + later));
  }
}

// The token has come past `layer` (-1: the distances are right).
void RoutingStatistics::update_values(int64_t layer) {
  if (layer >= 0) {
    if (layer <= last_) std::copy(turn, turn + num_layers, distance);
    distance[layer] = turn[layer] * discount;
    last_ = layer;
  }
  for (int64_t l = 0; l < num_layers; ++l)
    for (int64_t e = 0; e < width; ++e) value[l * width + e] = used_soon[l * width + e] * distance[l];
}

// Correct the rows that predicted this token by the error of their prediction.
void RoutingStatistics::learn(int64_t layer, const int64_t* experts) {
  const int64_t num_rows = num_sources * top_k_, *rows = rows_.data() + layer * num_rows;
  const float *predicted = chance + layer * width, *of_log = log + layer * width;
  float* error = scratch_.data();
  for (int64_t e = 0; e < width; ++e) error[e] = -predicted[e];
  for (int64_t i = 0; i < top_k_; ++i) error[experts[i]] += 1;
  float along = 0;
  for (int64_t e = 0; e < width; ++e) along += error[e] * of_log[e];
  *slope += slope_rate * along;
  for (int64_t e = 0; e < width; ++e) error[e] *= rate / float(num_rows);
  for (int64_t r = 0; r < num_rows; ++r) {
    if (r && rows[r] == rows[r - 1]) continue;  // "nothing known", once and not for each expert
    float* row = table + rows[r] * width;
    for (int64_t e = 0; e < width; ++e) row[e] += error[e];
  }
}

// Choose the rows that predict the next token, and compute each expert's chance from them.
void RoutingStatistics::predict(int64_t layer, const int64_t* experts) {
  float *predicted = chance + layer * width, *of_log = log + layer * width, *logits = scratch_.data();
  int64_t* latest = latest_.data() + layer * top_k_;
  if (experts)
    std::copy(experts, experts + top_k_, latest);
  else
    std::fill(latest, latest + top_k_, width);
  int64_t* row = rows_.data() + layer * num_sources * top_k_;
  std::fill(scratch_.begin(), scratch_.end(), 0.0f);
  for (int64_t s = 0; s < num_sources; ++s) {
    const int64_t first = (layer * num_sources + s) * (width + 1);
    const int64_t* chose = latest_.data() + std::max<int64_t>(layer - s, 0) * top_k_;
    for (int64_t i = 0; i < top_k_; ++i, ++row) {
      *row = first + chose[i];
      const float* weights = table + *row * width;
      for (int64_t e = 0; e < width; ++e) logits[e] += weights[e];
    }
  }
  for (int64_t e = 0; e < width; ++e) of_log[e] = std::log(frequency_[size_t(e)] + rare);
  for (int64_t e = 0; e < width; ++e) predicted[e] = 1 / (1 + std::exp(-(logits[e] + *slope * of_log[e])));
}

}  // namespace fate
