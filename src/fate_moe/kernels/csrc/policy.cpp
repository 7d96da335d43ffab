#include "policy.h"

#include <stdexcept>

namespace fate {

void Lru::admitted(const ExpertKey& key, bool prefetched) {
  const auto known = places_.find(key);
  if (known != places_.end()) order_.erase(known->second);
  places_[key] = order_.insert(prefetched ? order_.begin() : order_.end(), key);
}

void Lru::touched(const ExpertKey& key) { order_.splice(order_.end(), order_, places_.at(key)); }

void Lru::removed(const ExpertKey& key) {
  const auto known = places_.find(key);
  if (known == places_.end()) throw std::out_of_range("this expert has no slot");
  order_.erase(known->second);
  places_.erase(known);
}

std::optional<ExpertKey> Lru::victim(const ExpertKey&, const Evictable& evictable, double) {
  for (const ExpertKey& key : order_)
    if (evictable(key)) return key;
  return std::nullopt;
}

void Decayed::routed(int64_t layer, const int64_t* experts, int64_t n, const int64_t* counts, int64_t num_tokens) {
  statistics_->routed(layer, experts, n, counts, num_tokens);
}

void Decayed::admitted(const ExpertKey& key, bool) {
  if (key.layer < 0 || key.layer >= statistics_->num_layers || key.expert < 0 || key.expert >= statistics_->width)
    throw std::out_of_range("no such expert");
  if (places_.emplace(key, residents_.size()).second) residents_.push_back(key);
}

void Decayed::removed(const ExpertKey& key) {
  const auto known = places_.find(key);
  if (known == places_.end()) throw std::out_of_range("this expert has no slot");
  const size_t place = known->second;
  places_.erase(known);
  if (place + 1 != residents_.size()) {
    residents_[place] = residents_.back();
    places_[residents_[place]] = place;
  }
  residents_.pop_back();
}

std::optional<ExpertKey> Decayed::victim(const ExpertKey&, const Evictable& evictable, double probability) {
  const float* value = statistics_->value;
  const int64_t width = statistics_->width;
  int64_t lowest = -1;
  for (const ExpertKey& key : residents_) {
    const int64_t index = key.layer * width + key.expert;
    if (lowest >= 0 && (value[index] > value[lowest] || (value[index] == value[lowest] && index > lowest))) continue;
    if (evictable(key)) lowest = index;
  }
  if (lowest < 0 || (probability < 1 && value[lowest] >= float(probability))) return std::nullopt;
  return ExpertKey{lowest / width, lowest % width};
}

}  // namespace fate
