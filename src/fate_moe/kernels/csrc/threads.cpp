#include "threads.h"

#include <dlfcn.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <vector>

namespace fate {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_gomp() {
  static const GompParallel found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

// Threads that sleep between calls. Made on first use and never joined: they hold nothing, and the process may end any time.
class Pool {
 public:
  void run(int num_threads, Body body, void* data) {
    const std::lock_guard<std::mutex> one_at_a_time(calls_);
    std::unique_lock<std::mutex> lock(mutex_);
    while (int(threads_.size()) < num_threads - 1) {
      threads_.emplace_back([this] { serve(); });
      threads_.back().detach();
    }
    body_ = body, data_ = data, wanted_ = num_threads - 1, running_ = 0;
    wake_.notify_all();
    lock.unlock();
    body(data);
    lock.lock();
    wanted_ = 0;
    idle_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_, ++running_;
      const Body body = body_;
      void* const data = data_;
      lock.unlock();
      body(data);
      lock.lock();
      if (--running_ == 0) idle_.notify_all();
    }
  }

  std::mutex calls_, mutex_;
  std::condition_variable wake_, idle_;
  std::vector<std::thread> threads_;
  Body body_ = nullptr;
  void* data_ = nullptr;
  int wanted_ = 0, running_ = 0;
};

// Work that a leader gives to threads that stay with it. `state_` counts calls, says whether the last one may still be joined, and how
// many threads have joined it and not left.
class Session {
 public:
  void lead(Body body, void* data) {
    body_ = body, data_ = data;
    const uint64_t call = (state_.load(std::memory_order_relaxed) / kCall + 1) * kCall;
    state_.store(call + kOpen);
    if (asleep_.load() > 0) wake();
    body(data);
    state_.fetch_sub(kOpen);
    for (int spins = 0; state_.load(std::memory_order_acquire) != call; ++spins) spins < kSpins ? pause() : std::this_thread::yield();
  }

  void follow() {
    uint64_t seen = 0;
    for (int spins = 0;;) {
      uint64_t state = state_.load(std::memory_order_acquire);
      if (over_.load(std::memory_order_acquire)) return;
      if (state / kCall != seen && (state & kOpen)) {
        if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
        seen = state / kCall;
        body_(data_);
        state_.fetch_sub(1, std::memory_order_release);
        spins = 0;
      } else if (++spins < kSpins) {
        pause();
      } else {
        sleep(seen);
        spins = 0;
      }
    }
  }

  void end() {
    over_.store(true);
    wake();
  }

 private:
  static constexpr uint64_t kCall = uint64_t(1) << 32, kOpen = uint64_t(1) << 31;
  static constexpr int kSpins = 1500;  // 20 to 70 us: longer than what a leader does alone between two calls, shorter than a read

  void wake() {
    const std::lock_guard<std::mutex> lock(mutex_);
    woken_.notify_all();
  }

  void sleep(uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    ++asleep_;
    woken_.wait(lock, [&] {
      const uint64_t state = state_.load();
      return over_.load() || (state / kCall != seen && (state & kOpen));
    });
    --asleep_;
  }

  std::atomic<uint64_t> state_{0};
  std::atomic<bool> over_{false};
  std::atomic<int> asleep_{0};
  Body body_ = nullptr;
  void* data_ = nullptr;
  std::mutex mutex_;
  std::condition_variable woken_;
};

thread_local Session* session = nullptr;  // that this thread leads

void begin_team(int num_threads, Body body, void* data) {
  if (const GompParallel parallel = find_gomp()) return parallel(body, data, unsigned(num_threads), 0);
  static Pool* const pool = new Pool;
  pool->run(num_threads, body, data);
}

}  // namespace

void run_session(int num_threads, Body body, void* data) {
  if (num_threads <= 1 || session) return body(data);
  struct Led {
    Session of;
    std::thread::id leader;
    Body body;
    void* data;
  } led{{}, std::this_thread::get_id(), body, data};
  begin_team(num_threads, [](void* given) {
    Led& led = *static_cast<Led*>(given);
    if (std::this_thread::get_id() != led.leader) return led.of.follow();
    session = &led.of;
    led.body(led.data);
    session = nullptr;
    led.of.end();
  }, &led);
}

void run_team(int num_threads, Body body, void* data) {
  if (num_threads <= 1) return body(data);
  if (session) return session->lead(body, data);
  begin_team(num_threads, body, data);
}

const char* team_name() { return find_gomp() ? "OpenMP of the process" : "own threads"; }

}  // namespace fate
