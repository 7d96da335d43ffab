// A team of threads that is torch's own: where torch brought GNU OpenMP into the process, its threads are asked for, so that there
// are never twice as many as cores. Elsewhere a small pool.
#pragma once
#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <thread>

namespace fate {

using Body = void (*)(void* data);

// Runs body(data) on up to num_threads threads at once, this one among them, and waits for all. The body must get along with any
// number of threads, even one.
void run_team(int num_threads, Body body, void* data);

// "OpenMP of the process" or "own threads".
const char* team_name();

// Tells the processor that this thread waits for another's word.
inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Work in phases: each phase's tasks are taken by whoever is free, and the next begins when all are done.
class Phases {
 public:
  static constexpr int kMost = 8;

  template <class Task>
  void each(int phase, int64_t count, Task task) {
    int64_t index;
    while ((index = next_[phase].fetch_add(1, std::memory_order_relaxed)) < count) {
      task(index);
      done_[phase].fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; done_[phase].load(std::memory_order_acquire) < count; ++spins) {
      if (spins < 2000) {
        pause();
      } else {
        std::this_thread::yield();  // who holds the last task may have lost its core to a reading thread
      }
    }
  }

 private:
  std::atomic<int64_t> next_[kMost] = {}, done_[kMost] = {};
};

template <class Work>
void run_phases(int num_threads, Work& work) {
  run_team(num_threads, [](void* data) { (*static_cast<Work*>(data))(); }, &work);
}

}  // namespace fate
