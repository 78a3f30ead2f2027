// Python's way to the depthwise convolutions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "common/depthwise.h"
#include "cpu/emulate_depthwise.h"
#include "cpu/ops.h"
#include "cuda/depthwise_plan.h"
#if defined(PF_HAVE_CUDA)
#include "cuda/ops.h"
#endif

namespace petite_fast {
namespace {

// samples, channels, (size of x, size of y, stride, padding) of the three axes, channels last
using ShapeArguments = std::tuple<int64_t, int64_t, std::array<std::array<int64_t, 4>, 3>, bool>;

enum class Device { kCpu, kCuda };

DepthwiseShape shape_of(const ShapeArguments& given, const Operand& x, Device device) {
  const auto& [samples, channels, axes, channels_last] = given;
  require(samples > 0, "samples must be positive" + got(samples));
  require(channels > 0, "channels must be positive" + got(channels));
  DepthwiseShape s{samples, channels, {}, channels_last, dtype_of(x)};
  for (int i = 0; i < 3; ++i) {
    const auto& [large, small, stride, padding] = axes[i];
    require(stride == 1 || stride == 2, "stride must be 1 or 2" + got(stride));
    require(padding >= 0 && (padding <= 1 || device == Device::kCuda),
            "padding must be 0 or 1" + got(padding));
    const int64_t room = large + 2 * padding - kDepthwiseSide;
    require(large > 0 && room >= 0 && small == room / stride + 1,
            "the sizes of an axis do not fit together" + got(large));
    s.axis[i] = DepthwiseAxis{large, small, stride, padding};
  }
  if (device == Device::kCpu) {
    require(s.dtype == DType::kFloat32 || s.dtype == DType::kBFloat16,
            "tensors must be float32 or bfloat16");
    return s;
  }
  require(s.dtype != DType::kFloat64, "tensors must not be float64");
  require(channels_last, "volumes must be channels-last");
  const auto& [d, h, w] = s.axis;
  require(d.stride == h.stride && d.stride == w.stride, "the axes must have one stride");
  const int64_t plane = std::max(h.large, h.small) * std::max(w.large, w.small) * channels;
  require(plane <= kMostPlaneElements, "a plane has too many elements" + got(plane));
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

DepthwiseParams params_of(const DepthwiseShape& s, bool adjoint, const Operand& source,
                          const Operand& weight, const Operand& bias, const Operand& target) {
  return {s,
          adjoint,
          pointer_of("source", source, s.dtype, elements_of(s, adjoint)),
          pointer_of("weight", weight, s.dtype, s.channels * kDepthwiseTaps),
          present(bias) ? pointer_of("bias", bias, s.dtype, s.channels) : nullptr,
          pointer_of("target", target, s.dtype, elements_of(s, !adjoint))};
}

void run(const ShapeArguments& shape, bool adjoint, const Operand& source, const Operand& weight,
         const Operand& bias, const Operand& target, int threads) {
  require(threads > 0, "threads must be positive" + got(threads));
  const DepthwiseParams p =
      params_of(shape_of(shape, source, Device::kCpu), adjoint, source, weight, bias, target);
  py::gil_scoped_release release;
  depthwise(p, threads);
}

void grad_weight(const ShapeArguments& shape, const Operand& x, const Operand& grad_y,
                 const Operand& grad, int threads) {
  const DepthwiseShape s = shape_of(shape, x, Device::kCpu);
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

// Calls fn(params) with what a kernel on the device takes.
template <typename Fn>
void with_params(const ShapeArguments& shape, bool adjoint, const Operand& source,
                 const Operand& weight, const Operand& bias, const Operand& target, const Fn& fn) {
  const DepthwiseParams p =
      params_of(shape_of(shape, source, Device::kCuda), adjoint, source, weight, bias, target);
  py::gil_scoped_release release;
  fn(p);
}

template <typename Fn>
void with_grad_weight_params(const ShapeArguments& shape, const Operand& x, const Operand& grad_y,
                             const Operand& partial, const Operand& grad, const Fn& fn) {
  const DepthwiseShape s = shape_of(shape, x, Device::kCuda);
  const DepthwiseGradWeightCudaParams p =
      plan_grad_weight(s, pointer_of("x", x, s.dtype, elements_of(s, false)),
                       pointer_of("grad_y", grad_y, s.dtype, elements_of(s, true)),
                       static_cast<float*>(pointer_of("partial", partial, DType::kFloat32,
                                                      grad_weight_workspace(s))),
                       pointer_of("grad_weight", grad, s.dtype, s.channels * kDepthwiseTaps));
  py::gil_scoped_release release;
  fn(p);
}

template <typename T>
void add_shared_bytes(const std::string& type, py::dict& bytes) {
  const auto add = [&](const char* kernel, int value) { bytes[py::str(type + kernel)] = value; };
  add(" conv", ConvTile<T, 1>::kSharedBytes);
  add(" conv, stride 2", ConvTile<T, 2>::kSharedBytes);
  add(" adjoint, stride 2", AdjointTile<T>::kSharedBytes);
  add(" grad_weight", GradWeightTile<T, 1>::kSharedBytes);
  add(" grad_weight, stride 2", GradWeightTile<T, 2>::kSharedBytes);
}

py::dict shared_bytes() {
  py::dict bytes;
  add_shared_bytes<float>("float32", bytes);
  add_shared_bytes<BFloat16>("bfloat16", bytes);
  add_shared_bytes<Float16>("float16", bytes);
  return bytes;
}

}  // namespace

void bind_depthwise(py::module_& m, py::module_& testing) {
  m.def("depthwise", &run, "A depthwise convolution or its adjoint. See common/depthwise.h.");
  m.def("depthwise_grad_weight", &grad_weight, "The weight gradient of a depthwise convolution.");
  m.def(
      "depthwise_workspace",
      [](const ShapeArguments& shape, const Operand& x) {
        return grad_weight_workspace(shape_of(shape, x, Device::kCuda));
      },
      "Floats of `partial` in depthwise_grad_weight_cuda.");
#if defined(PF_HAVE_CUDA)
  m.def(
      "depthwise_cuda",
      [](const ShapeArguments& shape, bool adjoint, const Operand& source, const Operand& weight,
         const Operand& bias, const Operand& target, int device, uintptr_t stream) {
        with_params(shape, adjoint, source, weight, bias, target, [&](const DepthwiseParams& p) {
          cuda::launch_depthwise(p, device, reinterpret_cast<void*>(stream));
        });
      },
      "depthwise on a CUDA device, enqueued on `stream`; channels-last, one stride.");
  m.def(
      "depthwise_grad_weight_cuda",
      [](const ShapeArguments& shape, const Operand& x, const Operand& grad_y,
         const Operand& partial, const Operand& grad, int device, uintptr_t stream) {
        with_grad_weight_params(shape, x, grad_y, partial, grad, [&](const auto& p) {
          cuda::launch_depthwise_grad_weight(p, device, reinterpret_cast<void*>(stream));
        });
      },
      "depthwise_grad_weight on a CUDA device, enqueued on `stream`.");
#endif
  testing.def(
      "emulate_depthwise",
      [](const ShapeArguments& shape, bool adjoint, const Operand& source, const Operand& weight,
         const Operand& bias, const Operand& target) {
        with_params(shape, adjoint, source, weight, bias, target, emulate_depthwise);
      },
      "The phases of depthwise_cuda on the host.");
  testing.def(
      "emulate_depthwise_grad_weight",
      [](const ShapeArguments& shape, const Operand& x, const Operand& grad_y,
         const Operand& partial, const Operand& grad) {
        with_grad_weight_params(shape, x, grad_y, partial, grad, emulate_depthwise_grad_weight);
      },
      "The phases of depthwise_grad_weight_cuda on the host.");
  testing.def("depthwise_shared_bytes", &shared_bytes, "Of a block of each CUDA kernel.");
}

}  // namespace petite_fast
