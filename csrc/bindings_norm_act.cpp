// Python's way to norm_act and to the bits that it keeps.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "bindings.h"
#include "common/norm_act.h"
#include "common/norm_act_octets.h"
#include "cpu/ops.h"
#if defined(PF_HAVE_CUDA)
#include "cuda/ops.h"
#endif

namespace petite_fast {
namespace {

// (outer, channels, inner, groups), norm, channels last, activation first, eps
using ShapeArguments = std::tuple<std::array<int64_t, 4>, int, bool, bool, double>;
// weight, bias, slopes, slope, indices of the kept channels
using AffineArguments = std::tuple<Operand, Operand, Operand, double, Operand>;

// Null, or `elements` elements of the given type. Bytes and indices have the code of floats.
template <typename T>
T* pointer_of(const char* name, const Operand& operand, DType dtype, int64_t elements) {
  check_operand(name, operand, elements);
  require(!present(operand) || dtype_of(operand) == dtype,
          std::string(name) + ": has another dtype than it must");
  return static_cast<T*>(data_of(operand));
}

template <typename T = float>
T* floats(const char* name, const Operand& operand, int64_t elements) {
  return pointer_of<T>(name, operand, DType::kFloat32, elements);
}

// What every kernel asks of a shape; see check_cpu and check_cuda.
NormActShape any_shape_of(const ShapeArguments& given, const Operand& x) {
  const auto& [sizes, norm, channels_last, act_first, eps] = given;
  require(norm >= 0 && norm < kNormCount, "norm code must be 0 to 3" + got(norm));
  for (int64_t size : sizes) require(size > 0, "sizes must be positive" + got(size));
  NormActShape s{sizes[0],
                 sizes[1],
                 sizes[2],
                 sizes[3],
                 static_cast<Norm>(norm),
                 channels_last,
                 act_first,
                 static_cast<float>(eps),
                 dtype_of(x)};
  require(s.channels % s.groups == 0, "groups must divide the channels" + got(s.groups));
  require(s.norm != Norm::kLayer || (channels_last && s.outer == 1),
          "layer norm: channels must be last and outer 1");
  return s;
}

NormActShape shape_of(const ShapeArguments& given, const Operand& x) {
  const NormActShape s = any_shape_of(given, x);
  require(s.dtype == DType::kFloat32 || s.dtype == DType::kBFloat16,
          "x must be float32 or bfloat16");
  if (s.channels_last) {
    require(s.channels <= kNormMaxChannels, "too many channels" + got(s.channels));
    require(s.norm == Norm::kLayer || s.norm == Norm::kFixed ||
                (s.norm == Norm::kGroup && s.groups == s.channels),
            "channels last: statistics must be per row, per channel of a sample, or fixed");
  }
  return s;
}

NormActShape cuda_shape_of(const ShapeArguments& given, const Operand& x) {
  const NormActShape s = any_shape_of(given, x);
  require(s.dtype != DType::kFloat64, "x must not be float64");
  require(s.norm != Norm::kLayer, "no CUDA kernel for a layer norm");
  require(s.channels_last || s.channels == 1, "channels must be last");
  return s;
}

int64_t elements_of(const NormActShape& s) { return s.outer * s.channels * s.inner; }

int64_t sign_bytes(const NormActShape& s) {
  return s.outer * (s.channels_last ? s.inner : s.channels) * sign_row_bytes(s);
}

NormActAffine affine_of(const AffineArguments& given, int64_t channels) {
  return NormActAffine{floats<const float>("weight", std::get<0>(given), channels),
                       floats<const float>("bias", std::get<1>(given), channels),
                       floats<const float>("slopes", std::get<2>(given), channels),
                       static_cast<float>(std::get<3>(given))};
}

KeptChannels kept_on_device(const AffineArguments& given) {
  const Operand& operand = std::get<4>(given);
  return KeptChannels{static_cast<const int64_t*>(data_of(operand)), std::get<2>(operand)};
}

KeptChannels kept_of(const AffineArguments& given, int64_t channels) {
  const KeptChannels kept = kept_on_device(given);
  for (int64_t i = 0; i < kept.count; ++i) {
    require(kept.index[i] < channels && kept.index[i] > (i == 0 ? -1 : kept.index[i - 1]),
            "kept channels must ascend and exist" + got(kept.index[i]));
  }
  return kept;
}

double* workspace_of(const Operand& workspace, const NormActShape& s) {
  require(present(workspace), "workspace must not be null");
  return pointer_of<double>("workspace", workspace, DType::kFloat64, norm_act_workspace(s));
}

NormActForward forward_of(const NormActShape& s, const AffineArguments& affine,
                          const KeptChannels& kept, const Operand& x, const Operand& residual,
                          const Operand& y, const Operand& mean, const Operand& var,
                          const Operand& xhat, const Operand& signs, double* workspace) {
  const int64_t elements = elements_of(s), statistics = statistics_count(s);
  const int64_t kept_elements = kept.count > 0 ? s.outer * kept.count * s.inner : elements;
  require(present(x) && present(y) && present(mean) && present(var),
          "x, y, mean and var must not be null");
  require(kept.count == 0 || present(xhat), "kept channels need xhat");
  return NormActForward{s,
                        affine_of(affine, s.channels),
                        kept,
                        pointer_of<const void>("x", x, s.dtype, elements),
                        pointer_of<const void>("residual", residual, s.dtype, elements),
                        pointer_of<void>("y", y, s.dtype, elements),
                        floats("mean", mean, statistics),
                        floats("var", var, statistics),
                        pointer_of<void>("xhat", xhat, s.dtype, kept_elements),
                        floats<uint8_t>("signs", signs, sign_bytes(s)),
                        workspace};
}

void forward(const ShapeArguments& shape, const AffineArguments& affine, const Operand& x,
             const Operand& residual, const Operand& y, const Operand& mean, const Operand& var,
             const Operand& xhat, const Operand& signs, const Operand& workspace, int threads) {
  const NormActShape s = shape_of(shape, x);
  const NormActForward p = forward_of(s, affine, kept_of(affine, s.channels), x, residual, y, mean,
                                      var, xhat, signs, workspace_of(workspace, s));
  require(threads > 0, "threads must be positive" + got(threads));
  py::gil_scoped_release release;
  norm_act(p, threads);
}

NormActBackward backward_of(const NormActShape& s, const AffineArguments& affine,
                            const KeptChannels& kept, int source, const Operand& grad_y,
                            const Operand& y, const Operand& xhat, const Operand& residual,
                            const Operand& signs, const Operand& var, const Operand& grad_x,
                            const Operand& grad_residual, const Operand& grad_weight,
                            const Operand& grad_bias, double* workspace) {
  const int64_t elements = elements_of(s);
  const int64_t kept_elements = kept.count > 0 ? s.outer * kept.count * s.inner : elements;
  const bool from_y = source == static_cast<int>(NormSource::kY);
  require(source >= 0 && source < kNormSourceCount, "source code must be 0 to 2" + got(source));
  require(present(grad_y) && present(var), "grad_y and var must not be null");
  require(present(y) == from_y, "y comes with its source code");
  require(present(xhat) == (from_y ? kept.count > 0 : source != 0), "xhat does not fit the source");
  require(from_y || kept.count == 0, "kept channels come with y");
  require(!present(grad_weight) || source != 0, "grad_weight needs xhat");
  require(!present(grad_x) || source != 0 || s.norm == Norm::kFixed, "grad_x needs xhat");
  return NormActBackward{s,
                         affine_of(affine, s.channels),
                         kept,
                         static_cast<NormSource>(source),
                         pointer_of<const void>("grad_y", grad_y, s.dtype, elements),
                         pointer_of<const void>("y", y, s.dtype, elements),
                         pointer_of<const void>("xhat", xhat, s.dtype, kept_elements),
                         pointer_of<const void>("residual", residual, s.dtype, elements),
                         floats<const uint8_t>("signs", signs, sign_bytes(s)),
                         floats<const float>("var", var, statistics_count(s)),
                         pointer_of<void>("grad_x", grad_x, s.dtype, elements),
                         pointer_of<void>("grad_residual", grad_residual, s.dtype, elements),
                         floats("grad_weight", grad_weight, s.channels),
                         floats("grad_bias", grad_bias, s.channels),
                         workspace};
}

void backward(const ShapeArguments& shape, const AffineArguments& affine, int source,
              const Operand& grad_y, const Operand& y, const Operand& xhat, const Operand& residual,
              const Operand& signs, const Operand& var, const Operand& grad_x,
              const Operand& grad_residual, const Operand& grad_weight, const Operand& grad_bias,
              const Operand& workspace, int threads) {
  const NormActShape s = shape_of(shape, grad_y);
  const NormActBackward p =
      backward_of(s, affine, kept_of(affine, s.channels), source, grad_y, y, xhat, residual, signs,
                  var, grad_x, grad_residual, grad_weight, grad_bias, workspace_of(workspace, s));
  require(threads > 0, "threads must be positive" + got(threads));
  py::gil_scoped_release release;
  norm_act_backward(p, threads);
}

// The CUDA kernels and their emulation on the host, with blocks of `threads`. The indices of kept
// channels lie on the device: they are not looked at.
int64_t cuda_workspace(const ShapeArguments& shape, const Operand& x, int threads) {
  require(threads > 0, "threads must be positive" + got(threads));
  const NormActShape s = cuda_shape_of(shape, x);
  return norm_act_cuda_workspace(s, norm_act_grid(s, threads));
}

KeptChannels cuda_kept(const NormActShape& s, const AffineArguments& affine) {
  const KeptChannels kept = kept_on_device(affine);
  require(kept.count == 0 || s.channels_last, "kept channels need channels-last memory");
  return kept;
}

double* cuda_workspace_of(const ShapeArguments& shape, const Operand& x, const Operand& workspace,
                          int threads) {
  require(present(workspace), "workspace must not be null");
  return pointer_of<double>("workspace", workspace, DType::kFloat64,
                            cuda_workspace(shape, x, threads));
}

// x, residual, y, mean, var, xhat, signs, workspace
using ForwardTensors = std::array<Operand, 8>;

NormActForward cuda_forward_of(const ShapeArguments& shape, const AffineArguments& affine,
                               const ForwardTensors& t, int threads) {
  const NormActShape s = cuda_shape_of(shape, t[0]);
  return forward_of(s, affine, cuda_kept(s, affine), t[0], t[1], t[2], t[3], t[4], t[5], t[6],
                    cuda_workspace_of(shape, t[0], t[7], threads));
}

// grad_y, y, xhat, residual, signs, var, grad_x, grad_residual, grad_weight, grad_bias, workspace
using BackwardTensors = std::array<Operand, 11>;

NormActBackward cuda_backward_of(const ShapeArguments& shape, const AffineArguments& affine,
                                 int source, const BackwardTensors& t, int threads) {
  const NormActShape s = cuda_shape_of(shape, t[0]);
  return backward_of(s, affine, cuda_kept(s, affine), source, t[0], t[1], t[2], t[3], t[4], t[5],
                     t[6], t[7], t[8], t[9], cuda_workspace_of(shape, t[0], t[10], threads));
}

SignRows any_sign_rows(int64_t rows, int64_t length, const Operand& values, const Operand& bits) {
  require(rows > 0 && length > 0, "rows and length must be positive" + got(rows * length));
  require(present(values) && present(bits), "values and bits must not be null");
  check_operand("values", values, rows * length);
  require(dtype_of(values) != DType::kFloat64, "values must not be float64");
  uint8_t* data = floats<uint8_t>("bits", bits, rows * norm_divide_up(length, 8));
  return SignRows{
      rows, length, dtype_of(values), data_of(values), static_cast<uint8_t*>(data_of(values)),
      data};
}

SignRows sign_rows(int64_t rows, int64_t length, const Operand& values, const Operand& bits,
                   int threads) {
  require(threads > 0, "threads must be positive" + got(threads));
  require(dtype_of(values) != DType::kFloat16, "values must be float32 or bfloat16");
  return any_sign_rows(rows, length, values, bits);
}

void bind_emulation(py::module_& testing) {
  testing.def("norm_act_workspace", &cuda_workspace);
  testing.def("emulate_norm_act", [](const ShapeArguments& shape, const AffineArguments& affine,
                                     const ForwardTensors& tensors, int threads) {
    const NormActForward p = cuda_forward_of(shape, affine, tensors, threads);
    py::gil_scoped_release release;
    emulate_norm_act(p, threads);
  });
  testing.def("emulate_norm_act_backward",
              [](const ShapeArguments& shape, const AffineArguments& affine, int source,
                 const BackwardTensors& tensors, int threads) {
                const NormActBackward p = cuda_backward_of(shape, affine, source, tensors, threads);
                py::gil_scoped_release release;
                emulate_norm_act_backward(p, threads);
              });
  testing.def("emulate_pack_signs",
              [](int64_t rows, int64_t length, const Operand& values, const Operand& bits) {
                emulate_pack_signs(any_sign_rows(rows, length, values, bits));
              });
  testing.def("emulate_unpack_signs",
              [](int64_t rows, int64_t length, const Operand& bits, const Operand& positive) {
                emulate_unpack_signs(any_sign_rows(rows, length, positive, bits));
              });
}

#if defined(PF_HAVE_CUDA)
void bind_cuda(py::module_& m) {
  m.def("norm_act_cuda_workspace", [](const ShapeArguments& shape, const Operand& x) {
    return cuda_workspace(shape, x, kNormThreads);
  });
  m.def("norm_act_cuda", [](const ShapeArguments& shape, const AffineArguments& affine,
                            const ForwardTensors& tensors, int device, uintptr_t stream) {
    const NormActForward p = cuda_forward_of(shape, affine, tensors, kNormThreads);
    py::gil_scoped_release release;
    cuda::launch_norm_act(p, device, reinterpret_cast<void*>(stream));
  });
  m.def("norm_act_backward_cuda",
        [](const ShapeArguments& shape, const AffineArguments& affine, int source,
           const BackwardTensors& tensors, int device, uintptr_t stream) {
          const NormActBackward p = cuda_backward_of(shape, affine, source, tensors, kNormThreads);
          py::gil_scoped_release release;
          cuda::launch_norm_act_backward(p, device, reinterpret_cast<void*>(stream));
        });
  m.def("pack_signs_cuda", [](int64_t rows, int64_t length, const Operand& values,
                              const Operand& bits, int device, uintptr_t stream) {
    const SignRows p = any_sign_rows(rows, length, values, bits);
    py::gil_scoped_release release;
    cuda::launch_pack_signs(p, device, reinterpret_cast<void*>(stream));
  });
  m.def("unpack_signs_cuda", [](int64_t rows, int64_t length, const Operand& bits,
                                const Operand& positive, int device, uintptr_t stream) {
    const SignRows p = any_sign_rows(rows, length, positive, bits);
    py::gil_scoped_release release;
    cuda::launch_unpack_signs(p, device, reinterpret_cast<void*>(stream));
  });
}
#endif

}  // namespace

void bind_norm_act(py::module_& m, py::module_& testing) {
  bind_emulation(testing);
#if defined(PF_HAVE_CUDA)
  bind_cuda(m);
#endif
  m.def("norm_act", &forward, "y, statistics and what the backward needs. See common/norm_act.h.");
  m.def("norm_act_backward", &backward, "The gradients of norm_act, those that are not null.");
  m.def(
      "norm_act_workspace",
      [](const ShapeArguments& shape, const Operand& x) {
        return norm_act_workspace(shape_of(shape, x));
      },
      "How many doubles a call works on.");
  m.attr("NORM_ACT_MAX_CHANNELS") = kNormMaxChannels;
  m.def(
      "pack_signs",
      [](int64_t rows, int64_t length, const Operand& values, const Operand& bits, int threads) {
        const SignRows p = sign_rows(rows, length, values, bits, threads);
        py::gil_scoped_release release;
        pack_signs(p, threads);
      },
      "The signs of rows of elements, eight in a byte.");
  m.def(
      "unpack_signs",
      [](int64_t rows, int64_t length, const Operand& bits, const Operand& positive, int threads) {
        const SignRows p = sign_rows(rows, length, positive, bits, threads);
        py::gil_scoped_release release;
        unpack_signs(p, threads);
      },
      "One byte per sign: 1 where the element was positive.");
}

}  // namespace petite_fast
