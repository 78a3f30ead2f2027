// Python's way to low_rank.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>

#include "bindings.h"
#include "common/low_rank.h"
#include "cpu/ops.h"

namespace petite_fast {
namespace {

using Triple = std::array<int64_t, 3>;
// (batch, channels, outputs, rank), input, output, kernel, stride, padding
using ShapeArguments = std::tuple<std::array<int64_t, 4>, Triple, Triple, Triple, Triple, Triple>;
// the tensor, whether its channels are last in memory
using VolumeArguments = std::tuple<Operand, bool>;

LowRankShape shape_of(const ShapeArguments& given) {
  const auto& [sizes, input, output, kernel, stride, padding] = given;
  for (int64_t size : sizes) require(size > 0, "sizes must be positive" + got(size));
  LowRankShape s{sizes[0], sizes[1], sizes[2], sizes[3], {}, {}, {}, {}, {}};
  for (int i = 0; i < 3; ++i) {
    require(input[i] > 0 && kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && output[i] > 0,
            "sizes must be positive");
    require(output[i] == (input[i] + 2 * padding[i] - kernel[i]) / stride[i] + 1 &&
                input[i] + 2 * padding[i] >= kernel[i],
            "output does not fit the geometry" + got(output[i]));
    s.input[i] = input[i];
    s.output[i] = output[i];
    s.kernel[i] = kernel[i];
    s.stride[i] = stride[i];
    s.padding[i] = padding[i];
  }
  require(kernel[0] * kernel[1] * kernel[2] <= kLowRankMaxTaps, "too many taps");
  return s;
}

int64_t voxels(const int64_t* size) { return size[0] * size[1] * size[2]; }

LowRankVolume volume_of(const char* name, const VolumeArguments& given, int64_t elements) {
  const auto& [operand, channels_last] = given;
  check_operand(name, operand, elements);
  const DType dtype = dtype_of(operand);
  require(dtype == DType::kFloat32 || dtype == DType::kBFloat16,
          std::string(name) + ": must be float32 or bfloat16");
  return {data_of(operand), dtype, channels_last};
}

float* floats(const char* name, const Operand& operand, int64_t elements) {
  check_operand(name, operand, elements);
  require(!present(operand) || dtype_of(operand) == DType::kFloat32,
          std::string(name) + ": must be float32");
  return static_cast<float*>(data_of(operand));
}

bool run(const ShapeArguments& shape, const VolumeArguments& x, const VolumeArguments& grad_y,
         const VolumeArguments& t, const Operand& a, const Operand& b, const Operand& grad_a,
         const Operand& grad_b, const Operand& grad_bias, const Operand& workspace, int threads) {
  require(threads > 0, "threads must be positive" + got(threads));
  const LowRankShape s = shape_of(shape);
  const int64_t outputs = s.batch * voxels(s.output);
  const int64_t taps = voxels(s.kernel);
  bool finite = true;
  const LowRankParams p{s,
                        volume_of("x", x, s.batch * s.channels * voxels(s.input)),
                        volume_of("grad_y", grad_y, outputs * s.outputs),
                        volume_of("t", t, outputs * s.rank),
                        floats("a", a, s.channels * taps * s.rank),
                        floats("b", b, s.outputs * s.rank),
                        floats("grad_a", grad_a, s.rank * s.channels * taps),
                        floats("grad_b", grad_b, s.outputs * s.rank),
                        floats("grad_bias", grad_bias, s.outputs),
                        floats("workspace", workspace, low_rank_workspace(s, threads)),
                        &finite};
  require(p.workspace != nullptr, "workspace must not be null");
  const bool forward = p.grad_y.data == nullptr;
  require(!forward || p.t.data != nullptr, "t or grad_y must be given");
  const bool makes_t = forward || (p.grad_b != nullptr && p.t.data == nullptr);
  require(!makes_t || (p.x.data != nullptr && p.a != nullptr), "t needs x and a");
  require(p.grad_a == nullptr || p.x.data != nullptr, "grad_a needs x");
  require(p.grad_a == nullptr || p.b != nullptr || s.outputs == s.rank,
          "without b, outputs and rank must agree" + got(s.outputs));
  py::gil_scoped_release release;
  low_rank(p, threads);
  return finite;
}

}  // namespace

void bind_low_rank(py::module_& m) {
  m.def("low_rank", &run,
        "The products of common/low_rank.h, those that are not null; whether they are finite.");
  m.def(
      "low_rank_workspace",
      [](const ShapeArguments& shape, int threads) {
        require(threads > 0, "threads must be positive" + got(threads));
        return low_rank_workspace(shape_of(shape), threads);
      },
      "How many floats a call works on.");
}

}  // namespace petite_fast
