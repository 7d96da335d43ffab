// Experts in memory: a table of slots, the threads that fill them, and the leases of those that compute. memory/residency.py is its face,
// memory/portable.py its twin.
#pragma once
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <memory>
#include <thread>

#include "expert_memory.h"
#include "table.h"

namespace fate {

// What the interpreter has to do with waiting. This one: nothing; the module puts in its own.
class Interpreter {
 public:
  virtual ~Interpreter() = default;
  virtual void* leave() { return nullptr; }  // give its lock back, if this thread holds it
  virtual void back(void*) {}                // undo `leave`
  virtual void check_signals() {}            // throws what a signal's handler raised

  static Interpreter& get();
  static void set(Interpreter* other);
};

// core.ExpertSource. Reads sections `first` up to but without `last` (kWhole: to the end) into `slot`, whose bytes begin at `memory`;
// the bytes read. Called from several threads at once.
class Source {
 public:
  virtual ~Source() = default;
  virtual int64_t read(const ExpertKey& key, int64_t slot, uint8_t* memory, int64_t first, int64_t last) = 0;
};

// The residency is closed; a read failed, as errors.StoreError says.
struct ClosedMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct StoreFailure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A read that ended; seconds of steady_clock, as time.perf_counter.
struct ReadRecord {
  ExpertKey key;
  bool demand;
  double began, ended;
};

// Experts that are locked for use.
struct Lease {
  struct Item {
    ExpertKey key;
    Found found;
    int64_t wanted;  // sections that are enough
    bool held;       // not unlocked yet
  };
  struct Arrival {
    int64_t index;
    std::exception_ptr error;
  };
  struct Given {
    int64_t index, slot, sections;  // sections: that the slot holds
  };
  std::vector<Item> items;
  std::deque<Arrival> arrived;
  double asked = 0;       // when; 0 once what was missing has been needed
  int64_t generation = 0; // of Residency::forget_leases
  int64_t missing = 0;    // still to be given to whoever iterates
  bool began = false;     // those that were resident have been given
  size_t hits_seen = 0;   // items that `next_one` has passed
  std::vector<Given> given;  // by the last `next`
};

// Called instead of looking up, by those who want to see what is routed: predictors, precision policies, observers.
class Watcher {
 public:
  virtual ~Watcher() = default;
  virtual std::shared_ptr<Lease> acquire(int64_t layer, const int64_t* experts, const int64_t* counts, int64_t n, int64_t num_rows,
                                         const void* inputs, const int64_t* chosen, const float* weights) = 0;
  // `layer` has run these experts, with so many planes (0: all).
  virtual void ran(int64_t layer, const std::vector<int64_t>& experts, const std::vector<int64_t>& num_planes) = 0;
  virtual bool counts_uses() const { return true; }  // so that the residency does not
};

class Residency final : public ExpertMemory, public std::enable_shared_from_this<Residency> {
 public:
  struct Slots {
    std::vector<int> class_of;         // [num_slots]
    std::vector<uint64_t> addresses;   // [num_slots]
    int64_t longest;                   // bytes of the longest slots
    SlotTable::Classes class_of_expert;
    std::unordered_map<ExpertKey, int64_t, HashKey> blob_bytes;  // of each expert; none: all are as long as the longest slots
    std::shared_ptr<void> owner;       // of the memory
  };

  static std::shared_ptr<Residency> make(std::shared_ptr<Source> source, std::unique_ptr<Policy> policy, Slots slots, int num_threads);
  ~Residency() override;

  // What a step asks (expert_memory.h).
  void acquire(int64_t layer, const int64_t* experts, const int64_t* counts, int64_t n, int64_t num_rows, const void* inputs,
               const int64_t* chosen, const float* weights) override;
  int64_t arrived(Arrived* out) override;
  void release() override;
  void hold_back(const std::vector<int64_t>& depths) override;
  // Of the drafts of the last step, those that are `kept` (by row) were right: teach what they chose, as if they had come one by one.
  void learn(const std::vector<bool>& kept);

  // Leases. `wanted` null: all sections.
  std::shared_ptr<Lease> lease(int64_t layer, const int64_t* experts, int64_t n, const int64_t* counts, int64_t num_tokens, const int64_t* wanted);
  // The items that were resident, then those that have arrived; what the call before gave is unlocked. Empty: there are no more.
  const std::vector<Lease::Given>& next(Lease& lease);
  bool next_one(Lease& lease, Lease::Given& given);  // the next one; false: there are no more. All stay locked
  void release(Lease& lease);
  void forget_leases();

