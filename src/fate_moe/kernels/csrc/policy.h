// Which expert gives up its slot: the native twins of memory/policies.py (LRU) and memory/decayed.py, behind one interface.
#pragma once
#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "statistics.h"

namespace fate {

// One routed expert: MoE layer (from 0) and its index within the layer.
struct ExpertKey {
  int64_t layer, expert;

  bool operator==(const ExpertKey& other) const { return layer == other.layer && expert == other.expert; }
};

struct HashKey {
  size_t operator()(const ExpertKey& key) const { return std::hash<int64_t>()(key.layer * 1000003 + key.expert); }
};

// Which experts may give up a slot now.
class Evictable {
 public:
  virtual ~Evictable() = default;
  virtual bool operator()(const ExpertKey& key) const = 0;
};

// core.EvictionPolicy says what is called when. `counts` null: all experts were chosen for all tokens.
class Policy {
 public:
  virtual ~Policy() = default;
  virtual void routed(int64_t layer, const int64_t* experts, int64_t n, const int64_t* counts, int64_t num_tokens) = 0;
  virtual void admitted(const ExpertKey& key, bool prefetched) = 0;
  virtual void touched(const ExpertKey& key) = 0;
  virtual void removed(const ExpertKey& key) = 0;
  virtual std::optional<ExpertKey> victim(const ExpertKey& incoming, const Evictable& evictable, double probability) = 0;
};

class Lru final : public Policy {
 public:
  void routed(int64_t, const int64_t*, int64_t, const int64_t*, int64_t) override {}
  void admitted(const ExpertKey& key, bool prefetched) override;
  void touched(const ExpertKey& key) override;
  void removed(const ExpertKey& key) override;
  std::optional<ExpertKey> victim(const ExpertKey& incoming, const Evictable& evictable, double probability) override;

 private:
  std::list<ExpertKey> order_;  // the next to go first
  std::unordered_map<ExpertKey, std::list<ExpertKey>::iterator, HashKey> places_;
};

// The resident expert of the lowest value goes; of equal ones the first in the model.
class Decayed final : public Policy {
 public:
  explicit Decayed(std::shared_ptr<RoutingStatistics> statistics) : statistics_(std::move(statistics)) {}
  void routed(int64_t layer, const int64_t* experts, int64_t n, const int64_t* counts, int64_t num_tokens) override;
  void admitted(const ExpertKey& key, bool prefetched) override;
  void touched(const ExpertKey&) override {}
  void removed(const ExpertKey& key) override;
  std::optional<ExpertKey> victim(const ExpertKey& incoming, const Evictable& evictable, double probability) override;

 private:
  std::shared_ptr<RoutingStatistics> statistics_;
  std::vector<ExpertKey> residents_;
  std::unordered_map<ExpertKey, size_t, HashKey> places_;  // among the residents
};

}  // namespace fate
