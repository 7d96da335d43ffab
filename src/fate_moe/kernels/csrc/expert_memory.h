// What a step asks of the experts' memory.
#pragma once
#include <cstdint>
#include <vector>

namespace fate {

// One step uses it at a time, from one thread, without the interpreter's lock. Calls throw what cannot be done or read; `release` has
// to be called all the same.
class ExpertMemory {
 public:
  struct Arrived {
    int64_t index;     // among the experts of `acquire`
    uint64_t address;  // of its blob
    int num_planes;    // to compute with; 0: all
  };

  virtual ~ExpertMemory() = default;

  // A step begins. `depths` by row: how far behind its text's last token a drafted one is, 0 for what is no draft. What drafts choose is
  // read and computed as all else, and teaches nothing until somebody says that they are right. Empty: there are none.
  virtual void hold_back(const std::vector<int64_t>& depths) { (void)depths; }

  // The routers of MoE block `layer` chose the n distinct `experts`, for `counts` of num_rows rows. They are looked up, counted and
  // locked; reads of those that are missing begin. `inputs` bf16 [num_rows, hidden] is what the routers were given, `chosen` and
  // `weights` [num_rows, top_k] what they said: for prediction of later blocks, views of fewer planes and observers.
  virtual void acquire(int64_t layer, const int64_t* experts, const int64_t* counts, int64_t n, int64_t num_rows, const void* inputs,
                       const int64_t* chosen, const float* weights) = 0;

  // Experts that are there, to `out` [n]; how many. The first call gives all that were resident and may give none; each later call waits
  // for at least one. Those that the call before gave are unlocked, so more experts than there are slots can be acquired.
  virtual int64_t arrived(Arrived* out) = 0;

  // The block is done: what is still locked is unlocked, demands that have not begun are withdrawn, the predictor learns. May be called again.
  virtual void release() = 0;
};

}  // namespace fate
