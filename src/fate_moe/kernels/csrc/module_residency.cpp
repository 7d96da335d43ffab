// The Python face of statistics, policies, table and residency. memory/*.py checks what it passes.
#include "module_residency.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "checksum.h"
#include "disk_source.h"
#include "held.h"
#include "residency.h"
#include "unlocked.h"
#include "statistics.h"

namespace nb = nanobind;
using namespace fate;

namespace {

using Pair = std::pair<int64_t, int64_t>;  // core.ExpertId
using Pairs = std::vector<Pair>;
using Numbers = std::vector<int64_t>;

ExpertKey key_of(const Pair& pair) { return {pair.first, pair.second}; }
Pair pair_of(const ExpertKey& key) { return {key.layer, key.expert}; }

std::vector<ExpertKey> keys_of(const Pairs& pairs) {
  std::vector<ExpertKey> keys;
  for (const Pair& pair : pairs) keys.push_back(key_of(pair));
  return keys;
}

Pairs pairs_of(const std::vector<ExpertKey>& keys) {
  Pairs pairs;
  for (const ExpertKey& key : keys) pairs.push_back(pair_of(key));
  return pairs;
}

class PythonInterpreter final : public Interpreter {
 public:
  void* leave() override { return PyGILState_Check() ? Unlocked::leave() : nullptr; }
  void back(void* state) override {
    if (state) Unlocked::back(static_cast<PyThreadState*>(state));
  }
  void check_signals() override {
    const nb::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals()) throw nb::python_error();
  }
};

// A thread that asks an interpreter that ends for its lock is ended by it, in the midst of C++: reading threads look before they ask.
void check_interpreter() {
#if PY_VERSION_HEX >= 0x030D0000
  const bool ends = Py_IsFinalizing();
#else
  const bool ends = _Py_IsFinalizing();
#endif
  if (ends || !Py_IsInitialized()) throw std::runtime_error("the interpreter ends");
}

// What Python raised in a reading thread, to be raised again in those that wait.
struct PythonFailure : std::runtime_error {
  explicit PythonFailure(const nb::python_error& error) : std::runtime_error("a read failed"), value(std::make_shared<Held>(nb::borrow(error.value()))) {}
  std::shared_ptr<Held> value;
};

// read(layer, expert, slot, first, last) -> bytes read
class PythonSource final : public Source {
 public:
  explicit PythonSource(nb::object read) : read_(std::move(read)) {}

  int64_t read(const ExpertKey& key, int64_t slot, uint8_t*, int64_t first, int64_t last) override {
    check_interpreter();
    const nb::gil_scoped_acquire acquire;
    try {
      return nb::cast<int64_t>((*read_)(key.layer, key.expert, slot, first, last >= kWhole ? nb::object(nb::none()) : nb::cast(last)));
    } catch (const nb::python_error& error) {
      throw PythonFailure(error);
    }
  }

 private:
  Held read_;
};

// check(layer, expert, blob, section) raises; reopen(shard) -> file
class PythonFiles final : public DiskSource::Owner {
 public:
  PythonFiles(nb::object check, nb::object reopen) : check_(std::move(check)), reopen_(std::move(reopen)) {}

  void check(const ExpertKey& key, const uint8_t* blob, int64_t length, int64_t section) override {
    check_interpreter();
    const nb::gil_scoped_acquire acquire;
    char* bytes = reinterpret_cast<char*>(const_cast<uint8_t*>(blob));
    try {
      (*check_)(key.layer, key.expert, nb::steal(PyMemoryView_FromMemory(bytes, Py_ssize_t(length), PyBUF_READ)), section);
    } catch (const nb::python_error& error) {
      throw PythonFailure(error);
    }
  }
  int reopen(int64_t shard) override {
    check_interpreter();
    const nb::gil_scoped_acquire acquire;
    try {
      return nb::cast<int>((*reopen_)(shard));
    } catch (const nb::python_error& error) {
      throw PythonFailure(error);
    }
  }

 private:
  Held check_, reopen_;
};

// Into a writable buffer, as core.ExpertSource.
int64_t read_into(DiskSource& of, const Pair& expert, nb::handle slot, int64_t first, const std::optional<int64_t>& last) {
  Py_buffer buffer;
  if (PyObject_GetBuffer(slot.ptr(), &buffer, PyBUF_WRITABLE)) throw nb::python_error();
  const std::unique_ptr<Py_buffer, void (*)(Py_buffer*)> held(&buffer, PyBuffer_Release);
  if (of.end_of(key_of(expert), last.value_or(kWhole)) > buffer.len) throw std::invalid_argument("the slot is too short");
  const Unlocked unlocked;
  return of.read(key_of(expert), 0, static_cast<uint8_t*>(buffer.buf), first, last.value_or(kWhole));
}