  int64_t prefetch(const std::vector<ExpertKey>& expected, int64_t most, const std::vector<double>* probabilities);
  void cancel_prefetches();
  std::vector<bool> missing(const std::vector<ExpertKey>& keys);
  bool holds_all();
  bool is_ready(const ExpertKey& key);
  int64_t slot_of(const ExpertKey& key);
  int64_t held(const ExpertKey& key);
  std::vector<ExpertKey> resident();
  void wait_idle();
  void close();
  std::string broken();
  void spoil();

  double read_seconds() const { return read_seconds_.load(std::memory_order_relaxed); }
  Counters& counters() { return table_.counters; }
  void write_journal(bool write);
  std::vector<ReadRecord> take_journal();
  void write_missed(int64_t most);  // 0: none
  std::vector<ExpertKey> take_missed();
  void set_source(std::shared_ptr<Source> source);
  void watch(std::shared_ptr<Watcher> watcher);
  // uses[first[layer] + expert] counts how often `release` found an expert computed with all that it has.
  void count_uses(int64_t* uses, std::vector<int64_t> first, std::shared_ptr<void> owner);
  void set_complaint(std::function<void(const ExpertKey&, std::exception_ptr)> complaint) { complaint_ = std::move(complaint); }

 private:
  Residency(std::shared_ptr<Source> source, std::unique_ptr<Policy> policy, Slots slots, int num_threads);

  struct Waiter {
    std::shared_ptr<Lease> lease;
    int64_t index;
  };
  struct Next {
    ExpertKey key;
    bool demand;
    int64_t slot;
  };
  using Lock = std::unique_lock<std::mutex>;

  void enter(Lock& lock);
  template <class Done>
  void wait(Lock& lock, Done done);
  int64_t wait_for(Lease& lease, Lock& lock);
  Lease::Given given(const Lease& lease, int64_t index) const;
  void unlock(Lease& lease, Lease::Item& item);
  void route_rows(int64_t layer, const int64_t* experts, int64_t n, const int64_t* wanted, Found* found);
  void teach_rows(int64_t layer, const int64_t* chosen, int64_t top_k, const std::vector<int64_t>& rows);
  void run();
  bool take(Next& next);
  bool comes_next(bool begin, Next& next);
  void read(const Next& next, Lock& lock);
  bool end(const Next& next, int64_t first, int64_t last, int64_t num_bytes, double began, const std::exception_ptr& error);
  void complain(const ExpertKey& key, const std::exception_ptr& error);
  void queue_demand(const ExpertKey& key);
  bool queue_prefetch(const ExpertKey& key);
  void withdraw(const ExpertKey& key);
  void cancel(int64_t layer);
  void slot_freed();

  std::shared_ptr<Source> source_;
  SlotTable table_;
  Slots slots_;
  std::mutex mutex_;
  std::condition_variable work_, arrival_;
  std::deque<ExpertKey> demands_, prefetches_;
  std::unordered_map<ExpertKey, std::vector<Waiter>, HashKey> waiting_;  // for an arrival
  std::unordered_map<ExpertKey, double, HashKey> probability_;           // of queued prefetches
  double link_since_ = 0;  // when the reads under way began, or the last one of them ended
  std::atomic<double> read_seconds_{0};
  int prefetching_ = 0;
  const int most_prefetching_;
  int64_t generation_ = 0;
  bool closed_ = false, writes_journal_ = false;
  std::vector<ReadRecord> journal_;
  std::deque<ExpertKey> missed_;
  int64_t most_missed_ = 0;
  std::function<void(const ExpertKey&, std::exception_ptr)> complaint_;
  std::shared_ptr<Watcher> watcher_;
  std::shared_ptr<Lease> current_;  // of the step
  int64_t layer_ = 0;
  std::vector<int64_t> ran_, planes_;
  struct Chosen {  // by all rows of a step, in one layer
    int64_t layer, top_k;
    std::vector<int64_t> experts;
  };
  std::vector<int64_t> depths_;          // of the rows of a step with drafts
  std::vector<Chosen> held_back_;        // of that step
  const int64_t* chosen_ = nullptr;      // while `acquire` of a step with drafts runs
  int64_t top_k_ = 0;
  int64_t* uses_ = nullptr;
  std::shared_ptr<void> owner_of_uses_;
  std::vector<int64_t> first_use_;
  int64_t process_ = 0;  // a fork's child has none of the threads
  std::vector<std::thread> threads_;
};

}  // namespace fate
