// Objects of Python that C++ keeps.
#pragma once
#include <nanobind/nanobind.h>

#include <utility>

namespace fate {

// An object that may be let go by a thread without the interpreter's lock.
class Held {
 public:
  explicit Held(nanobind::object object) : object_(std::move(object)) {}
  ~Held() {
    if (!Py_IsInitialized()) {
      object_.release();
      return;
    }
    const nanobind::gil_scoped_acquire acquire;
    object_.reset();
  }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  const nanobind::object& operator*() const { return object_; }

 private:
  nanobind::object object_;
};

}  // namespace fate
