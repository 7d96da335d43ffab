// The Python face of prediction (chances.h, prefetcher.h). predict/native_prefetcher.py checks what it passes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <tuple>

#include "held.h"
#include "module.h"
#include "prefetcher.h"

namespace nb = nanobind;

namespace fate {
namespace {

using Floats = std::vector<float>;
using Numbers = std::vector<int64_t>;
// place, address, bias and ratio
using GivenGate = std::tuple<const Place*, uintptr_t, Floats, Floats>;
using GivenGates = std::vector<std::vector<std::optional<GivenGate>>>;
using Predicted = std::vector<std::pair<int64_t, double>>;

// A predictor, as Python hands it over: one use by a prefetcher; until then Python drives it, in tests.
struct ChancesOnce {
  std::unique_ptr<Chances> chances;
  Chances& get() const {
    if (!chances) throw std::invalid_argument("a prefetcher has it");
    return *chances;
  }
};

Predicted pairs_of(const std::vector<Likely>& of) {
  Predicted found;
  for (const Likely& one : of) found.emplace_back(one.expert, one.probability);
  return found;
}

ChancesOnce make_chances(Numbers sizes, Numbers top_k, int64_t look_ahead, double least, Floats prior, std::pair<double, double> range, double strength,
                         int64_t learn_every, std::vector<double> weights, double curvature, double slope, int64_t blend_every,
                         const GivenGates& given, std::shared_ptr<RoutingStatistics> history, int64_t counts, nb::object owner) {
  Chances::Gates gates;
  for (const auto& by_layer : given) {
    gates.emplace_back();
    for (const auto& one : by_layer) {
      gates.back().emplace_back();
      if (one) gates.back().back().push_back({*std::get<0>(*one), uint64_t(std::get<1>(*one)), std::get<2>(*one), std::get<3>(*one), {}});
    }
  }
  Chances::Options options = {std::move(sizes), std::move(top_k), look_ahead, least,     std::move(prior), range.first, range.second,
                              strength,         learn_every,      std::move(weights),    curvature,        slope,       blend_every};
  return {std::make_unique<Chances>(std::move(options), std::move(gates), std::move(history), counts, &used_ops, std::make_shared<Held>(std::move(owner)))};
}

}  // namespace

void bind_predict(nb::module_& m) {
  m.def("num_reads", &num_reads, nb::arg("probabilities"), nb::arg("layer_seconds"), nb::arg("read_seconds"), nb::arg("ahead"), nb::arg("queued"),
        nb::arg("waste"), "For tests.");
  nb::class_<ChancesOnce>(m, "Chances")
      .def_static("make", &make_chances, nb::arg("sizes"), nb::arg("top_k"), nb::arg("look_ahead"), nb::arg("least"), nb::arg("prior"), nb::arg("range"),
                  nb::arg("strength"), nb::arg("learn_every"), nb::arg("weights"), nb::arg("curvature"), nb::arg("slope"), nb::arg("blend_every"),
                  nb::arg("gates"), nb::arg("history").none(), nb::arg("counts"), nb::arg("owner"))
      .def("predict", [](ChancesOnce& of, int64_t layer, uintptr_t x, int dtype, int64_t num_rows, int64_t ahead) {
        return pairs_of(of.get().predict(layer, reinterpret_cast<const void*>(x), Dtype(dtype), num_rows, ahead));
      })
      .def("observe", [](ChancesOnce& of, int64_t layer, const Numbers& experts) { of.get().observe(layer, experts.data(), int64_t(experts.size())); });
  nb::class_<Prefetcher>(m, "Prefetcher")
      .def_static("make", [](Residency& residency, ChancesOnce& chances, double waste, double protected_from, int64_t most_missing) {
        chances.get();
        return std::make_shared<Prefetcher>(residency.weak_from_this(), std::move(chances.chances), Prefetcher::Options{waste, protected_from, most_missing});
      })
      .def("begin", &Prefetcher::begin)
      .def("entered", &Prefetcher::entered)
      .def("look_ahead", [](Prefetcher& of, int64_t layer, uintptr_t x, int dtype, int64_t num_rows) {
        const Unlocked unlocked;
        of.look_ahead(layer, reinterpret_cast<const void*>(x), Dtype(dtype), num_rows);
        return of.num_queued();
      })
      .def("observe", [](Prefetcher& of, int64_t layer, const Numbers& experts) { of.observe(layer, experts.data(), int64_t(experts.size())); })
      .def("layer_seconds", &Prefetcher::layer_seconds)
      .def("predicted", [](const Prefetcher& of, int64_t layer) { return pairs_of(of.predicted(layer)); })
      .def("watch", [](const std::shared_ptr<Prefetcher>& of, Residency& residency) { residency.watch(of); }, "Let steps look ahead by it.");
}

}  // namespace fate
