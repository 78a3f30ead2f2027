// Python's way to the depthwise convolutions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "common/depthwise.h"
#include "cpu/ops.h"

namespace petite_fast {
namespace {

// samples, channels, (size of x, size of y, stride, padding) of the three axes, channels last
using ShapeArguments = std::tuple<int64_t, int64_t, std::array<std::array<int64_t, 4>, 3>, bool>;

DepthwiseShape shape_of(const ShapeArguments& given, const Operand& x) {
  const auto& [samples, channels, axes, channels_last] = given;
  require(samples > 0, "samples must be positive" + got(samples));
  require(channels > 0, "channels must be positive" + got(channels));
  DepthwiseShape s{samples, channels, {}, channels_last, dtype_of(x)};
  for (int i = 0; i < 3; ++i) {
    const auto& [large, small, stride, padding] = axes[i];
    require(stride == 1 || stride == 2, "stride must be 1 or 2" + got(stride));
    require(padding == 0 || padding == 1, "padding must be 0 or 1" + got(padding));
    const int64_t room = large + 2 * padding - kDepthwiseSide;
    require(large > 0 && room >= 0 && small == room / stride + 1,
            "the sizes of an axis do not fit together" + got(large));
    s.axis[i] = DepthwiseAxis{large, small, stride, padding};
  }
  require(s.dtype == DType::kFloat32 || s.dtype == DType::kBFloat16,
          "tensors must be float32 or bfloat16");
  return s;
}

int64_t elements_of(const DepthwiseShape& s, bool of_y) {
  int64_t elements = s.samples * s.channels;
  for (const DepthwiseAxis& a : s.axis) elements *= of_y ? a.small : a.large;
  return elements;
}

void* pointer_of(const char* name, const Operand& operand, DType dtype, int64_t elements) {
  check_operand(name, operand, elements);
  require(present(operand), std::string(name) + ": must not be null");
  require(dtype_of(operand) == dtype, std::string(name) + ": has another dtype");
  return data_of(operand);
}

void run(const ShapeArguments& shape, bool adjoint, const Operand& source, const Operand& weight,
         const Operand& bias, const Operand& target, int threads) {
  const DepthwiseShape s = shape_of(shape, source);
  require(threads > 0, "threads must be positive" + got(threads));
  const DepthwiseParams p{s,
                          adjoint,
                          pointer_of("source", source, s.dtype, elements_of(s, adjoint)),
                          pointer_of("weight", weight, s.dtype, s.channels * kDepthwiseTaps),
                          present(bias) ? pointer_of("bias", bias, s.dtype, s.channels) : nullptr,
                          pointer_of("target", target, s.dtype, elements_of(s, !adjoint))};
  py::gil_scoped_release release;
  depthwise(p, threads);
}

void grad_weight(const ShapeArguments& shape, const Operand& x, const Operand& grad_y,
                 const Operand& grad, int threads) {
  const DepthwiseShape s = shape_of(shape, x);
  require(threads > 0, "threads must be positive" + got(threads));
  std::vector<float> sums;
  const DepthwiseGradWeightParams p{
      s,
      pointer_of("x", x, s.dtype, elements_of(s, false)),
      pointer_of("grad_y", grad_y, s.dtype, elements_of(s, true)),
      pointer_of("grad_weight", grad, s.dtype, s.channels * kDepthwiseTaps),
      [](void* owner, int64_t floats) {
        auto& memory = *static_cast<std::vector<float>*>(owner);
        memory.assign(floats, 0);
        return memory.data();
      },
      &sums};
  py::gil_scoped_release release;
  depthwise_grad_weight(p, threads);
}

}  // namespace

void bind_depthwise(py::module_& m) {
  m.def("depthwise", &run, "A depthwise convolution or its adjoint. See common/depthwise.h.");
  m.def("depthwise_grad_weight", &grad_weight, "The weight gradient of a depthwise convolution.");
}

}  // namespace petite_fast
