// Python's way to the CUDA convolution that reads its input once.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "bindings.h"
#include "common/conv_halo.h"
#include "cpu/emulate_block.h"
#include "cpu/ops.h"
#if defined(PF_HAVE_CUDA)
#include "cuda/ops.h"
#endif

namespace petite_fast {
namespace {

using Triple = std::array<int64_t, 3>;
// batch, C and O; spatial input; padding
using ConvHaloArguments = std::tuple<Triple, Triple, Triple>;

void* data(const char* name, const Operand& operand, DType dtype, int64_t elements,
           uintptr_t alignment = 16) {
  check_operand(name, operand, elements);
  const std::string prefix = std::string(name) + ": ";
  require(present(operand), prefix + "must not be null");
  require(dtype_of(operand) == dtype, prefix + "must have the dtype of x");
  require(std::get<0>(operand) % alignment == 0,
          prefix + "its address must be a multiple of " + std::to_string(alignment));
  return data_of(operand);
}

ConvHaloParams params_of(const ConvHaloArguments& given, const Operand& x, const Operand& weight,
                         const Operand& bias, const Operand& y) {
  const auto& [sizes, input, padding] = given;
  ConvHaloParams p{};
  int64_t inputs = 1;
  int64_t outputs = 1;
  for (int i = 0; i < 3; ++i) {
    require(sizes[i] > 0 && sizes[i] <= INT32_MAX, "sizes must be positive int32" + got(sizes[i]));
    require(padding[i] >= 0 && padding[i] <= 2, "padding must be 0 to 2" + got(padding[i]));
    require(input[i] > 0 && input[i] < INT32_MAX - 16,
            "sizes must be positive int32" + got(input[i]));
    p.input[i] = static_cast<int32_t>(input[i]);
    p.padding[i] = static_cast<int32_t>(padding[i]);
    p.output[i] = p.input[i] + 2 * p.padding[i] - 2;
    require(p.output[i] > 0, "the kernel must fit the input" + got(input[i]));
    inputs *= p.input[i];
    outputs *= p.output[i];
  }
  require(sizes[1] % 16 == 0 && sizes[2] % 16 == 0, "channels must be multiples of 16, got " +
                                                        std::to_string(sizes[1]) + " and " +
                                                        std::to_string(sizes[2]));
  p.batch = sizes[0];
  p.in_channels = static_cast<int32_t>(sizes[1]);
  p.out_channels = static_cast<int32_t>(sizes[2]);
  require(conv_halo_fits(p), "x: six planes must fit 32 bits");
  p.dtype = dtype_of(x);
  require(p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16,
          "x: must be bfloat16 or float16");
  p.x = data("x", x, p.dtype, sizes[0] * sizes[1] * inputs);
  p.weight = data("weight", weight, p.dtype, 27 * sizes[1] * sizes[2]);
  if (present(bias)) p.bias = data("bias", bias, p.dtype, sizes[2], 2);
  p.y = data("y", y, p.dtype, sizes[0] * sizes[2] * outputs);
  return p;
}

}  // namespace

void bind_conv_halo(py::module_& m, py::module_& testing) {
#if defined(PF_HAVE_CUDA)
  m.def(
      "conv_halo_cuda",
      [](const ConvHaloArguments& given, const Operand& x, const Operand& weight,
         const Operand& bias, const Operand& y, int device, uintptr_t stream) {
        const ConvHaloParams p = params_of(given, x, weight, bias, y);
        require(device >= 0, "device must not be negative" + got(device));
        py::gil_scoped_release release;
        cuda::launch_conv_halo(p, device, reinterpret_cast<void*>(stream));
      },
      "A convolution of kernel 3 on a CUDA device, enqueued. See common/conv_halo.h.");
#else
  (void)m;
#endif
  testing.def(
      "emulate_conv_halo",
      [](const ConvHaloArguments& given, const Operand& x, const Operand& weight,
         const Operand& bias, const Operand& y) {
        const ConvHaloParams p = params_of(given, x, weight, bias, y);
        const BlockCounts counts = emulate_conv_halo(p);
        return std::make_tuple(counts.shared_clocks, counts.conflicts, counts.products);
      },
      "The CUDA kernel on the host: clocks of shared memory, those lost to bank conflicts, and"
      " matrix instructions.");
}

}  // namespace petite_fast
