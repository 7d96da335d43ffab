#include "prefetcher.h"

#include <algorithm>
#include <chrono>

namespace fate {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

int num_bits(int64_t n) {
  int bits = 0;
  for (; n > 0; n >>= 1) ++bits;
  return bits;
}

// Adds the time in which it lives.
class Timed {
 public:
  explicit Timed(std::atomic<double>& to) : to_(to), began_(now()) {}
  ~Timed() { Counters::add(to_, now() - began_); }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  std::atomic<double>& to_;
  const double began_;
};

}  // namespace

Prefetcher::Prefetcher(std::weak_ptr<Residency> residency, std::unique_ptr<Chances> chances, Options options)
    : residency_(std::move(residency)), chances_(std::move(chances)), options_(options), predicted_(size_t(chances_->num_layers())) {}

void Prefetcher::begin() {
  entered_ = -2;
  for (std::vector<Likely>& of_layer : predicted_) of_layer.clear();
}

double Prefetcher::layer_seconds(int64_t num_rows) const {
  const auto found = layer_seconds_.find(num_bits(num_rows));
  return found == layer_seconds_.end() ? 0.0 : found->second;
}

void Prefetcher::entered(int64_t layer, int64_t num_rows) {
  const std::shared_ptr<Residency> residency = residency_.lock();
  if (!residency) return;
  const double at = now(), stalled = residency->counters().stall_seconds.load(std::memory_order_relaxed);
  if (entered_ == layer - 1) {
    const double spent = (at - entered_at_) - (stalled - stalled_);
    double& known = layer_seconds_.emplace(num_bits(num_rows), spent).first->second;
    known += 0.1 * (spent - known);
  }
  entered_ = layer, entered_at_ = at, stalled_ = stalled;
}

void Prefetcher::look_ahead(int64_t layer, const void* x, Dtype dtype, int64_t num_rows) {
  num_queued_ = 0;
  const std::shared_ptr<Residency> residency = residency_.lock();
  const int64_t left = chances_->num_layers() - 1 - layer;
  if (!residency || left < 1) return;
  const Timed timed(residency->counters().predicting_seconds);
  const int64_t furthest = std::min(chances_->look_ahead(), left);
  if (chances_->look_ahead() > 1) residency->cancel_prefetches();  // nearer layers are predicted better, so queue them anew
  for (int64_t ahead = 1; ahead <= furthest; ++ahead) num_queued_ += predict(*residency, layer + ahead, x, dtype, num_rows, ahead, num_queued_);
}

int64_t Prefetcher::predict(Residency& residency, int64_t layer, const void* x, Dtype dtype, int64_t num_rows, int64_t ahead, int64_t queued) {
  const double seconds = layer_seconds(num_rows), read_seconds = residency.read_seconds();
  if (ahead > 1 && !(double(ahead - 1) * seconds < double(options_.most_missing) * read_seconds)) return 0;
  const std::vector<Likely>& predicted = predicted_[size_t(layer)] = chances_->predict(layer, x, dtype, num_rows, ahead);
  if (predicted.empty()) return 0;
  std::vector<ExpertKey> keys, expected;
  for (const Likely& one : predicted) keys.push_back({layer, one.expert});
  const std::vector<bool> missing = residency.missing(keys);
  std::vector<double> chances, probabilities;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (missing[i]) chances.push_back(predicted[i].probability);
    if (!missing[i] && predicted[i].probability < options_.protected_from) continue;
    expected.push_back(keys[i]);
    probabilities.push_back(predicted[i].probability);
  }
  int64_t most = ahead == 1;  // before a read's time is known
  if (read_seconds > 0) most = num_reads(chances, seconds, read_seconds, ahead, queued, options_.waste);
  return residency.prefetch(expected, most, &probabilities);
}

void Prefetcher::observe(int64_t layer, const int64_t* experts, int64_t n) {
  const std::shared_ptr<Residency> residency = residency_.lock();
  if (!residency) return;
  const Timed timed(residency->counters().predicting_seconds);
  chances_->observe(layer, experts, n);
}

std::shared_ptr<Lease> Prefetcher::acquire(int64_t layer, const int64_t* experts, const int64_t* counts, int64_t n, int64_t num_rows,
                                           const void* inputs, const int64_t*, const float*) {
  entered(layer, num_rows);
  routed_.assign(experts, experts + n);
  const std::shared_ptr<Residency> residency = residency_.lock();
  if (!residency) throw ClosedMemory("");
  std::shared_ptr<Lease> lease = residency->lease(layer, experts, n, num_rows == 1 ? nullptr : counts, num_rows, nullptr);
  look_ahead(layer, inputs, Dtype::kBf16, num_rows);
  return lease;
}

void Prefetcher::ran(int64_t layer, const std::vector<int64_t>&, const std::vector<int64_t>&) { observe(layer, routed_.data(), int64_t(routed_.size())); }

}  // namespace fate
