#include "threads.h"

#include <dlfcn.h>

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

}  // namespace

void run_team(int num_threads, Body body, void* data) {
  if (num_threads <= 1) return body(data);
  if (const GompParallel parallel = find_gomp()) return parallel(body, data, unsigned(num_threads), 0);
  static Pool* const pool = new Pool;
  pool->run(num_threads, body, data);
}

const char* team_name() { return find_gomp() ? "OpenMP of the process" : "own threads"; }

}  // namespace fate