// `layouts`: the sections' offsets and lengths, and the blob's length; `places` by layer and expert.
std::shared_ptr<DiskSource> make_disk(nb::object check, nb::object reopen, const std::vector<std::pair<Pairs, int64_t>>& layouts,
                                      const std::vector<std::vector<std::tuple<int64_t, int64_t, int64_t, std::vector<uint64_t>>>>& places, std::vector<std::string> paths,
                                      const std::vector<int>& files, const std::vector<bool>& direct, std::string advice) {
  std::vector<DiskSource::Layout> of_blobs;
  for (const auto& [sections, length] : layouts) {
    of_blobs.push_back({{}, length});
    for (const Pair& section : sections) of_blobs.back().sections.push_back({section.first, section.second});
  }
  std::vector<std::vector<DiskSource::Place>> at;
  for (const auto& of_layer : places) {
    at.emplace_back();
    for (const auto& [layout, shard, offset, checksums] : of_layer) at.back().push_back({layout, shard, offset, checksums});
  }
  return std::make_shared<DiskSource>(std::make_unique<PythonFiles>(std::move(check), std::move(reopen)), std::move(of_blobs), std::move(at),
                                      std::move(paths), files, direct, std::move(advice));
}

// core.EvictionPolicy, called with core.ExpertId.
class PythonPolicy final : public Policy {
 public:
  PythonPolicy(nb::object policy, nb::object expert_id) : policy_(std::move(policy)), expert_id_(std::move(expert_id)) {}

  void routed(int64_t layer, const int64_t* experts, int64_t n, const int64_t* counts, int64_t num_tokens) override {
    const nb::gil_scoped_acquire acquire;
    nb::object shares = counts ? nb::cast(Numbers(counts, counts + n)) : nb::object(nb::none());
    (*policy_).attr("routed")(layer, Numbers(experts, experts + n), shares, num_tokens);
  }
  void admitted(const ExpertKey& key, bool prefetched) override {
    const nb::gil_scoped_acquire acquire;
    (*policy_).attr("admitted")(id(key), nb::arg("prefetched") = prefetched);
  }
  void touched(const ExpertKey& key) override {
    const nb::gil_scoped_acquire acquire;
    (*policy_).attr("touched")(id(key));
  }
  void removed(const ExpertKey& key) override {
    const nb::gil_scoped_acquire acquire;
    (*policy_).attr("removed")(id(key));
  }
  std::optional<ExpertKey> victim(const ExpertKey& incoming, const Evictable& evictable, double probability) override {
    const nb::gil_scoped_acquire acquire;
    const nb::object may_go = nb::cpp_function([&evictable](const Pair& pair) { return evictable(key_of(pair)); });
    const nb::object found = (*policy_).attr("victim")(id(incoming), may_go, probability);
    return found.is_none() ? std::nullopt : std::optional<ExpertKey>(key_of(nb::cast<Pair>(found)));
  }

 private:
  nb::object id(const ExpertKey& key) const { return (*expert_id_)(key.layer, key.expert); }

  Held policy_, expert_id_;
};

// acquire(layer, experts, counts, num_rows, inputs, chosen, weights) -> Lease; ran(layer, experts, num_planes)
class PythonWatcher final : public Watcher {
 public:
  PythonWatcher(nb::object acquire, nb::object ran) : acquire_(std::move(acquire)), ran_(std::move(ran)) {}

  std::shared_ptr<Lease> acquire(int64_t layer, const int64_t* experts, const int64_t* counts, int64_t n, int64_t num_rows, const void* inputs,
                                 const int64_t* chosen, const float* weights) override {
    const nb::gil_scoped_acquire acquire;
    const auto address = [](const void* of) { return reinterpret_cast<uintptr_t>(of); };
    return nb::cast<std::shared_ptr<Lease>>((*acquire_)(layer, Numbers(experts, experts + n), Numbers(counts, counts + n), num_rows,
                                                        address(inputs), address(chosen), address(weights)));
  }
  void ran(int64_t layer, const Numbers& experts, const Numbers& num_planes) override {
    const nb::gil_scoped_acquire acquire;
    (*ran_)(layer, experts, num_planes);
  }

