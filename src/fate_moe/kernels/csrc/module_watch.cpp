// Whether objects of Python are what and where they were: layers/snapshot.py asks before each pass, of a thousand things in a large model.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

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

}  // namespace

void bind_watch(nb::module_& m) {
  nb::class_<Watch>(m, "Watch")
      .def_static("make", [](std::vector<HeldObject> places, std::vector<HeldTensor> numbers, std::vector<DictSize> sizes, std::vector<ObjectClass> kinds,
                             std::vector<ClassForward> methods) {
        return Watch{std::move(places), std::move(numbers), std::move(sizes), std::move(kinds), std::move(methods)};
      })
      .def("same", &Watch::same);
}

}  // namespace fate
