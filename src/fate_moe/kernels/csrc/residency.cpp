#include "residency.h"

#include <algorithm>
#include <chrono>
#include <numeric>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#include <unistd.h>
#endif

namespace fate {
namespace {

constexpr auto kPatience = std::chrono::milliseconds(50);  // then a thread that waits looks for signals

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

int64_t this_process() {
#if defined(__unix__) || defined(__APPLE__)
  return int64_t(getpid());
#else
  return 0;
#endif
}

// While it lives, this thread does not hold the interpreter's lock.
class Outside {
 public:
  Outside() : state_(Interpreter::get().leave()) {}
  ~Outside() { Interpreter::get().back(state_); }
  Outside(const Outside&) = delete;
  Outside& operator=(const Outside&) = delete;

 private:
  void* state_;
};

// Threads that begin meanwhile leave signals to the others.
class NoSignals {
 public:
#if defined(__unix__) || defined(__APPLE__)
  NoSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~NoSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
#endif
};

bool contains(const std::deque<ExpertKey>& queue, const ExpertKey& key) { return std::find(queue.begin(), queue.end(), key) != queue.end(); }

Interpreter no_interpreter;
Interpreter* interpreter = &no_interpreter;

}  // namespace

Interpreter& Interpreter::get() { return *interpreter; }
void Interpreter::set(Interpreter* other) { interpreter = other ? other : &no_interpreter; }

Residency::Residency(std::shared_ptr<Source> source, std::unique_ptr<Policy> policy, Slots slots, int num_threads)
    : source_(std::move(source)),
      table_(std::move(policy), slots.class_of, slots.class_of_expert, int64_t(slots.blob_bytes.size())),
      slots_(std::move(slots)),
      most_prefetching_(num_threads - 1),
      process_(this_process()) {
  const NoSignals none;
  try {
    for (int n = 0; n < num_threads; ++n) threads_.emplace_back([this] { run(); });
  } catch (...) {
    close();
    throw;
  }
}

Residency::~Residency() { close(); }

std::shared_ptr<Residency> Residency::make(std::shared_ptr<Source> source, std::unique_ptr<Policy> policy, Slots slots, int num_threads) {
  const auto end = [](Residency* one) {
    if (one->process_ == this_process()) delete one;  // in a fork's child locks and conditions are as threads left them that are not here
  };
  return {new Residency(std::move(source), std::move(policy), std::move(slots), num_threads), end};
}

// --- locking: whoever holds the interpreter's lock never waits for ours without giving it back, so those who hold ours may ask for it ---

void Residency::enter(Lock& lock) {
  while (!lock.try_lock()) {
    const Outside outside;  // its end may never come while the interpreter ends: the mutex is free by then
    lock.lock();
    lock.unlock();
  }
}

// Until `done()`, which is called with the lock held.
template <class Done>
void Residency::wait(Lock& lock, Done done) {
  while (!done()) {
    bool in_time;
    {
      const Outside outside;
      in_time = arrival_.wait_for(lock, kPatience, done);
      lock.unlock();
    }
    if (!in_time) Interpreter::get().check_signals();
    enter(lock);
  }
}

// --- what a step asks ---

void Residency::acquire(int64_t layer, const int64_t* experts, const int64_t* counts, int64_t n, int64_t num_rows, const void* inputs,
                        const int64_t* chosen, const float* weights) {
  if (current_) release(*std::exchange(current_, nullptr));
  layer_ = layer;
  ran_.clear();
  planes_.clear();
  const std::shared_ptr<Watcher> watcher = watcher_;
  if (!depths_.empty() && int64_t(depths_.size()) == num_rows) {
    chosen_ = chosen;
    top_k_ = std::accumulate(counts, counts + n, int64_t(0)) / num_rows;
  }
  try {
    current_ = watcher ? watcher->acquire(layer, experts, counts, n, num_rows, inputs, chosen, weights)
                       : lease(layer, experts, n, num_rows == 1 ? nullptr : counts, num_rows, nullptr);
  } catch (...) {
    chosen_ = nullptr;
    throw;
  }
  chosen_ = nullptr;
}

void Residency::hold_back(const std::vector<int64_t>& depths) {
  depths_ = depths;
  held_back_.clear();
}

void Residency::learn(const std::vector<bool>& kept) {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  const std::vector<int64_t> depths = std::exchange(depths_, {});
  const std::vector<Chosen> of_layers = std::exchange(held_back_, {});
  if (depths.size() != kept.size()) return;  // another step has come between
  const int64_t deepest = depths.empty() ? 0 : *std::max_element(depths.begin(), depths.end());
  for (int64_t depth = 1; depth <= deepest; ++depth) {
    std::vector<int64_t> rows;
    for (size_t row = 0; row < kept.size(); ++row)
      if (kept[row] && depths[row] == depth) rows.push_back(int64_t(row));
    if (rows.empty()) return;
    for (const Chosen& of : of_layers) teach_rows(of.layer, of.experts.data(), of.top_k, rows);
  }
}

// A lookup for a step with drafts, of which the rows that are none teach.
void Residency::route_rows(int64_t layer, const int64_t* experts, int64_t n, const int64_t* wanted, Found* found) {
  std::vector<int64_t> rows;
  for (size_t row = 0; row < depths_.size(); ++row)
    if (!depths_[row]) rows.push_back(int64_t(row));
  table_.draft(layer, experts, n);
  teach_rows(layer, chosen_, top_k_, rows);
  table_.look_up(layer, experts, n, wanted, found);
  held_back_.push_back({layer, top_k_, {chosen_, chosen_ + int64_t(depths_.size()) * top_k_}});
}

// As a step of these `rows` alone would: step.cpp has the order.
void Residency::teach_rows(int64_t layer, const int64_t* chosen, int64_t top_k, const std::vector<int64_t>& rows) {
  std::vector<std::pair<int64_t, int64_t>> found;  // experts and counts
  for (const int64_t row : rows)
    for (int64_t i = 0; i < top_k; ++i) {
      const int64_t expert = chosen[row * top_k + i];
      const auto known = std::find_if(found.begin(), found.end(), [&](const auto& one) { return one.first == expert; });
      if (known == found.end())
        found.emplace_back(expert, 1);
      else
        ++known->second;
    }
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
  std::vector<int64_t> experts, counts;
  for (const auto& [expert, count] : found) experts.push_back(expert), counts.push_back(count);
  table_.teach(layer, experts.data(), int64_t(experts.size()), rows.size() == 1 ? nullptr : counts.data(), int64_t(rows.size()));
}

int64_t Residency::arrived(Arrived* out) {
  if (!current_) return 0;
  const std::shared_ptr<Lease> lease = current_;
  int64_t count = 0;
  for (const Lease::Given& one : next(*lease)) {
    const int planes = one.sections >= kWhole ? 0 : int(one.sections - 1);  // scales and zeros are the section before planes
    out[count++] = {one.index, slots_.addresses[size_t(one.slot)], planes};
    ran_.push_back(lease->items[size_t(one.index)].key.expert);
    planes_.push_back(planes);
  }
  return count;
}

void Residency::release() {
  const std::shared_ptr<Lease> lease = std::exchange(current_, nullptr);
  if (!lease) return;
  release(*lease);
  if (ran_.size() != lease->items.size()) return;  // it was cut short
  const std::shared_ptr<Watcher> watcher = watcher_;
  if (watcher) watcher->ran(layer_, ran_, planes_);
  if (!(watcher && watcher->counts_uses()) && uses_ && layer_ >= 0 && layer_ + 1 < int64_t(first_use_.size())) {
    for (int64_t expert : ran_)
      if (first_use_[size_t(layer_)] + expert < first_use_[size_t(layer_) + 1]) ++uses_[first_use_[size_t(layer_)] + expert];
  }
}

// --- leases ---

std::shared_ptr<Lease> Residency::lease(int64_t layer, const int64_t* experts, int64_t n, const int64_t* counts, int64_t num_tokens,
                                        const int64_t* wanted) {
  auto made = std::make_shared<Lease>();
  std::vector<Found> found(static_cast<size_t>(n));
  made->items.reserve(size_t(n));
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  if (closed_) throw ClosedMemory("");
  if (chosen_)
    route_rows(layer, experts, n, wanted, found.data());
  else
    table_.route(layer, experts, n, counts, num_tokens, wanted, found.data());
  made->generation = generation_;
  made->asked = now();
  for (int64_t i = 0; i < n; ++i) {
    const ExpertKey key = {layer, experts[i]};
    table_.lock(key);
    made->items.push_back({key, found[size_t(i)], wanted ? wanted[i] : kWhole, true});
    if (found[size_t(i)] == Found::hit) continue;
    ++made->missing;
    waiting_[key].push_back({made, i});
    if (found[size_t(i)] != Found::miss) continue;
    queue_demand(key);
    if (most_missed_) missed_.push_back(key);
    if (int64_t(missed_.size()) > most_missed_) missed_.pop_front();
  }
  if (n) cancel(layer);
  slot_freed();
  return made;
}

const std::vector<Lease::Given>& Residency::next(Lease& lease) {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  if (!lease.began) {
    lease.began = true;
    for (size_t i = 0; i < lease.items.size(); ++i)
      if (lease.items[i].found == Found::hit) lease.given.push_back(given(lease, int64_t(i)));
    return lease.given;
  }
  for (const Lease::Given& one : lease.given) unlock(lease, lease.items[size_t(one.index)]);
  if (!lease.given.empty()) slot_freed();
  lease.given.clear();
  if (!lease.missing) return lease.given;
  do {
    const int64_t index = wait_for(lease, lock);
    --lease.missing;
    lease.given.push_back(given(lease, index));
  } while (!lease.arrived.empty());
  return lease.given;
}

bool Residency::next_one(Lease& lease, Lease::Given& one) {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  for (size_t& i = lease.hits_seen; i < lease.items.size(); ++i)
    if (lease.items[i].found == Found::hit) {
      one = given(lease, int64_t(i++));
      return true;
    }
  if (!lease.missing) return false;
  one = given(lease, wait_for(lease, lock));
  --lease.missing;
  return true;
}

void Residency::release(Lease& lease) {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  bool any = false;
  for (Lease::Item& item : lease.items) {
    any = any || item.held;
    unlock(lease, item);
  }
  if (any) slot_freed();
}

// A pass was cut short, wherever it was: nothing is locked or awaited any more.
void Residency::forget_leases() {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  table_.unlock_all();
  waiting_.clear();
  demands_.clear();
  ++generation_;
  current_.reset();
  hold_back({});
  slot_freed();
  arrival_.notify_all();
}

Lease::Given Residency::given(const Lease& lease, int64_t index) const {
  const ExpertKey& key = lease.items[size_t(index)].key;
  return {index, table_.slot_of(key), table_.sections_of(key)};
}

// The next one to arrive; the wait is a stall.
int64_t Residency::wait_for(Lease& lease, Lock& lock) {
  if (lease.asked) {
    Counters::add(table_.counters.overlap_seconds, now() - lease.asked);
    lease.asked = 0;
  }
  if (lease.arrived.empty()) {
    const double began = now();
    wait(lock, [&] { return !lease.arrived.empty() || closed_ || lease.generation != generation_; });
    if (lease.arrived.empty()) throw ClosedMemory("");
    Counters::add(table_.counters.stall_seconds, now() - began);
  }
  const Lease::Arrival first = lease.arrived.front();
  lease.arrived.pop_front();
  if (first.error) std::rethrow_exception(first.error);
  return first.index;
}

void Residency::unlock(Lease& lease, Lease::Item& item) {
  if (!item.held) return;
  item.held = false;
  if (lease.generation != generation_) return;  // forgotten meanwhile
  table_.unlock(item.key);
  const auto waiting = waiting_.find(item.key);
  if (waiting == waiting_.end()) return;
  std::vector<Waiter>& of = waiting->second;
  const auto mine = std::find_if(of.begin(), of.end(), [&](const Waiter& one) { return one.lease.get() == &lease; });
  if (mine == of.end()) return;
  of.erase(mine);
  if (!of.empty()) return;
  waiting_.erase(waiting);
  withdraw(item.key);
}

// --- expectations and questions ---

int64_t Residency::prefetch(const std::vector<ExpertKey>& expected, int64_t most, const std::vector<double>* probabilities) {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  if (closed_) return 0;
  std::vector<size_t> absent;
  for (size_t i = 0; i < expected.size(); ++i)
    if (table_.expect(expected[i])) absent.push_back(i);
  int64_t queued = 0;
  for (size_t i : absent) {
    if (most >= 0 && queued >= most) break;
    if (!queue_prefetch(expected[i])) continue;
    ++queued;
    if (probabilities) probability_[expected[i]] = probabilities->at(i);
  }
  return queued;
}

void Residency::cancel_prefetches() {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  prefetches_.clear();
  arrival_.notify_all();
}

std::vector<bool> Residency::missing(const std::vector<ExpertKey>& keys) {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  std::vector<bool> found;
  for (const ExpertKey& key : keys) found.push_back(!table_.has_slot(key));
  return found;
}

bool Residency::holds_all() {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  return table_.holds_all();
}

bool Residency::is_ready(const ExpertKey& key) {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  return table_.is_resident(key);
}

int64_t Residency::slot_of(const ExpertKey& key) {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  return table_.slot_of(key);
}

int64_t Residency::held(const ExpertKey& key) {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  return table_.sections_of(key);
}

std::vector<ExpertKey> Residency::resident() {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  std::vector<ExpertKey> found;
  for (const auto& [key, slot] : table_.slots())
    if (!table_.is_in_flight(key)) found.push_back(key);
  return found;
}

void Residency::wait_idle() {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  wait(lock, [&] {
    Next next;
    return !table_.num_in_flight() && !comes_next(false, next);
  });
}

void Residency::close() {
  if (process_ != this_process()) return;
  std::vector<std::thread> threads;
  {
    Lock lock(mutex_, std::defer_lock);
    enter(lock);
    closed_ = true;
    demands_.clear();
    prefetches_.clear();
    threads.swap(threads_);
    work_.notify_all();
  }
  {
    const Outside outside;
    for (std::thread& thread : threads) thread.join();
  }
  slots_.owner.reset();
  arrival_.notify_all();
}

std::string Residency::broken() {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  std::string text = table_.broken();
  if (!text.empty()) return "slot table: not so: " + text;
  bool locked = true, short_of = true, coming = true;
  for (const auto& [key, waiters] : waiting_) {
    locked = locked && table_.is_locked(key);
    const int64_t held = table_.sections_of(key);
    short_of = short_of && !(table_.is_resident(key) && std::all_of(waiters.begin(), waiters.end(), [&](const Waiter& one) {
                               return one.lease->items[size_t(one.index)].wanted <= held;
                             }));
    coming = coming && (table_.is_in_flight(key) || contains(demands_, key));
  }
  if (!locked) text += "; leases wait for what they have locked";
  if (!short_of) text += "; no lease waits for what is resident with enough sections";
  if (!coming) text += "; what leases wait for is queued or in flight";
  return text.empty() ? text : "residency: not so: " + text.substr(2);
}

void Residency::spoil() {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  table_.spoil();
}

void Residency::write_journal(bool write) {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  writes_journal_ = write;
  if (!write) journal_.clear();
}

std::vector<ReadRecord> Residency::take_journal() {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  return std::exchange(journal_, {});
}

void Residency::write_missed(int64_t most) {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  most_missed_ = most;
  missed_.clear();
}

std::vector<ExpertKey> Residency::take_missed() {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  const std::vector<ExpertKey> found(missed_.begin(), missed_.end());
  missed_.clear();
  return found;
}

void Residency::set_source(std::shared_ptr<Source> source) {
  Lock lock(mutex_, std::defer_lock);
  enter(lock);
  source_.swap(source);
}

void Residency::watch(std::shared_ptr<Watcher> watcher) { watcher_ = std::move(watcher); }

void Residency::count_uses(int64_t* uses, std::vector<int64_t> first, std::shared_ptr<void> owner) {
  uses_ = uses;
  owner_of_uses_ = std::move(owner);
  first_use_ = std::move(first);
}

// --- the reading threads: the lock is held but for the read itself ---

void Residency::run() {
  Lock lock(mutex_);
  while (!closed_) {
    Next next;
    try {
      if (!take(next)) {
        work_.wait(lock);
        continue;
      }
    } catch (...) {  // a policy that breaks its contract: nobody could be told
      const std::exception_ptr error = std::current_exception();
      lock.unlock();
      complain({-1, -1}, error);
      return;
    }
    prefetching_ += !next.demand;
    slot_freed();  // several may have become evictable at once: wake the next thread too
    read(next, lock);
    prefetching_ -= !next.demand;
  }
}

bool Residency::take(Next& next) {
  if (demands_.empty() && (prefetches_.empty() || prefetching_ >= most_prefetching_)) return false;
  return comes_next(true, next);
}

// What comes next of all that can be given a slot: demands strictly before prefetches, and of those that wait for the same slots (a lane:
// the class; who has a slot already waits for none) only the first is asked about. No prefetch begins while a lease waits for a read:
// they would share the link.
bool Residency::comes_next(bool begin, Next& next) {
  const bool demand = !demands_.empty();
  std::deque<ExpertKey>& queue = demand ? demands_ : prefetches_;
  if (!demand && !waiting_.empty()) return false;
  std::vector<int> lanes;
  for (auto at = queue.begin(); at != queue.end(); ++at) {
    const ExpertKey key = *at;
    const int lane = table_.is_resident(key) ? -1 : table_.class_of(key);
    if (std::find(lanes.begin(), lanes.end(), lane) != lanes.end()) continue;
    const auto known = demand ? probability_.end() : probability_.find(key);
    const double probability = known == probability_.end() ? 1.0 : known->second;
    if (!begin) {
      if (table_.can_begin(key, demand, probability)) return true;
    } else {
      const bool first_in_flight = !table_.num_in_flight();
      const int64_t slot = table_.begin(key, demand, probability);
      if (slot >= 0) {
        if (first_in_flight) link_since_ = now();
        queue.erase(at);
        next = {key, demand, slot};
        return true;
      }
    }
    lanes.push_back(lane);
  }
  return false;
}

void Residency::read(const Next& next, Lock& lock) {
  const double began = now();
  const int64_t first = table_.sections_of(next.key);
  int64_t last = kWhole, num_bytes = 0;
  if (const auto waiting = waiting_.find(next.key); next.demand && waiting != waiting_.end() && !waiting->second.empty()) {
    last = 0;
    for (const Waiter& one : waiting->second) last = std::max(last, one.lease->items[size_t(one.index)].wanted);
  }
  std::shared_ptr<Source> source = source_;
  std::exception_ptr error;
  lock.unlock();
  try {
    num_bytes = source->read(next.key, next.slot, reinterpret_cast<uint8_t*>(slots_.addresses[size_t(next.slot)]), first, last);
  } catch (...) {  // raised again in the thread that waits for it
    error = std::current_exception();
  }
  source.reset();
  lock.lock();
  if (end(next, first, last, num_bytes, began, error)) {
    lock.unlock();
    complain(next.key, error);
    lock.lock();
  }
}

void Residency::complain(const ExpertKey& key, const std::exception_ptr& error) {
  try {
    if (complaint_) complaint_(key, error);
  } catch (...) {  // there is nobody left to hear it
  }
}

// Whether it is a failure that nobody waits for.
bool Residency::end(const Next& next, int64_t first, int64_t last, int64_t num_bytes, double began, const std::exception_ptr& error) {
  const ExpertKey& key = next.key;
  const double ended = now();
  double seconds = ended - link_since_;
  bool unheard = false;
  link_since_ = ended;
  if (!error) {
    table_.finish(key, last);
    Counters::add(table_.counters.bytes_read, num_bytes);
    Counters::add(table_.counters.link_seconds, seconds);
    if (writes_journal_) journal_.push_back({key, next.demand, began, ended});
    if (last != kWhole || first) {
      const auto known = slots_.blob_bytes.find(key);
      const int64_t length = known == slots_.blob_bytes.end() ? slots_.longest : known->second;
      if (num_bytes) seconds *= double(length) / double(num_bytes);  // what all of it would have taken
    }
    const double before = read_seconds();
    read_seconds_.store(before ? before + 0.1 * (seconds - before) : seconds, std::memory_order_relaxed);
  } else {
    table_.fail(key);
  }
  const auto waiting = waiting_.find(key);
  if (error && !next.demand) {
    if (waiting != waiting_.end())
      queue_demand(key);  // only a prefetch failed: leases that wait for it get one read of their own
    else
      unheard = true;
  } else if (waiting != waiting_.end()) {
    std::vector<Waiter> waiters = std::move(waiting->second), short_of;
    waiting_.erase(waiting);
    for (Waiter& one : waiters) {
      if (!error && one.lease->items[size_t(one.index)].wanted > last)
        short_of.push_back(std::move(one));  // it came after this read had begun and wants more sections than that brought
      else
        one.lease->arrived.push_back({one.index, error});
    }
    if (!short_of.empty()) {
      waiting_[key] = std::move(short_of);
      queue_demand(key);
    }
  }
  slot_freed();
  arrival_.notify_all();
  return unheard;
}

// --- the queue ---

// A queued prefetch of the same expert becomes a demand.
void Residency::queue_demand(const ExpertKey& key) {
  prefetches_.erase(std::remove(prefetches_.begin(), prefetches_.end(), key), prefetches_.end());
  if (!contains(demands_, key)) demands_.push_back(key);
  work_.notify_one();
}

// False also where there is no thread to spare for prefetches.
bool Residency::queue_prefetch(const ExpertKey& key) {
  if (!most_prefetching_ || contains(prefetches_, key) || contains(demands_, key)) return false;
  prefetches_.push_back(key);
  work_.notify_one();
  return true;
}

void Residency::withdraw(const ExpertKey& key) { demands_.erase(std::remove(demands_.begin(), demands_.end(), key), demands_.end()); }

void Residency::cancel(int64_t layer) {
  const auto of_layer = [&](const ExpertKey& key) { return key.layer == layer; };
  prefetches_.erase(std::remove_if(prefetches_.begin(), prefetches_.end(), of_layer), prefetches_.end());
}

// A slot may have become free or evictable.
void Residency::slot_freed() {
  if (!demands_.empty() || !prefetches_.empty()) work_.notify_one();
}

}  // namespace fate