 private:
  Held acquire_, ran_;
};

// A policy, as Python hands it over: one use.
struct PolicyOnce {
  std::unique_ptr<Policy> policy;
  std::unique_ptr<Policy> take() {
    if (!policy) throw std::invalid_argument("this policy is in use");
    return std::move(policy);
  }
};

SlotTable::Classes classes_of(const Pairs& experts, const Numbers& values) {
  SlotTable::Classes classes;
  for (size_t i = 0; i < experts.size(); ++i) classes[key_of(experts[i])] = int(values.at(i));
  return classes;
}

// [(index, slot, sections)] of what a lease gives.
using Given = std::vector<std::tuple<int64_t, int64_t, int64_t>>;

Given given_of(const std::vector<Lease::Given>& of) {
  Given found;
  for (const Lease::Given& one : of) found.emplace_back(one.index, one.slot, one.sections);
  return found;
}

std::shared_ptr<Lease> lease(Residency& of, const Pairs& experts, const std::optional<Numbers>& counts, int64_t num_tokens,
                             const std::optional<Numbers>& wanted) {
  Numbers numbers;
  const int64_t layer = experts.empty() ? 0 : experts[0].first;
  for (const Pair& pair : experts) {
    if (pair.first != layer) throw std::invalid_argument("experts of one layer are leased together");
    numbers.push_back(pair.second);
  }
  return of.lease(layer, numbers.data(), int64_t(numbers.size()), counts ? counts->data() : nullptr, num_tokens, wanted ? wanted->data() : nullptr);
}

// The arrays in statistics.h's order, without those of the evidence where there is none.
std::shared_ptr<RoutingStatistics> make_statistics(int64_t num_layers, int64_t width, int64_t num_sources, int64_t num_decays,
                                                   std::vector<uintptr_t> arrays, nb::object owner, float rate, float slope_rate, float rare,
                                                   float discount, float steady) {
  arrays.resize(12);
  const auto floats = [&](size_t i) { return reinterpret_cast<float*>(arrays[i]); };
  auto made = std::make_shared<RoutingStatistics>();
  RoutingStatistics& of = *made;
  of.num_layers = num_layers, of.width = width, of.num_sources = num_sources, of.num_decays = num_decays;
  of.decays = floats(0), of.gain = floats(1), of.recent = floats(2);
  of.expected_uses = floats(3), of.used_soon = floats(4), of.value = floats(5), of.turn = floats(6), of.distance = floats(7);
  of.table = floats(8), of.slope = floats(9), of.chance = floats(10), of.log = floats(11);
  of.owner = std::make_shared<Held>(std::move(owner));
  of.rate = rate, of.slope_rate = slope_rate, of.rare = rare, of.discount = discount, of.steady = steady;
  return made;
}

Numbers numbers_of(const Pairs& experts) {
  Numbers numbers;
  for (const Pair& pair : experts) numbers.push_back(pair.second);
  return numbers;
}

std::vector<int> look_up(SlotTable& of, const Pairs& experts, const std::optional<Numbers>& wanted) {
  const Numbers numbers = numbers_of(experts);
  std::vector<Found> found(experts.size());
  of.look_up(experts.empty() ? 0 : experts[0].first, numbers.data(), int64_t(numbers.size()), wanted ? wanted->data() : nullptr, found.data());
  std::vector<int> codes;
  for (Found one : found) codes.push_back(int(one));
  return codes;
}

std::vector<int> route(SlotTable& of, const Pairs& experts, const std::optional<Numbers>& counts, int64_t num_tokens, const std::optional<Numbers>& wanted) {
  const Numbers numbers = numbers_of(experts);
  std::vector<Found> found(experts.size());
  of.route(experts.empty() ? 0 : experts[0].first, numbers.data(), int64_t(numbers.size()), counts ? counts->data() : nullptr, num_tokens,
           wanted ? wanted->data() : nullptr, found.data());
  std::vector<int> codes;
  for (Found one : found) codes.push_back(int(one));
  return codes;
}

