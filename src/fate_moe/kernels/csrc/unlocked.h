// Work without the interpreter's lock, by threads that may outlive the interpreter.
#pragma once
#include <Python.h>

#include <atomic>
#include <chrono>
#include <thread>

namespace fate {

// Meanwhile other threads run Python. As nanobind's gil_scoped_release, but a daemon thread that comes back when the interpreter ends
// waits for the end of the process: CPython before 3.14 would end it by unwinding its stack, which no destructor allows.
class Unlocked {
 public:
  Unlocked() : state_(leave()) {}
  ~Unlocked() { back(state_); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

  // Its two halves, for what cannot be a scope.
  static PyThreadState* leave() {
    PyThreadState* const state = PyEval_SaveThread();
    stay_if_ending();
    return state;
  }
  static void back(PyThreadState* state) {
    ++returning();
    if (ends_for_others()) {
      --returning();
      stay_if_ending();
    }
    PyEval_RestoreThread(state);
    --returning();
  }

  // Called with the lock as the last thing before the interpreter ends: other threads do not come back to it from here on. Those that
  // wait for the lock already get it, and stay at their next call.
  static void end() {
    ender() = std::this_thread::get_id();
    ending() = true;
    for (int i = 0; i < 1000 && returning() > 0; ++i) {
      PyThreadState* const state = PyEval_SaveThread();
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      PyEval_RestoreThread(state);
    }
  }

 private:
  static std::atomic<bool>& ending() {
    static std::atomic<bool> of_process{false};
    return of_process;
  }
  static std::atomic<int>& returning() {
    static std::atomic<int> of_process{0};
    return of_process;
  }
  static std::thread::id& ender() {
    static std::thread::id of_process;
    return of_process;
  }
  static bool ends_for_others() { return ending() && std::this_thread::get_id() != ender(); }
  static void stay_if_ending() {
    while (ends_for_others()) std::this_thread::sleep_for(std::chrono::hours(1));
  }

  PyThreadState* const state_;
};

}  // namespace fate
