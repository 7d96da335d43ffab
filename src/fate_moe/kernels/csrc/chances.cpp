#include "chances.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <stdexcept>
#include <utility>

namespace fate {
namespace {

// As Python's a // b of positive numbers.
double floor_divide(double a, double b) {
  const double quotient = (a - std::fmod(a, b)) / b, whole = std::floor(quotient);
  return quotient - whole > 0.5 ? whole + 1 : whole;
}

// reliability.py: isotonic.
void isotonic(const std::vector<float>& hits, const std::vector<float>& counts, std::vector<float>& rates) {
  struct Pool {
    double hits, counts;
    size_t bins;
  };
  std::vector<Pool> pools;
  for (size_t i = 0; i < hits.size(); ++i) {
    Pool pool = {double(hits[i]), double(counts[i]), 1};
    while (!pools.empty() && pools.back().hits * pool.counts >= pool.hits * pools.back().counts) {
      const Pool last = pools.back();
      pools.pop_back();
      pool = {last.hits + pool.hits, last.counts + pool.counts, last.bins + pool.bins};
    }
    pools.push_back(pool);
  }
  size_t at = 0;
  for (const Pool& pool : pools)
    for (size_t i = 0; i < pool.bins; ++i) rates[at++] = float(pool.hits / pool.counts);
}

// x of a x = b, [n, n] and [n], by elimination with the largest pivots; b becomes x.
void solve(std::vector<double> a, std::vector<double>& b) {
  const size_t n = b.size();
  for (size_t c = 0; c < n; ++c) {
    size_t pivot = c;
    for (size_t r = c + 1; r < n; ++r)
      if (std::fabs(a[r * n + c]) > std::fabs(a[pivot * n + c])) pivot = r;
    for (size_t i = 0; i < n; ++i) std::swap(a[c * n + i], a[pivot * n + i]);
    std::swap(b[c], b[pivot]);
    for (size_t r = c + 1; r < n; ++r) {
      const double factor = a[r * n + c] / a[c * n + c];
      for (size_t i = c; i < n; ++i) a[r * n + i] -= factor * a[c * n + i];
      b[r] -= factor * b[c];
    }
  }
  for (size_t c = n; c-- > 0;) {
    for (size_t i = c + 1; i < n; ++i) b[c] -= a[c * n + i] * b[i];
    b[c] /= a[c * n + c];
  }
}

}  // namespace

int64_t num_reads(const std::vector<double>& probabilities, double layer_seconds, double read_seconds, int64_t ahead, int64_t queued, double waste) {
  const double later = double(ahead - 1) * layer_seconds;
  const auto done_later = [&](size_t place) { return std::min(read_seconds, std::max(0.0, later - double(place) * read_seconds)); };
  for (size_t index = 0; index < probabilities.size(); ++index) {
    const double probability = probabilities[index], begins = double(queued + int64_t(index)) * read_seconds;
    const double saved = std::min(read_seconds, double(ahead) * layer_seconds - begins);
    double gained = probability * (saved - done_later(0));
    for (size_t place = 1; index + place < probabilities.size(); ++place) {
      const double before = done_later(place - 1);
      if (before == 0) break;
      gained += probabilities[index + place] * (before - done_later(place));
    }
    const double next_asks = layer_seconds > 0 ? layer_seconds * (1 + floor_divide(begins, layer_seconds)) : 0.0;
    const double delay = std::max(0.0, begins + read_seconds - next_asks);
    if (saved <= 0 || gained <= (1 - probability) * (delay + waste * read_seconds)) return int64_t(index);
  }
  return int64_t(probabilities.size());
}

Chances::Chances(Options options, Gates gates, std::shared_ptr<RoutingStatistics> history, int64_t counts, const Ops& (*ops)(),
                 std::shared_ptr<void> owner)
    : options_(std::move(options)), gates_(std::move(gates)), history_(std::move(history)), counts_(counts), ops_(ops), owner_(std::move(owner)) {
  const Options& o = options_;
  const size_t num_layers = o.sizes.size(), num_sources = o.weights.size(), num_slopes = num_sources + 1;
  if (!num_layers || o.top_k.size() != num_layers || gates_.size() != size_t(o.look_ahead) || num_sources != (history_ ? 2u : 1u))
    throw std::invalid_argument("chances of no layers, or of parts that do not fit");
  for (auto& by_layer : gates_) {
    if (by_layer.size() != num_layers) throw std::invalid_argument("gates of other layers");
    for (size_t layer = 0; layer < num_layers; ++layer)
      for (Gate& gate : by_layer[layer]) {
        const bool fits = gate.place.rows == o.sizes[layer] && (gate.bias.empty() || int64_t(gate.bias.size()) == gate.place.rows) &&
                          (gate.ratio.empty() || int64_t(gate.ratio.size()) == gate.place.cols);
        if (!fits) throw std::invalid_argument("a gate of another shape");
        std::vector<uint16_t> bits(gate.ratio.size());
        gate.rounded.resize(gate.ratio.size());
        ops_().from_float(gate.ratio.data(), int64_t(bits.size()), bits.data(), Dtype::kBf16);
        ops_().to_float(bits.data(), Dtype::kBf16, int64_t(bits.size()), gate.rounded.data());
      }
  }
  if (history_ && (history_->num_layers != int64_t(num_layers) || history_->width < *std::max_element(o.sizes.begin(), o.sizes.end())))
    throw std::invalid_argument("a history of other layers");
  Learned fresh;
  fresh.rates = o.prior;
  for (const float rate : o.prior) fresh.hits.push_back(float(o.strength) * rate);
  fresh.counts.assign(o.prior.size(), float(o.strength));
  fresh.new_hits.assign(o.prior.size(), 0), fresh.new_counts.assign(o.prior.size(), 0);
  for (const double weight : o.weights) {
    fresh.weights.push_back(float(weight / o.weights[0]));
    fresh.slopes.push_back(o.slope * weight);
  }
  fresh.slopes.push_back(0);
  fresh.squares.assign(num_slopes * num_slopes, 0);
  for (size_t i = 0; i < num_slopes; ++i) fresh.squares[i * num_slopes + i] = o.curvature;
  fresh.sources.resize(num_sources);
  learned_.assign(num_layers * size_t(o.look_ahead), fresh);
  for (size_t i = 0; i < learned_.size(); ++i) learned_[i].turn = int64_t(i) % o.blend_every;
}

const std::vector<Likely>& Chances::predict(int64_t layer, const void* x, Dtype dtype, int64_t num_rows, int64_t ahead) {
  likely_.clear();
  if (layer < 0 || layer >= num_layers() || ahead < 1 || ahead > look_ahead() || num_rows < 1 || (ahead > 1 && num_rows > 1)) return likely_;
  const auto& gates = gates_[size_t(ahead - 1)][size_t(layer)];
  if (!gates.empty()) score(gates[0], x, dtype, num_rows);
  if (num_rows > 1) {
    if (!gates.empty()) predict_many(layer, num_rows);
    return likely_;
  }
  if (gates.empty() && !history_) return likely_;
  const size_t size = size_t(options_.sizes[size_t(layer)]);
  Learned& of = learned_[size_t((ahead - 1) * num_layers() + layer)];
  if (!gates.empty()) distances(scores_.data(), layer, of.sources[0]);
  if (history_) {
    const float* const uses = history_->expected_uses + layer * history_->width;
    of.sources[1].resize(size);
    for (size_t e = 0; e < size; ++e) of.sources[1][e] = float(std::log(double(std::max(uses[e], 0.0f) + 0.01f))) + 2.0f;
  }
  distance_ = of.sources[gates.empty() ? 1 : 0];
  if (!gates.empty() && history_) {
    if (const float weight = of.weights[1]; weight > 0)
      for (size_t e = 0; e < size; ++e) distance_[e] += weight * of.sources[1][e];
    of.has_sources = true;
  }
  of.bins.resize(size);
  for (size_t e = 0; e < size; ++e) of.bins[e] = bin_of(distance_[e]);
  of.has_bins = true;
  const float least = float(options_.least);
  for (size_t e = 0; e < size; ++e)
    if (const float rate = of.rates[size_t(of.bins[e])]; rate > least) likely_.push_back({int64_t(e), double(std::min(rate, 1.0f))});
  std::stable_sort(likely_.begin(), likely_.end(),
                   [&](const Likely& a, const Likely& b) { return distance_[size_t(a.expert)] > distance_[size_t(b.expert)]; });
  return likely_;
}

// gates.py: of all rows, to scores_ [num_rows, num_experts].
void Chances::score(const Gate& gate, const void* x, Dtype dtype, int64_t num_rows) {
  const Ops& ops = ops_();
  const int64_t rows = gate.place.rows, cols = gate.place.cols;
  if (!gate.ratio.empty()) {  // a product in the inputs' own dtype
    const std::vector<float>& ratio = dtype == Dtype::kBf16 ? gate.rounded : gate.ratio;
    inputs_.resize(size_t(num_rows * cols));
    ops.to_float(x, dtype, num_rows * cols, inputs_.data());
    for (int64_t t = 0; t < num_rows; ++t)
      for (int64_t c = 0; c < cols; ++c) inputs_[size_t(t * cols + c)] *= ratio[size_t(c)];
    if (dtype == Dtype::kBf16) {
      uint16_t bits[256];
      for (int64_t i = 0; i < num_rows * cols; i += 256) {
        const int64_t count = std::min<int64_t>(256, num_rows * cols - i);
        ops.from_float(inputs_.data() + i, count, bits, dtype);
        ops.to_float(bits, dtype, count, inputs_.data() + i);
      }
    }
    x = inputs_.data(), dtype = Dtype::kF32;
  }
  scores_.resize(size_t(num_rows * rows));
  run_linear(ops, gate.place.at(gate.address, int(gate.place.kind)), x, dtype, num_rows, scores_.data(), Dtype::kF32, true, 1);
  if (!gate.bias.empty())
    for (int64_t t = 0; t < num_rows; ++t)
      for (int64_t e = 0; e < rows; ++e) scores_[size_t(t * rows + e)] += gate.bias[size_t(e)];
}

// Of one token's scores from the border between the k-th and the next one, in standard deviations.
void Chances::distances(const float* scores, int64_t layer, std::vector<float>& out) {
  const int64_t size = options_.sizes[size_t(layer)], k = options_.top_k[size_t(layer)];
  ordered_.assign(scores, scores + size);
  float border = scores[0];
  if (k < size) {
    std::nth_element(ordered_.begin(), ordered_.begin() + k, ordered_.end(), std::greater<float>());
    border = 0.5f * (*std::min_element(ordered_.begin(), ordered_.begin() + k) + ordered_[size_t(k)]);
  }
  double sum = 0, squares = 0;
  for (int64_t e = 0; e < size; ++e) sum += scores[e], squares += double(scores[e]) * scores[e];
  const double mean = sum / double(size), spread = std::sqrt(std::max(squares / double(size) - mean * mean, 0.0)) + 1e-6;
  const float scale = float(1 / spread);
  out.resize(size_t(size));
  for (int64_t e = 0; e < size; ++e) out[size_t(e)] = (scores[e] - border) * scale;
}

int Chances::bin_of(float distance) const {
  const int last = int(options_.prior.size()) - 1;
  const float scaled = (distance - float(options_.low)) * float(double(last + 1) / (options_.high - options_.low));
  return scaled > 0 ? int(std::min(scaled, float(last))) : 0;  // what is no number: 0
}

void Chances::predict_many(int64_t layer, int64_t num_rows) {
  const size_t size = size_t(options_.sizes[size_t(layer)]);
  const std::vector<float>& rates = learned_[size_t(layer)].rates;
  votes_.assign(size, 0.0);
  for (int64_t t = 0; t < num_rows; ++t) {
    distances(scores_.data() + t * int64_t(size), layer, distance_);
    for (size_t e = 0; e < size; ++e) votes_[e] += double(rates[size_t(bin_of(distance_[e]))]);
  }
  const double most = *std::max_element(votes_.begin(), votes_.end()) + 1e-6;
  for (size_t e = 0; e < size; ++e) {
    const float probability = float((1 - std::exp(-votes_[e])) * (1 - 1e-3) + 1e-3 * votes_[e] / most);
    if (probability > float(options_.least)) likely_.push_back({int64_t(e), double(probability)});
  }
  std::stable_sort(likely_.begin(), likely_.end(), [](const Likely& a, const Likely& b) { return a.probability > b.probability; });
  for (Likely& one : likely_) one.probability = std::min(one.probability, 1.0);
}

void Chances::observe(int64_t layer, const int64_t* experts, int64_t n) {
  if (layer < 0 || layer >= num_layers()) return;
  for (int64_t i = 0; i < n; ++i)
    if (experts[i] < 0 || experts[i] >= options_.sizes[size_t(layer)]) throw std::out_of_range("no such expert");
  const bool one_token = n <= options_.top_k[size_t(layer)];
  for (int64_t ahead = 0; ahead < look_ahead(); ++ahead) {
    Learned& of = learned_[size_t(ahead * num_layers() + layer)];
    const bool has_bins = std::exchange(of.has_bins, false), has_sources = std::exchange(of.has_sources, false);
    if (!has_bins || !one_token) continue;
    learn(of, experts, n);
    if (!has_sources) continue;
    of.turn = (of.turn + 1) % options_.blend_every;
    if (of.turn == 0) learn_blend(of, experts, n);
  }
  if (history_ && n <= counts_) history_->routed(layer, experts, n, nullptr, 1);
}

// reliability.py: learn.
void Chances::learn(Learned& of, const int64_t* experts, int64_t n) {
  for (const int bin : of.bins) ++of.new_counts[size_t(bin)];
  for (int64_t i = 0; i < n; ++i) ++of.new_hits[size_t(of.bins[size_t(experts[i])])];
  if (++of.num_new < options_.learn_every) return;
  of.num_new = 0;
  for (size_t bin = 0; bin < of.rates.size(); ++bin) {
    of.counts[bin] += float(std::exchange(of.new_counts[bin], 0));
    of.hits[bin] += float(std::exchange(of.new_hits[bin], 0));
  }
  isotonic(of.hits, of.counts, of.rates);
}

// blend.py: learn.
void Chances::learn_blend(Learned& of, const int64_t* experts, int64_t n) {
  const size_t size = of.bins.size(), num_sources = of.sources.size(), num_slopes = num_sources + 1;
  std::vector<double> errors(size), step(num_slopes, 0.0);
  const auto at = [&](size_t source, size_t e) { return source < num_sources ? double(of.sources[source][e]) : 1.0; };
  for (size_t e = 0; e < size; ++e) {
    double logit = 0;
    for (size_t s = 0; s < num_slopes; ++s) logit += of.slopes[s] * at(s, e);
    const double probability = 1 / (1 + std::exp(-std::min(std::max(logit, -30.0), 30.0)));
    for (size_t r = 0; r < num_slopes; ++r)
      for (size_t c = 0; c < num_slopes; ++c) of.squares[r * num_slopes + c] += at(r, e) * (probability * (1 - probability)) * at(c, e);
    errors[e] = probability;
  }
  for (int64_t i = 0; i < n; ++i) errors[size_t(experts[i])] -= 1;
  for (size_t s = 0; s < num_slopes; ++s)
    for (size_t e = 0; e < size; ++e) step[s] += at(s, e) * errors[e];
  solve(of.squares, step);
  for (size_t s = 0; s < num_slopes; ++s) of.slopes[s] -= step[s];
  for (size_t s = 1; s < num_sources; ++s) of.weights[s] = float(std::max(of.slopes[s] / std::max(of.slopes[0], 0.1), 0.0));
}

}  // namespace fate
