// Which expert has which slot: the twin of memory/table.py, which states the rules. No threads, clock or bytes.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "policy.h"

namespace fate {

constexpr int64_t kWhole = 1 << 30;  // sections: more than any blob has

enum class Found { hit, in_flight, miss };

// An expert that is not where the caller says. Python's KeyError.
struct MissingExpert : std::out_of_range {
  using std::out_of_range::out_of_range;
};

// core.Counters. Written under the owner's lock, read at any time.
struct Counters {
  std::atomic<int64_t> hits{0}, in_flight{0}, misses{0}, prefetched{0}, prefetch_used{0}, upgrades{0}, bytes_read{0};
  std::atomic<double> stall_seconds{0}, link_seconds{0}, predicting_seconds{0}, overlap_seconds{0};

  template <class Number>
  static void add(std::atomic<Number>& to, Number more) {
    to.store(to.load(std::memory_order_relaxed) + more, std::memory_order_relaxed);
  }
};

class SlotTable {
 public:
  using Classes = std::unordered_map<ExpertKey, int, HashKey>;

  // `class_of_slot`: the class of each slot, from 0. Experts that `class_of_expert` omits are of the last. `num_experts`: of the model, 0
  // where that is not known.
  SlotTable(std::unique_ptr<Policy> policy, std::vector<int> class_of_slot, Classes class_of_expert, int64_t num_experts);

  // Of `layer`, n distinct ones; `wanted` null: all sections of all. Teaches the policy, and looks up.
  void route(int64_t layer, const int64_t* experts, int64_t n, const int64_t* counts, int64_t num_tokens, const int64_t* wanted, Found* found);
  void teach(int64_t layer, const int64_t* experts, int64_t n, const int64_t* counts, int64_t num_tokens);
  void look_up(int64_t layer, const int64_t* experts, int64_t n, const int64_t* wanted, Found* found);
  void draft(int64_t layer, const int64_t* experts, int64_t n);
  void lock(const ExpertKey& key);
  void unlock(const ExpertKey& key);
  void unlock_all();
  bool expect(const ExpertKey& key);  // whether it is missing
  void protect(const ExpertKey& key);
  int64_t begin(const ExpertKey& key, bool demand, double probability);  // the slot, -1: none
  void finish(const ExpertKey& key, int64_t sections);
  void fail(const ExpertKey& key);

  bool can_begin(const ExpertKey& key, bool demand, double probability);
  bool has_slot(const ExpertKey& key) const { return find(key).slot >= 0; }
  bool is_resident(const ExpertKey& key) const;
  bool is_in_flight(const ExpertKey& key) const { return find(key).in_flight; }
  bool is_locked(const ExpertKey& key) const { return find(key).locks > 0; }
  bool is_protected(const ExpertKey& key) const { return find(key).is_protected; }
  int64_t slot_of(const ExpertKey& key) const;
  int64_t sections_of(const ExpertKey& key) const { return find(key).sections; }
  int class_of(const ExpertKey& key) const;
  int64_t num_in_flight() const { return num_in_flight_; }
  bool holds_all() const { return num_experts_ > 0 && int64_t(placed_.size()) >= num_experts_; }
  std::vector<std::pair<ExpertKey, int64_t>> slots() const;
  std::string broken() const;   // what does not hold, empty if all does
  void spoil();                 // puts a slot in two places, for tests of `broken`

  Counters counters;

 private:
  struct Entry {
    int64_t slot = -1;
    int64_t sections = 0;  // that the slot holds: kWhole all; not what a read is bringing
    int locks = 0;
    bool in_flight = false, is_protected = false, unused = false, is_draft = false;
  };
  class Unlocked;

  Entry& at(const ExpertKey& key);
  const Entry& find(const ExpertKey& key) const;
  Entry& with_slot(const ExpertKey& key);
  Entry& flying(const ExpertKey& key);
  void protect(const ExpertKey& key, Entry& entry);
  std::optional<ExpertKey> victim(const ExpertKey& incoming, int number, bool demand, double probability);
  int64_t remove(const ExpertKey& key);

  std::unique_ptr<Policy> policy_;
  std::vector<int> class_of_slot_;
  Classes class_of_expert_;
  const int64_t num_experts_;
  int last_class_ = 0;
  std::vector<std::vector<int64_t>> free_;                     // by class, the next one to be taken last
  std::vector<std::vector<Entry>> entries_;                    // by layer and expert, as far as they were mentioned
  std::vector<int64_t> num_protected_;                         // by layer
  std::unordered_set<ExpertKey, HashKey> placed_;              // those with a slot
  int64_t num_in_flight_ = 0;
};

}  // namespace fate
