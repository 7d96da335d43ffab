#include "table.h"

#include <algorithm>

namespace fate {
namespace {

constexpr int64_t kMost = 1 << 20;  // layers, and experts of a layer: an index beyond is a mistake

std::string name(const ExpertKey& key) {
  return "ExpertId(layer=" + std::to_string(key.layer) + ", expert=" + std::to_string(key.expert) + ")";
}

}  // namespace

// Those that may give up a slot of a class; those that are protected not, if they are to be spared.
class SlotTable::Unlocked final : public Evictable {
 public:
  Unlocked(const SlotTable& of, int number, bool spare) : of_(of), number_(number), spare_(spare) {}

  bool operator()(const ExpertKey& key) const override {
    const Entry& entry = of_.find(key);
    return entry.slot >= 0 && !entry.locks && !entry.in_flight && of_.class_of_slot_[size_t(entry.slot)] == number_ &&
           !(spare_ && entry.is_protected);
  }

 private:
  const SlotTable& of_;
  const int number_;
  const bool spare_;
};

SlotTable::SlotTable(std::unique_ptr<Policy> policy, std::vector<int> class_of_slot, Classes class_of_expert, int64_t num_experts)
    : policy_(std::move(policy)),
      class_of_slot_(std::move(class_of_slot)),
      class_of_expert_(std::move(class_of_expert)),
      num_experts_(num_experts) {
  if (class_of_slot_.empty()) throw std::invalid_argument("no slots");
  last_class_ = *std::max_element(class_of_slot_.begin(), class_of_slot_.end());
  free_.resize(size_t(last_class_) + 1);
  for (size_t slot = class_of_slot_.size(); slot-- > 0;) free_.at(size_t(class_of_slot_[slot])).push_back(int64_t(slot));
}

void SlotTable::route(int64_t layer, const int64_t* experts, int64_t n, const int64_t* counts, int64_t num_tokens,
                      const int64_t* wanted, Found* found) {
  teach(layer, experts, n, counts, num_tokens);
  look_up(layer, experts, n, wanted, found);
}

void SlotTable::teach(int64_t layer, const int64_t* experts, int64_t n, const int64_t* counts, int64_t num_tokens) {
  if (!n) return;
  if (!holds_all()) policy_->routed(layer, experts, n, counts, num_tokens);
  for (int64_t i = 0; i < n; ++i) {
    const ExpertKey key = {layer, experts[i]};
    Entry& entry = at(key);
    entry.is_draft = false;
    if (entry.slot >= 0) policy_->touched(key);
  }
}

void SlotTable::draft(int64_t layer, const int64_t* experts, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    Entry& entry = at({layer, experts[i]});
    entry.is_draft = entry.slot < 0;
  }
}

void SlotTable::look_up(int64_t layer, const int64_t* experts, int64_t n, const int64_t* wanted, Found* found) {
  if (!n) return;
  int64_t hits = 0, arriving = 0;
  for (int64_t i = 0; i < n; ++i) {
    const ExpertKey key = {layer, experts[i]};
    Entry& entry = at(key);
    found[i] = Found::miss;
    if (entry.slot < 0) continue;
    if (entry.unused) {
      entry.unused = false;
      Counters::add<int64_t>(counters.prefetch_used, 1);
    }
    if (entry.in_flight) {
      found[i] = Found::in_flight;
      ++arriving;
    } else if (entry.sections < (wanted ? wanted[i] : kWhole)) {
      Counters::add<int64_t>(counters.upgrades, 1);
    } else {
      found[i] = Found::hit;
      ++hits;
    }
  }
  Counters::add(counters.hits, hits);
  Counters::add(counters.in_flight, arriving);
  Counters::add(counters.misses, n - hits - arriving);
  int64_t& left = num_protected_[size_t(layer)];
  if (left)
    for (Entry& entry : entries_[size_t(layer)]) entry.is_protected = false;
  left = 0;
}

void SlotTable::lock(const ExpertKey& key) { ++at(key).locks; }

