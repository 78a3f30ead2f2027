// Python's way to the bottleneck adapter on volumes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "common/bottleneck.h"
#include "cpu/ops.h"

namespace petite_fast {
namespace {

using Sizes = std::array<int64_t, 4>;  // N, C, H, voxels

BottleneckParams params_of(const Sizes& sizes, int threads) {
  for (int64_t size : sizes) require(size > 0, "sizes must be positive" + got(size));
  require(threads > 0, "threads must be positive" + got(threads));
  BottleneckParams p{};
  p.batch = sizes[0];
  p.channels = sizes[1];
  p.hidden = sizes[2];
  p.voxels = sizes[3];
  return p;
}

void* volume(const char* name, const Operand& operand, const BottleneckParams& p) {
  const int64_t elements = p.batch * p.channels * p.voxels;
  return data_of_type(name, operand, p.dtype, "have the dtype of x", elements);
}

}  // namespace

void bind_bottleneck(py::module_& m) {
  m.def(
      "bottleneck_workspace",
      [](const Sizes& sizes, int threads) {
        return bottleneck_workspace(params_of(sizes, threads), threads);
      },
      "How many floats a call works on.");
  m.def(
      "bottleneck",
      [](const Sizes& sizes, int activation, const Operand& x, const Operand& grad_y,
         const Operand& out, const Operand& down, const Operand& down_bias, const Operand& up,
         const Operand& up_bias, const Operand& grads, const Operand& workspace, int threads) {
        BottleneckParams p = params_of(sizes, threads);
        require(activation == 0 || activation == 1, "activation must be 0 or 1" + got(activation));
        p.activation = static_cast<BottleneckActivation>(activation);
        p.dtype = dtype_of(x);
        require(p.dtype == DType::kFloat32 || p.dtype == DType::kBFloat16,
                "x: must be float32 or bfloat16");
        p.x = volume("x", x, p);
        p.out = volume("out", out, p);
        p.down = floats_of("down", down, p.hidden * p.channels);
        p.down_bias = floats_of("down_bias", down_bias, p.hidden);
        p.up = floats_of("up", up, p.hidden * p.channels);
        if (present(grad_y)) {
          p.grad_y = volume("grad_y", grad_y, p);
          p.grads = floats_of("grads", grads, bottleneck_gradients(p));
        } else {
          p.up_bias = floats_of("up_bias", up_bias, p.channels);
        }
        p.workspace = floats_of("workspace", workspace, bottleneck_workspace(p, threads));
        py::gil_scoped_release release;
        bottleneck(p, threads);
      },
      "The bottleneck adapter's forward, or its backward where grad_y is given.");
}

}  // namespace petite_fast
