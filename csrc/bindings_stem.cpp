// Python's way to the convolution of few channels and its gradients.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>

#include "bindings.h"
#include "common/shift_add.h"
#include "common/stem.h"
#include "cpu/ops.h"

namespace petite_fast {
namespace {

using Triple = std::array<int64_t, 3>;
// batch, C and O; spatial input; kernel, stride, padding, dilation
using StemArguments = std::tuple<Triple, Triple, Triple, Triple, Triple, Triple>;

StemParams params_of(const StemArguments& given) {
  const auto& [sizes, input, kernel, stride, padding, dilation] = given;
  StemParams p{};
  p.batch = sizes[0];
  p.geometry.in_channels = sizes[1];
  p.geometry.out_channels = sizes[2];
  p.geometry.groups = 1;
  for (int i = 0; i < 3; ++i) {
    require(sizes[i] > 0 && input[i] > 0, "sizes must be positive" + got(sizes[i]));
    require(kernel[i] > 0 && stride[i] > 0 && dilation[i] > 0 && padding[i] >= 0,
            "kernel, stride and dilation must be positive, padding not negative");
    p.input[i] = input[i];
    p.geometry.kernel[i] = kernel[i];
    p.geometry.stride[i] = stride[i];
    p.geometry.padding[i] = padding[i];
    p.geometry.dilation[i] = dilation[i];
    const int64_t reach = dilation[i] * (kernel[i] - 1);
    require(input[i] + 2 * padding[i] > reach, "the kernel must fit the input" + got(input[i]));
    p.output[i] = output_size(p.geometry, i, input[i]);
  }
  const int64_t taps = stem_taps(p.geometry);
  require(taps <= kStemMaxTaps, "too many taps" + got(taps));
  return p;
}

int64_t voxels(const int64_t* size) { return size[0] * size[1] * size[2]; }

}  // namespace

void bind_stem(py::module_& m) {
  m.attr("STEM_MAX_TAPS") = kStemMaxTaps;
  m.def(
      "stem_workspace",
      [](const StemArguments& given, bool gradient, int threads) {
        StemParams p = params_of(given);
        const float one = 0;
        p.grad_y = gradient ? &one : nullptr;
        require(threads > 0, "threads must be positive" + got(threads));
        return stem_workspace(p, threads);
      },
      "How many floats a call works on.");
  m.def(
      "stem",
      [](const StemArguments& given, const Operand& x, const Operand& weight, const Operand& bias,
         const Operand& grad_y, const Operand& out, const Operand& workspace, int threads) {
        StemParams p = params_of(given);
        const int64_t outputs = p.geometry.out_channels;
        const int64_t weights = outputs * stem_taps(p.geometry);
        const int64_t elements = p.batch * outputs * voxels(p.output);
        require(threads > 0, "threads must be positive" + got(threads));
        require(present(weight) != present(grad_y), "either weight or grad_y must be given");
        p.x = floats_of("x", x, p.batch * p.geometry.in_channels * voxels(p.input));
        if (present(grad_y)) {
          p.grad_y = floats_of("grad_y", grad_y, elements);
        } else {
          p.weight = floats_of("weight", weight, weights);
          if (present(bias)) p.bias = floats_of("bias", bias, outputs);
        }
        p.out = floats_of("out", out, present(grad_y) ? weights : elements);
        p.workspace = floats_of("workspace", workspace, stem_workspace(p, threads));
        py::gil_scoped_release release;
        stem(p, threads);
      },
      "A convolution of few channels, or its weight gradient. See common/stem.h.");
  m.def(
      "shift_add",
      [](const StemArguments& given, int64_t first, int64_t rows, const Operand& matrix,
         const Operand& grad_x, int threads) {
        const StemParams shape = params_of(given);
        ShiftAddParams p{};
        p.geometry = shape.geometry;
        std::copy(shape.input, shape.input + 3, p.input);
        std::copy(shape.output, shape.output + 3, p.output);
        require(threads > 0, "threads must be positive" + got(threads));
        require(first >= 0 && rows > 0 && rows <= p.output[0] * p.output[1] - first,
                "rows must be some of the output's" + got(rows));
        p.first = first;
        p.rows = rows;
        p.matrix = floats_of("matrix", matrix, stem_taps(p.geometry) * rows * p.output[2]);
        p.grad_x = floats_of("grad_x", grad_x, p.geometry.in_channels * voxels(p.input));
        py::gil_scoped_release release;
        shift_add(p, threads);
      },
      "Add a product's rows to grad_x, each at its tap's place. See common/shift_add.h.");
}

}  // namespace petite_fast
