// A team of threads: torch's own where torch brought GNU OpenMP into the process, so that there are never twice as many threads as
// cores; elsewhere a small pool.
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

// Runs body(data) on this thread. The threads of a team wait beside it, so that each run_team in it begins at once; a thread that
// waits long sleeps, and one that comes late is not waited for. Bodies of run_team must not throw.
void run_session(int num_threads, Body body, void* data);

// "OpenMP of the process" or "own threads".
const char* team_name();

// Tells the processor that this thread spins on a word that another thread will write.
inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Work in phases, the next begins when all of one's tasks are done. Each thread takes tasks of a run of its own, one after the other: rows
// that follow one another in memory, which the processor reads ahead. Taken in turn by two threads they come at 22 instead of 27 GB/s
// (2 vCPU of a Xeon, INT4, tasks of 96 KiB). A thread that has finished its run takes tasks from the others' runs.
class Phases {
 public:
  static constexpr int kMost = 11, kMostRuns = 16;

  explicit Phases(int num_threads) : runs_(num_threads < 1 ? 1 : num_threads > kMostRuns ? kMostRuns : num_threads) {}

  template <class Task>
  void each(int phase, int64_t count, Task task) {
    if (count == 0) return;
    const int first = entered_[phase].fetch_add(1, std::memory_order_relaxed);
    for (int i = 0; i < runs_; ++i) {
      const int64_t run = (first + i) % runs_, begin = count * run / runs_, end = count * (run + 1) / runs_;
      Run& of = of_[phase][run];
      int64_t index;
      while ((index = begin + of.next.fetch_add(1, std::memory_order_relaxed)) < end) {
        task(index);
        of.done.fetch_add(1, std::memory_order_release);
      }
    }
    for (int spins = 0; done(phase) < count; ++spins) {
      if (spins < 2000) {
        pause();
      } else {
        std::this_thread::yield();  // the thread with the last task may have lost its core to a reading thread
      }
    }
  }

 private:
  struct alignas(64) Run {  // a cache line each: a counter that goes from core to core costs both of them 5 % of a product
    std::atomic<int64_t> next{0}, done{0};
  };

  int64_t done(int phase) const {
    int64_t sum = 0;
    for (int run = 0; run < runs_; ++run) sum += of_[phase][run].done.load(std::memory_order_acquire);
    return sum;
  }

  const int runs_;
  std::atomic<int> entered_[kMost] = {};
  Run of_[kMost][kMostRuns];
};

template <class Work>
void run_phases(int num_threads, Work& work) {
  run_team(num_threads, [](void* data) { (*static_cast<Work*>(data))(); }, &work);
}

template <class Work>
void run_together(int num_threads, Work& work) {
  run_session(num_threads, [](void* data) { (*static_cast<Work*>(data))(); }, &work);
}

}  // namespace fate
