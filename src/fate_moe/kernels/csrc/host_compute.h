// Experts computed on the host for a GPU. The GPU writes a question to memory that both see and waits for the answer there; its side
// is kernels/triton_host_compute.py.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "inputs.h"
#include "products.h"

namespace fate {

// Every word of the mail carries the number of the question in its upper half, so that nothing depends on the order in which words
// become visible: a word counts when its number is right. Questions: the number of experts, and of tokens in the bits from 16 on; that
// many blobs (of room for `most`); for each which tokens it is for, a bit each (of room for `most`); the tokens' activations, `hidden`
// fp32 numbers each. Answers: [most, hidden] fp32, by expert in the question's order, and by token of each.
struct Mail {
  const uint64_t* questions;
  uint64_t* answers;
  int64_t most;
  int64_t tokens;  // at most, up to 16
};

// Owns threads that poll the mail without pause while questions come (a wake-up takes longer than an expert), and once a millisecond
// after 20 ms without one. They divide the rows of a question's experts, first of gate and up, then of down.
class HostCompute {
 public:
  // Blob b lies at arena + b * blob_bytes.
  HostCompute(const Ops& ops, const ExpertPlace& place, uint64_t arena, int64_t blob_bytes, const Mail& mail, int num_threads);
  ~HostCompute();  // no question may be open

 private:
  struct Asked;
  struct Own;  // one thread's memory
  void serve(int64_t number);
  bool await(uint32_t last, uint64_t& head) const;
  void multiply(Own& own, const Inputs& inputs, const int64_t* places, int64_t count, const Matrix& m, int64_t begin, int64_t end) const;
  void answer(Own& own, int64_t number, uint32_t question, int64_t count, int64_t tokens, int64_t turn);

  const Ops& ops_;
  const ExpertPlace place_;
  const uint64_t arena_;
  const int64_t blob_bytes_;
  const Mail mail_;
  const bool integers_;
  const int64_t num_threads_;
  std::vector<float> inner_;  // [most, inner]
  std::atomic<int64_t> met_{0};  // threads that have ended gate and up, of all questions
  std::atomic<uint64_t> next_up_{0}, next_down_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

}  // namespace fate
