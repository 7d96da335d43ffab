// The Python face of the experts' memory.
#pragma once
#include <nanobind/nanobind.h>

void bind_residency(nanobind::module_& m);