void SlotTable::unlock(const ExpertKey& key) {
  if (!find(key).locks) throw MissingExpert(name(key));
  --at(key).locks;
}

void SlotTable::unlock_all() {
  for (std::vector<Entry>& of_layer : entries_)
    for (Entry& entry : of_layer) entry.locks = 0;
}

bool SlotTable::expect(const ExpertKey& key) {
  Entry& entry = at(key);
  if (entry.slot < 0) return true;
  if (!entry.in_flight) protect(key, entry);
  return false;
}

void SlotTable::protect(const ExpertKey& key) { protect(key, with_slot(key)); }

void SlotTable::protect(const ExpertKey& key, Entry& entry) {
  num_protected_[size_t(key.layer)] += !entry.is_protected;
  entry.is_protected = true;
}

int64_t SlotTable::begin(const ExpertKey& key, bool demand, double probability) {
  Entry& entry = at(key);
  if (entry.slot >= 0) {
    if (entry.in_flight || entry.sections == kWhole)
      throw std::invalid_argument(name(key) + (entry.in_flight ? " is in flight already" : " is resident already"));
    entry.in_flight = true;
    ++num_in_flight_;
    return entry.slot;
  }
  const int number = class_of(key);
  std::vector<int64_t>& free = free_.at(size_t(number));
  int64_t slot;
  if (!free.empty()) {
    slot = free.back();
    free.pop_back();
  } else {
    const std::optional<ExpertKey> gives = victim(key, number, demand, probability);
    if (!gives) return -1;
    slot = remove(*gives);
  }
  Entry& mine = at(key);
  mine.slot = slot;
  mine.sections = 0;
  mine.in_flight = true;
  ++num_in_flight_;
  placed_.insert(key);
  const bool is_draft = std::exchange(mine.is_draft, false);
  policy_->admitted(key, !demand || is_draft);
  if (demand) {
    if (!is_draft) policy_->touched(key);
  } else {
    Counters::add<int64_t>(counters.prefetched, 1);
    mine.unused = true;
    protect(key, mine);
  }
  return slot;
}

void SlotTable::finish(const ExpertKey& key, int64_t sections) {
  Entry& entry = flying(key);
  entry.in_flight = false;
  entry.sections = sections;
  --num_in_flight_;
}

void SlotTable::fail(const ExpertKey& key) {
  flying(key).in_flight = false;
  --num_in_flight_;
  const int64_t slot = remove(key);
  free_[size_t(class_of_slot_[size_t(slot)])].push_back(slot);
}

bool SlotTable::can_begin(const ExpertKey& key, bool demand, double probability) {
  const int number = class_of(key);
  return has_slot(key) || !free_.at(size_t(number)).empty() || victim(key, number, demand, probability).has_value();
}

bool SlotTable::is_resident(const ExpertKey& key) const {
  const Entry& entry = find(key);
  return entry.slot >= 0 && !entry.in_flight;
}

int64_t SlotTable::slot_of(const ExpertKey& key) const {
  const int64_t slot = find(key).slot;
  if (slot < 0) throw MissingExpert(name(key));
  return slot;
}

int SlotTable::class_of(const ExpertKey& key) const {
  if (class_of_expert_.empty()) return last_class_;
  const auto known = class_of_expert_.find(key);
  return known == class_of_expert_.end() ? last_class_ : known->second;
}

std::vector<std::pair<ExpertKey, int64_t>> SlotTable::slots() const {
  std::vector<std::pair<ExpertKey, int64_t>> found;
  for (const ExpertKey& key : placed_) found.emplace_back(key, find(key).slot);
  return found;
}

