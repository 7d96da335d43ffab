// Whether objects of Python are what and where they were: layers/snapshot.py asks before each pass, of a thousand things in a large model.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <type_traits>

#include "module.h"

namespace nb = nanobind;

namespace fate {
namespace {

using HeldObject = std::tuple<nb::dict, nb::object, nb::object>;             // what a dictionary has under a name
using HeldTensor = std::tuple<nb::dict, nb::object, nb::object, uint64_t>;  // a tensor, and where its numbers are (0: anywhere)
using DictSize = std::tuple<nb::dict, Py_ssize_t>;
using ObjectClass = std::tuple<nb::object, nb::object>;     // an object and its class
using ClassForward = std::tuple<nb::object, nb::object>;  // a class and its `forward`

struct Watch {
  std::vector<HeldObject> places;
  std::vector<HeldTensor> numbers;
  std::vector<DictSize> sizes;
  std::vector<ObjectClass> kinds;
  std::vector<ClassForward> methods;
  nb::object forward = nb::str("forward"), data_ptr = nb::str("data_ptr");

  bool same() const {
    for (const auto& [held, size] : sizes)
      if (PyDict_Size(held.ptr()) != size) return false;
    for (const auto& [held, name, value] : places) {
      PyObject* const found = PyDict_GetItemWithError(held.ptr(), name.ptr());  // borrowed; None and nothing are the same
      if (found == value.ptr() || (!found && value.is_none())) continue;
      if (!found) return false;
      const int equal = PyObject_RichCompareBool(found, value.ptr(), Py_EQ);
      if (equal < 0) throw nb::python_error();
      if (!equal) return false;
    }
    for (const auto& [part, kind] : kinds)
      if (reinterpret_cast<PyObject*>(Py_TYPE(part.ptr())) != kind.ptr()) return false;
    for (const auto& [kind, function] : methods)
      if (!nb::getattr(kind, forward).is(function)) return false;
    for (const auto& [held, name, tensor, address] : numbers) {
      if (PyDict_GetItemWithError(held.ptr(), name.ptr()) != tensor.ptr()) return false;
      if (address && nb::cast<uint64_t>(nb::steal(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr.ptr()))) != address) return false;
    }
    return true;
  }
};

// What it holds holds it: without these a model that is gone would stay.
template <class Visit>
int each_held(Watch& of, Visit visit) {
  const auto each = [&](auto& several) {
    for (auto& one : several)
      if (const int stop = std::apply([&](auto&... parts) { return (0 | ... | visit(parts)); }, one)) return stop;
    return 0;
  };
  const int stops[] = {each(of.places), each(of.numbers), each(of.sizes), each(of.kinds), each(of.methods)};
  for (const int stop : stops)
    if (stop) return stop;
  return 0;
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!nb::inst_ready(self)) return 0;
  return each_held(*nb::inst_ptr<Watch>(self), [&](auto& part) {
    if constexpr (std::is_base_of_v<nb::object, std::decay_t<decltype(part)>>)
      return part.ptr() ? visit(part.ptr(), arg) : 0;
    else
      return 0;
  });
}

int clear(PyObject* self) {
  Watch& of = *nb::inst_ptr<Watch>(self);
  const Watch gone = {std::move(of.places), std::move(of.numbers), std::move(of.sizes), std::move(of.kinds), std::move(of.methods)};
  of.places.clear(), of.numbers.clear(), of.sizes.clear(), of.kinds.clear(), of.methods.clear();
  return 0;
}

PyType_Slot watch_slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(traverse)}, {Py_tp_clear, reinterpret_cast<void*>(clear)}, {0, nullptr}};

}  // namespace

void bind_watch(nb::module_& m) {
  nb::class_<Watch>(m, "Watch", nb::type_slots(watch_slots))
      .def_static("make", [](std::vector<HeldObject> places, std::vector<HeldTensor> numbers, std::vector<DictSize> sizes, std::vector<ObjectClass> kinds,
                             std::vector<ClassForward> methods) {
        return Watch{std::move(places), std::move(numbers), std::move(sizes), std::move(kinds), std::move(methods)};
      })
      .def("same", &Watch::same);
}

}  // namespace fate
