// What the bindings share: how a tensor comes from Python, and how a wrong one ends.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "common/dtype.h"

namespace petite_fast {

namespace py = pybind11;

inline void require(bool condition, const std::string& message) {
  if (!condition) throw py::value_error(message);
}

inline std::string got(int64_t value) { return ", got " + std::to_string(value); }

// A dense tensor as Python passes it: address, element-type code, number of elements. The address 0
// means absent.
using Operand = std::tuple<uintptr_t, int, int64_t>;

inline bool present(const Operand& operand) { return std::get<0>(operand) != 0; }

inline void* data_of(const Operand& operand) {
  return reinterpret_cast<void*>(std::get<0>(operand));
}

inline DType dtype_of(const Operand& operand) { return static_cast<DType>(std::get<1>(operand)); }

// A wrong shape must end here, not as a read past the end of a tensor.
inline void check_operand(const char* name, const Operand& operand, int64_t elements) {
  const std::string prefix = std::string(name) + ": ";
  const int code = std::get<1>(operand);
  require(code >= 0 && code < kDTypeCount, prefix + "dtype code must be 0 to 3" + got(code));
  require(
      !present(operand) || std::get<2>(operand) == elements,
      prefix + "must have " + std::to_string(elements) + " elements" + got(std::get<2>(operand)));
}

// A tensor that must be there: `elements` elements of the given type.
inline void* data_of_type(const char* name, const Operand& operand, DType dtype,
                          const char* type_name, int64_t elements) {
  check_operand(name, operand, elements);
  require(present(operand), std::string(name) + ": must not be null");
  require(dtype_of(operand) == dtype, std::string(name) + ": must " + type_name);
  return data_of(operand);
}

inline float* floats_of(const char* name, const Operand& operand, int64_t elements) {
  return static_cast<float*>(data_of_type(name, operand, DType::kFloat32, "be float32", elements));
}

// bindings_bottleneck.cpp
void bind_bottleneck(py::module_& m);
// bindings_conv_halo.cpp
void bind_conv_halo(py::module_& m, py::module_& testing);

// bindings_low_rank.cpp
void bind_low_rank(py::module_& m);
// bindings_depthwise.cpp
void bind_depthwise(py::module_& m, py::module_& testing);

// bindings_norm_act.cpp
void bind_norm_act(py::module_& m, py::module_& testing);

// bindings_shuffle.cpp
void bind_shuffle(py::module_& m);

// bindings_stem.cpp
void bind_stem(py::module_& m);

}  // namespace petite_fast