void bind_counters(nb::module_& m) {
  nb::class_<Counters> of(m, "Counters");
  const auto whole = [&](const char* name, std::atomic<int64_t> Counters::*field) {
    of.def_prop_rw(name, [field](const Counters& of) { return (of.*field).load(std::memory_order_relaxed); },
                   [field](Counters& of, int64_t value) { (of.*field).store(value, std::memory_order_relaxed); });
  };
  const auto seconds = [&](const char* name, std::atomic<double> Counters::*field) {
    of.def_prop_rw(name, [field](const Counters& of) { return (of.*field).load(std::memory_order_relaxed); },
                   [field](Counters& of, double value) { (of.*field).store(value, std::memory_order_relaxed); });
  };
  whole("hits", &Counters::hits);
  whole("in_flight", &Counters::in_flight);
  whole("misses", &Counters::misses);
  whole("prefetched", &Counters::prefetched);
  whole("prefetch_used", &Counters::prefetch_used);
  whole("upgrades", &Counters::upgrades);
  whole("bytes_read", &Counters::bytes_read);
  seconds("stall_seconds", &Counters::stall_seconds);
  seconds("link_seconds", &Counters::link_seconds);
  seconds("predicting_seconds", &Counters::predicting_seconds);
  seconds("overlap_seconds", &Counters::overlap_seconds);
}

void bind_table(nb::module_& m) {
  nb::class_<SlotTable>(m, "SlotTable")
      .def("__init__", [](SlotTable* self, PolicyOnce& policy, std::vector<int> class_of_slot, const Pairs& experts, const Numbers& classes,
                          int64_t num_experts) {
        new (self) SlotTable(policy.take(), std::move(class_of_slot), classes_of(experts, classes), num_experts);
      })
      .def_prop_ro("counters", [](SlotTable& of) -> Counters& { return of.counters; }, nb::rv_policy::reference_internal)
      .def("route", &route, nb::arg("experts"), nb::arg("counts").none(), nb::arg("num_tokens"), nb::arg("wanted").none())
      .def("teach", [](SlotTable& of, const Pairs& experts, const std::optional<Numbers>& counts, int64_t num_tokens) {
        const Numbers numbers = numbers_of(experts);
        of.teach(experts.empty() ? 0 : experts[0].first, numbers.data(), int64_t(numbers.size()), counts ? counts->data() : nullptr, num_tokens);
      }, nb::arg("experts"), nb::arg("counts").none(), nb::arg("num_tokens"))
      .def("draft", [](SlotTable& of, const Pairs& experts) {
        const Numbers numbers = numbers_of(experts);
        of.draft(experts.empty() ? 0 : experts[0].first, numbers.data(), int64_t(numbers.size()));
      })
      .def("look_up", &look_up, nb::arg("experts"), nb::arg("wanted").none())
      .def("lock", [](SlotTable& of, const Pair& expert) { of.lock(key_of(expert)); })
      .def("unlock", [](SlotTable& of, const Pair& expert) { of.unlock(key_of(expert)); })
      .def("expect", [](SlotTable& of, const Pair& expert) { return of.expect(key_of(expert)); })
      .def("protect", [](SlotTable& of, const Pair& expert) { of.protect(key_of(expert)); })
      .def("begin", [](SlotTable& of, const Pair& expert, bool demand, double probability) { return of.begin(key_of(expert), demand, probability); })
      .def("finish", [](SlotTable& of, const Pair& expert, int64_t sections) { of.finish(key_of(expert), sections); },
           nb::arg("expert"), nb::arg("sections") = kWhole)
      .def("fail", [](SlotTable& of, const Pair& expert) { of.fail(key_of(expert)); })
      .def("can_begin", [](SlotTable& of, const Pair& expert, bool demand, double probability) { return of.can_begin(key_of(expert), demand, probability); })
      .def("is_resident", [](const SlotTable& of, const Pair& expert) { return of.is_resident(key_of(expert)); })
      .def("is_in_flight", [](const SlotTable& of, const Pair& expert) { return of.is_in_flight(key_of(expert)); })
      .def("is_locked", [](const SlotTable& of, const Pair& expert) { return of.is_locked(key_of(expert)); })
      .def("is_protected", [](const SlotTable& of, const Pair& expert) { return of.is_protected(key_of(expert)); })
      .def("slot_of", [](const SlotTable& of, const Pair& expert) { return of.slot_of(key_of(expert)); })
      .def("sections_of", [](const SlotTable& of, const Pair& expert) { return of.sections_of(key_of(expert)); })
      .def("class_of", [](const SlotTable& of, const Pair& expert) { return of.class_of(key_of(expert)); })
      .def_prop_ro("num_in_flight", &SlotTable::num_in_flight)
      .def_prop_ro("holds_all", &SlotTable::holds_all)
      .def("slots", [](const SlotTable& of) {
        std::vector<std::pair<Pair, int64_t>> found;
        for (const auto& [key, slot] : of.slots()) found.emplace_back(pair_of(key), slot);
        return found;
      })
      .def("broken", &SlotTable::broken)
      .def("spoil", &SlotTable::spoil);
}

}  // namespace

