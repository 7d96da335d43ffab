// How likely each expert of a layer is to be chosen, judged by an earlier router input: the native twins of predict/probability.py,
// reliability.py, blend.py, rule.py and of the linear maps in gates.py, which explain them. What they compare is computed in double, so
// that the order of sums hardly ever shows.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "products.h"
#include "statistics.h"

namespace fate {

// predict/rule.py: num_reads; `waste` is its WASTE.
int64_t num_reads(const std::vector<double>& probabilities, double layer_seconds, double read_seconds, int64_t ahead, int64_t queued, double waste);

// Scores of one layer's experts [num_experts] = matrix * (router input * ratio) + bias.
struct Gate {
  Place place;  // of numbers
  uint64_t address;
  std::vector<float> bias, ratio;  // may be empty
  std::vector<float> rounded;      // `ratio` as bf16, for inputs of bf16; Chances fills it in
};

struct Likely {
  int64_t expert;
  double probability;
};

class Chances {
 public:
  struct Options {
    std::vector<int64_t> sizes, top_k;  // by layer
    int64_t look_ahead;
    double least;                     // a less likely expert is not predicted
    std::vector<float> prior;         // by bin of the score
    double low, high, strength;       // of the bins, and of the prior
    int64_t learn_every;
    std::vector<double> weights;      // initial ones of the sources: the gates', the history's
    double curvature, slope;          // initial ones of the blend
    int64_t blend_every;
  };
  using Gates = std::vector<std::vector<std::vector<Gate>>>;  // by look-ahead - 1 and layer: one or none

  // `history` may be null. `counts`: it is told what was chosen, by up to so many experts; 0: somebody else tells it.
  Chances(Options options, Gates gates, std::shared_ptr<RoutingStatistics> history, int64_t counts, const Ops& (*ops)(), std::shared_ptr<void> owner);

  // core.Predictor. x [num_rows, hidden] of dtype; valid until the next call.
  const std::vector<Likely>& predict(int64_t layer, const void* x, Dtype dtype, int64_t num_rows, int64_t ahead);
  void observe(int64_t layer, const int64_t* experts, int64_t n);

  int64_t num_layers() const { return int64_t(options_.sizes.size()); }
  int64_t look_ahead() const { return options_.look_ahead; }

 private:
  // Of one layer and look-ahead.
  struct Learned {
    std::vector<float> rates, hits, counts;          // by bin
    std::vector<int64_t> new_hits, new_counts;       // since the last fit
    int64_t num_new = 0;
    std::vector<float> weights;                      // of the sources; the first one's is 1
    std::vector<double> slopes, squares;             // [S + 1], [S + 1, S + 1]
    int64_t turn = 0;
    bool has_bins = false, has_sources = false;      // of the prediction that is not observed yet
    std::vector<int> bins;                           // [num_experts]
    std::vector<std::vector<float>> sources;         // each [num_experts]
  };

  void score(const Gate& gate, const void* x, Dtype dtype, int64_t num_rows);
  void distances(const float* scores, int64_t layer, std::vector<float>& out);
  int bin_of(float distance) const;
  void predict_many(int64_t layer, int64_t num_rows);
  void learn(Learned& of, const int64_t* experts, int64_t n);
  void learn_blend(Learned& of, const int64_t* experts, int64_t n);

  const Options options_;
  Gates gates_;
  const std::shared_ptr<RoutingStatistics> history_;
  const int64_t counts_;
  const Ops& (*const ops_)();
  const std::shared_ptr<void> owner_;  // of the matrices
  std::vector<Learned> learned_;       // (look-ahead - 1) * layers + layer
  std::vector<Likely> likely_;
  std::vector<float> scores_, inputs_, distance_, ordered_;
  std::vector<double> votes_;
};

}  // namespace fate
