// Reads ahead of routing inside a step: the native twin of predict/prefetcher.py, which explains it. Whether a pass reads ahead at all is
// decided there, once a pass.
#pragma once
#include <memory>
#include <unordered_map>
#include <vector>

#include "chances.h"
#include "residency.h"

namespace fate {

// Called from one thread at a time.
class Prefetcher final : public Watcher {
 public:
  struct Options {
    double waste, protected_from;
    int64_t most_missing;
  };

  Prefetcher(std::weak_ptr<Residency> residency, std::unique_ptr<Chances> chances, Options options);

  void begin();  // a pass
  void entered(int64_t layer, int64_t num_rows);
  // Queue the reads of the layers after `layer` (-1: x are embeddings) by x [num_rows, hidden].
  void look_ahead(int64_t layer, const void* x, Dtype dtype, int64_t num_rows);
  void observe(int64_t layer, const int64_t* experts, int64_t n);
  double layer_seconds(int64_t num_rows) const;
  const std::vector<Likely>& predicted(int64_t layer) const { return predicted_.at(size_t(layer)); }  // in this pass, the last time
  int64_t num_queued() const { return num_queued_; }  // by the last `look_ahead`
  Chances& chances() { return *chances_; }

  std::shared_ptr<Lease> acquire(int64_t layer, const int64_t* experts, const int64_t* counts, int64_t n, int64_t num_rows, const void* inputs,
                                 const int64_t* chosen, const float* weights) override;
  void ran(int64_t layer, const std::vector<int64_t>& experts, const std::vector<int64_t>& num_planes) override;
  bool counts_uses() const override { return false; }

 private:
  int64_t predict(Residency& residency, int64_t layer, const void* x, Dtype dtype, int64_t num_rows, int64_t ahead, int64_t queued);

  const std::weak_ptr<Residency> residency_;  // which may own this
  const std::unique_ptr<Chances> chances_;
  const Options options_;
  std::vector<std::vector<Likely>> predicted_;       // by layer
  std::unordered_map<int, double> layer_seconds_;    // by the number of bits of num_rows: one layer's time without stalls
  int64_t entered_ = -2;                             // the last layer, and the time and total stall then
  double entered_at_ = 0, stalled_ = 0;
  int64_t num_queued_ = 0;
  std::vector<int64_t> routed_;  // by the block that a step runs
};

}  // namespace fate