std::string SlotTable::broken() const {
  std::vector<int> places(class_of_slot_.size());
  int64_t in_flight = 0;
  bool once = true, free_class = true, own_class = true, sections = true, held = true, layers = true, locks = true;
  const auto put = [&](int64_t slot) {
    if (slot < 0 || slot >= int64_t(places.size()))
      once = false;
    else
      once = once && ++places[size_t(slot)] == 1;
  };
  for (size_t number = 0; number < free_.size(); ++number)
    for (int64_t slot : free_[number]) {
      put(slot);
      free_class = free_class && class_of_slot_[size_t(slot)] == int(number);
    }
  for (size_t layer = 0; layer < entries_.size(); ++layer) {
    int64_t num_protected = 0;
    for (size_t expert = 0; expert < entries_[layer].size(); ++expert) {
      const Entry& entry = entries_[layer][expert];
      const ExpertKey key = {int64_t(layer), int64_t(expert)};
      num_protected += entry.is_protected;
      in_flight += entry.in_flight;
      locks = locks && entry.locks >= 0;
      held = held && (entry.slot >= 0) == (placed_.count(key) > 0);
      if (entry.slot < 0) {
        held = held && !entry.in_flight && !entry.is_protected && !entry.unused && !entry.sections;
        continue;
      }
      put(entry.slot);
      held = held && !entry.is_draft;
      own_class = own_class && class_of_slot_[size_t(entry.slot)] == class_of(key);
      sections = sections && entry.sections >= 0 && entry.sections <= kWhole && (entry.in_flight || entry.sections);
    }
    layers = layers && num_protected == num_protected_[layer];
  }
  once = once && std::all_of(places.begin(), places.end(), [](int count) { return count == 1; });
  std::string text;
  const auto say = [&](bool holds, const char* what) {
    if (!holds) text += (text.empty() ? "" : "; ") + std::string(what);
  };
  say(once, "every slot is in one place");
  say(free_class, "free slots are of their class");
  say(own_class, "an expert's slot is of its class");
  say(held && in_flight == num_in_flight_, "experts in flight, protected or unused have slots");
  say(sections, "sections are more than none and fewer than all");
  say(layers, "protected experts are counted");
  say(locks, "locks are counted");
  return text;
}

void SlotTable::spoil() { free_[0].push_back(0); }

SlotTable::Entry& SlotTable::at(const ExpertKey& key) {
  if (key.layer < 0 || key.expert < 0 || key.layer >= kMost || key.expert >= kMost) throw std::out_of_range(name(key));
  if (size_t(key.layer) >= entries_.size()) {
    entries_.resize(size_t(key.layer) + 1);
    num_protected_.resize(entries_.size());
  }
  std::vector<Entry>& of_layer = entries_[size_t(key.layer)];
  if (size_t(key.expert) >= of_layer.size()) of_layer.resize(size_t(key.expert) + 1);
  return of_layer[size_t(key.expert)];
}

const SlotTable::Entry& SlotTable::find(const ExpertKey& key) const {
  static const Entry missing;
  if (key.layer < 0 || size_t(key.layer) >= entries_.size()) return missing;
  const std::vector<Entry>& of_layer = entries_[size_t(key.layer)];
  return key.expert < 0 || size_t(key.expert) >= of_layer.size() ? missing : of_layer[size_t(key.expert)];
}

SlotTable::Entry& SlotTable::with_slot(const ExpertKey& key) {
  if (!has_slot(key)) throw MissingExpert(name(key));
  return at(key);
}

SlotTable::Entry& SlotTable::flying(const ExpertKey& key) {
  if (!is_in_flight(key)) throw MissingExpert(name(key));
  return at(key);
}

// The expert that gives `incoming` its slot, one of class `number`.
std::optional<ExpertKey> SlotTable::victim(const ExpertKey& incoming, int number, bool demand, double probability) {
  std::optional<ExpertKey> found = policy_->victim(incoming, Unlocked(*this, number, true), demand ? 1.0 : probability);
  if (!found && demand) found = policy_->victim(incoming, Unlocked(*this, number, false), 1.0);
  return found;
}

// Take the slot of an expert away.
int64_t SlotTable::remove(const ExpertKey& key) {
  policy_->removed(key);
  Entry& entry = with_slot(key);
  const int64_t slot = entry.slot;
  num_protected_[size_t(key.layer)] -= entry.is_protected;
  entry.slot = -1;
  entry.sections = 0;
  entry.is_protected = entry.unused = false;
  placed_.erase(key);
  return slot;
}

}  // namespace fate