void bind_residency(nb::module_& m) {
  static PythonInterpreter interpreter;
  Interpreter::set(&interpreter);
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    const auto raise = [](const char* name, const char* what) {
      const nb::object type = nb::module_::import_("fate_moe.errors").attr(name);
      const nb::object value = *what ? type(what) : type();
      PyErr_SetObject(type.ptr(), value.ptr());
    };
    try {
      std::rethrow_exception(thrown);
    } catch (const PythonFailure& error) {
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE((**error.value).ptr())), (**error.value).ptr());
    } catch (const ClosedMemory&) {
      raise("ClosedModelError", "");
    } catch (const StoreFailure& error) {
      raise("StoreError", error.what());
    } catch (const MissingExpert& error) {
      PyErr_SetString(PyExc_KeyError, error.what());
    }
  });

  nb::class_<RoutingStatistics>(m, "RoutingStatistics")
      .def_static("make", &make_statistics)
      .def("routed", [](RoutingStatistics& of, int64_t layer, const Numbers& experts, const std::optional<Numbers>& counts, int64_t num_tokens) {
        of.routed(layer, experts.data(), int64_t(experts.size()), counts ? counts->data() : nullptr, num_tokens);
      }, nb::arg("layer"), nb::arg("experts"), nb::arg("counts").none(), nb::arg("num_tokens"))
      .def("restored", &RoutingStatistics::restored);

  nb::class_<PolicyOnce>(m, "Policy")
      .def_static("lru", [] { return PolicyOnce{std::make_unique<Lru>()}; })
      .def_static("decayed", [](std::shared_ptr<RoutingStatistics> of) { return PolicyOnce{std::make_unique<Decayed>(std::move(of))}; })
      .def_static("python", [](nb::object policy, nb::object expert_id) {
        return PolicyOnce{std::make_unique<PythonPolicy>(std::move(policy), std::move(expert_id))};
      });
  bind_counters(m);
  bind_table(m);

  nb::class_<Source>(m, "Source").def_static("python", [](nb::object read) -> std::shared_ptr<Source> {
    return std::make_shared<PythonSource>(std::move(read));
  });
  m.def("checksum", [](const nb::bytes& of) {
    if (of.size() < size_t(kShortest)) throw std::invalid_argument("too short");
    return xxh3_64(static_cast<const uint8_t*>(of.data()), int64_t(of.size()));
  }, "For tests.");
  nb::class_<DiskSource, Source>(m, "DiskSource")
      .def_static("make", &make_disk)
      .def("read", &read_into, nb::arg("expert"), nb::arg("slot"), nb::arg("first"), nb::arg("last").none());
  nb::class_<Lease>(m, "Lease").def_prop_ro("found", [](const Lease& of) {
    std::vector<int> codes;
    for (const Lease::Item& item : of.items) codes.push_back(int(item.found));
    return codes;
  });
  nb::class_<ExpertMemory>(m, "ExpertMemory")  // as a step uses it, for tests
      .def("acquire", [](ExpertMemory& of, int64_t layer, const Numbers& experts, const Numbers& counts, int64_t num_rows, uintptr_t inputs,
                         uintptr_t chosen, uintptr_t weights) {
        const Unlocked unlocked;
        of.acquire(layer, experts.data(), counts.data(), int64_t(experts.size()), num_rows, reinterpret_cast<const void*>(inputs),
                   reinterpret_cast<const int64_t*>(chosen), reinterpret_cast<const float*>(weights));
      })
      .def("arrived", [](ExpertMemory& of, int64_t most) {
        std::vector<ExpertMemory::Arrived> out(static_cast<size_t>(most));
        {
          const Unlocked unlocked;
          out.resize(size_t(of.arrived(out.data())));
        }
        std::vector<std::tuple<int64_t, uint64_t, int>> found;
        for (const ExpertMemory::Arrived& one : out) found.emplace_back(one.index, one.address, one.num_planes);
        return found;
      })
      .def("end", [](ExpertMemory& of) {
        const Unlocked unlocked;
        of.release();
      });
  nb::class_<Residency, ExpertMemory>(m, "Residency")
      .def_static("make", [](std::shared_ptr<Source> source, PolicyOnce& policy, std::vector<int> class_of, std::vector<uint64_t> addresses,
                             nb::object memory, int64_t longest, const Pairs& experts, const Numbers& classes, const Numbers& blob_bytes, int num_threads) {
        Residency::Slots slots = {std::move(class_of), std::move(addresses), longest, classes_of(experts, classes), {}, nullptr};
        slots.owner = std::make_shared<Held>(std::move(memory));
        for (size_t i = 0; i < experts.size(); ++i) slots.blob_bytes[key_of(experts[i])] = blob_bytes.at(i);
        return Residency::make(std::move(source), policy.take(), std::move(slots), num_threads);
      })
      .def("lease", &lease, nb::arg("experts"), nb::arg("counts").none(), nb::arg("num_tokens"), nb::arg("wanted").none())
      .def("next", [](Residency& of, Lease& lease) { return given_of(of.next(lease)); })
      .def("next_one", [](Residency& of, Lease& lease) -> std::optional<Pair> {
        Lease::Given one;
        return of.next_one(lease, one) ? std::optional<Pair>({one.index, one.slot}) : std::nullopt;
      })
      .def("release", [](Residency& of, Lease& lease) { of.release(lease); })
      .def("forget_leases", &Residency::forget_leases)
      .def("hold_back", &Residency::hold_back)
      .def("learn", &Residency::learn)
      .def("prefetch", [](Residency& of, const Pairs& expected, int64_t most, const std::optional<std::vector<double>>& probabilities) {
        return of.prefetch(keys_of(expected), most, probabilities ? &*probabilities : nullptr);
      }, nb::arg("expected"), nb::arg("most"), nb::arg("probabilities").none())
      .def("cancel_prefetches", &Residency::cancel_prefetches)
      .def("missing", [](Residency& of, const Pairs& experts) { return of.missing(keys_of(experts)); })
      .def("holds_all", &Residency::holds_all)
      .def("is_ready", [](Residency& of, const Pair& expert) { return of.is_ready(key_of(expert)); })
      .def("slot_of", [](Residency& of, const Pair& expert) { return of.slot_of(key_of(expert)); })
      .def("held", [](Residency& of, const Pair& expert) { return of.held(key_of(expert)); })
      .def("resident", [](Residency& of) { return pairs_of(of.resident()); })
      .def("wait_idle", &Residency::wait_idle)
      .def("close", &Residency::close)
      .def("broken", &Residency::broken)
      .def("spoil", &Residency::spoil)
      .def_prop_ro("read_seconds", &Residency::read_seconds)
      .def_prop_ro("counters", [](Residency& of) -> Counters& { return of.counters(); }, nb::rv_policy::reference_internal)
      .def("write_journal", &Residency::write_journal)
      .def("take_journal", [](Residency& of) {
        std::vector<std::tuple<Pair, bool, double, double>> found;
        for (const ReadRecord& one : of.take_journal()) found.emplace_back(pair_of(one.key), one.demand, one.began, one.ended);
        return found;
      })
      .def("write_missed", &Residency::write_missed)
      .def("take_missed", [](Residency& of) { return pairs_of(of.take_missed()); })
      .def("set_source", &Residency::set_source)
      .def("watch", [](Residency& of, nb::object acquire, nb::object ran) {
        of.watch(acquire.is_none() ? nullptr : std::make_shared<PythonWatcher>(std::move(acquire), std::move(ran)));
      }, nb::arg("acquire").none(), nb::arg("ran").none())
      .def("count_uses", [](Residency& of, uintptr_t uses, Numbers first, nb::object owner) {
        of.count_uses(reinterpret_cast<int64_t*>(uses), std::move(first), std::make_shared<Held>(std::move(owner)));
      })
      .def("set_complaint", [](Residency& of, nb::object complain) {
        auto held = std::make_shared<Held>(std::move(complain));
        of.set_complaint([held](const ExpertKey& key, const std::exception_ptr& error) {
          check_interpreter();
          const nb::gil_scoped_acquire acquire;
          std::string what = "?";
          try {
            std::rethrow_exception(error);
          } catch (const PythonFailure& failure) {
            what = nb::cast<std::string>(nb::str(**failure.value));
          } catch (const std::exception& other) {
            what = other.what();
          }
          try {
            (**held)(key.layer, key.expert, what);
          } catch (nb::python_error& failed) {
            failed.discard_as_unraisable("reading experts");
          }
        });
      });
}
