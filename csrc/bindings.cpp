// The module. This file and bindings_*.cpp are the only ones that know Python. They turn integers
// into plain structs, check them (a wrong argument is a ValueError) and call the operator without
// the interpreter lock.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/compress.h"
#include "common/conv_geometry.h"
#include "common/effective_weight.h"
#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#if defined(PF_HAVE_CUDA)
#include "cuda/ops.h"
#endif

namespace py = pybind11;

namespace petite_fast {
namespace {

using Triple = std::array<int64_t, 3>;

void copy_triple(const Triple& source, int64_t* target) {
  for (int i = 0; i < 3; ++i) target[i] = source[i];
}

ConvGeometry geometry_of(int64_t in_channels, int64_t out_channels, int64_t groups,
                         const Triple& kernel, bool transposed) {
  require(in_channels > 0, "in_channels must be positive" + got(in_channels));
  require(out_channels > 0, "out_channels must be positive" + got(out_channels));
  require(groups > 0 && in_channels % groups == 0 && out_channels % groups == 0,
          "groups must divide in_channels and out_channels" + got(groups));
  ConvGeometry g{};
  g.in_channels = in_channels;
  g.out_channels = out_channels;
  g.groups = groups;
  g.transposed = transposed;
  copy_triple(kernel, g.kernel);
  for (int i = 0; i < 3; ++i) {
    require(kernel[i] > 0, "kernel sizes must be positive" + got(kernel[i]));
    g.stride[i] = g.dilation[i] = 1;
  }
  return g;
}

EffectiveWeightParams effective_weight_params(const Operand& weight, const Operand& lora_A,
                                              const Operand& lora_B, const Operand& gamma,
                                              const Operand& out, int64_t in_channels,
                                              int64_t out_channels, int64_t groups,
                                              const Triple& kernel, int64_t rank, double scale,
                                              bool transposed) {
  const ConvGeometry g = geometry_of(in_channels, out_channels, groups, kernel, transposed);
  const int64_t rows = weight_rows(g);
  const int64_t cols = weight_cols(g);
  // The factor that meets the rows of W, and the one that meets its columns.
  const Operand& u = transposed ? lora_A : lora_B;
  const Operand& v = transposed ? lora_B : lora_A;
  require(present(weight) && present(out), "weight and out must not be null");
  require(present(u) == present(v), "lora_A and lora_B come together");
  require(rank > 0 || !present(u), "rank must be positive" + got(rank));
  check_operand("weight", weight, rows * cols);
  check_operand("out", out, rows * cols);
  check_operand("gamma", gamma, out_channels);
  check_operand(transposed ? "lora_A" : "lora_B", u, rank * rows);
  check_operand(transposed ? "lora_B" : "lora_A", v, rank * cols);
  EffectiveWeightParams p{};
  p.geometry = g;
  p.scale = scale;
  p.weight = matrix_view(data_of(weight), dtype_of(weight), rows, cols, cols, 1);
  p.out = matrix_view(data_of(out), dtype_of(out), rows, cols, cols, 1);
  p.gamma = vector_view(data_of(gamma), dtype_of(gamma), out_channels);
  // U is (rank, rows) in memory when transposed, (rows, rank) otherwise.
  p.row_factor = matrix_view(data_of(u), dtype_of(u), rank, rows, transposed ? rows : 1,
                             transposed ? 1 : rank);
  p.col_factor = matrix_view(data_of(v), dtype_of(v), rank, cols, cols, 1);
  return p;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::vector<std::string> names(const std::vector<Isa>& isas) {
  std::vector<std::string> result;
  for (Isa isa : isas) result.push_back(isa_name(isa));
  return result;
}

py::dict build_info() {
  py::dict info;
  info["version"] = PF_VERSION;
  info["compiler"] = compiler();
  info["isa"] = isa_name(current_isa());
  info["isas_built"] = names(built_isas());
  info["isas_usable"] = names(usable_isas());
#if defined(PF_HAVE_CUDA)
  info["cuda"] = true;
  info["cuda_version"] = cuda::toolkit_version();
  info["cuda_archs"] = PF_CUDA_ARCHS;
#else
  info["cuda"] = false;
  info["cuda_version"] = py::none();
  info["cuda_archs"] = py::none();
#endif
  return info;
}

void bind_effective_weight(py::module_& m, py::module_& testing) {
  m.def(
      "effective_weight",
      [](const Operand& weight, const Operand& lora_A, const Operand& lora_B, const Operand& gamma,
         const Operand& out, int64_t in_channels, int64_t out_channels, int64_t groups,
         const Triple& kernel, int64_t rank, double scale, bool transposed, int threads) {
        const EffectiveWeightParams p =
            effective_weight_params(weight, lora_A, lora_B, gamma, out, in_channels, out_channels,
                                    groups, kernel, rank, scale, transposed);
        require(threads > 0, "threads must be positive" + got(threads));
        py::gil_scoped_release release;
        effective_weight(p, threads);
      },
      "W_eff = gamma * (W + scale * B.A) on the CPU. Tensors are (address, dtype code, elements).");
#if defined(PF_HAVE_CUDA)
  m.def(
      "effective_weight_cuda",
      [](const Operand& weight, const Operand& lora_A, const Operand& lora_B, const Operand& gamma,
         const Operand& out, int64_t in_channels, int64_t out_channels, int64_t groups,
         const Triple& kernel, int64_t rank, double scale, bool transposed, int device,
         uintptr_t stream) {
        const EffectiveWeightParams p =
            effective_weight_params(weight, lora_A, lora_B, gamma, out, in_channels, out_channels,
                                    groups, kernel, rank, scale, transposed);
        require(device >= 0, "device must not be negative" + got(device));
        py::gil_scoped_release release;
        cuda::launch_effective_weight(p, device, reinterpret_cast<void*>(stream));
      },
      "The same on a CUDA device, enqueued on `stream`.");
  m.def("cuda_why_not", &cuda::why_not,
        "Why the kernels cannot run on this device; empty when they can.");
#endif
  testing.def(
      "emulate_effective_weight",
      [](const Operand& weight, const Operand& lora_A, const Operand& lora_B, const Operand& gamma,
         const Operand& out, int64_t in_channels, int64_t out_channels, int64_t groups,
         const Triple& kernel, int64_t rank, double scale, bool transposed, int threads) {
        const EffectiveWeightParams p =
            effective_weight_params(weight, lora_A, lora_B, gamma, out, in_channels, out_channels,
                                    groups, kernel, rank, scale, transposed);
        require(threads > 0, "threads must be positive" + got(threads));
        emulate_effective_weight(p, threads);
      },
      "The CUDA kernel's phases on the host, with blocks of `threads` virtual threads.");
}

// The memory of one quantised tensor. `values` says how many elements there are.
void check_compressed(const Operand& values, uintptr_t codes, int64_t code_count, uintptr_t scales,
                      int64_t scale_count, int threads) {
  const int64_t count = std::get<2>(values);
  require(present(values) && codes != 0 && scales != 0 && count > 0,
          "values, codes and scales must not be null or empty");
  check_operand("values", values, count);
  require(dtype_of(values) != DType::kFloat64, "values: float64 has no 8-bit form");
  const int64_t blocks = block_count(count);
  require(
      code_count == blocks * kCompressBlock,
      "codes: must have " + std::to_string(blocks * kCompressBlock) + " bytes" + got(code_count));
  require(scale_count == blocks,
          "scales: must have " + std::to_string(blocks) + " elements" + got(scale_count));
  require(threads > 0, "threads must be positive" + got(threads));
}

void bind_compress(py::module_& m) {
  m.def(
      "quantise",
      [](const Operand& values, uintptr_t codes, int64_t code_count, uintptr_t scales,
         int64_t scale_count, const std::array<uint32_t, 2>& keys, int threads) {
        check_compressed(values, codes, code_count, scales, scale_count, threads);
        QuantiseParams p{data_of(values),
                         dtype_of(values),
                         std::get<2>(values),
                         reinterpret_cast<int8_t*>(codes),
                         reinterpret_cast<float*>(scales),
                         {keys[0], keys[1]}};
        py::gil_scoped_release release;
        quantise(p, threads);
      },
      "8-bit codes and block scales of a dense tensor on the CPU.");
  m.def(
      "dequantise",
      [](uintptr_t codes, int64_t code_count, uintptr_t scales, int64_t scale_count,
         const Operand& values, int threads) {
        check_compressed(values, codes, code_count, scales, scale_count, threads);
        DequantiseParams p{reinterpret_cast<const int8_t*>(codes),
                           reinterpret_cast<const float*>(scales), data_of(values),
                           dtype_of(values), std::get<2>(values)};
        py::gil_scoped_release release;
        dequantise(p, threads);
      },
      "The values that `quantise` stored, rounded once to the dtype of `values`.");
}

void bind_dropout(py::module_& m) {
  m.def(
      "dropout",
      [](const Operand& x, const Operand& y, double p, const std::array<uint32_t, 2>& keys,
         int threads) {
        const int64_t count = std::get<2>(x);
        require(present(x) && present(y) && count > 0, "x and y must not be null or empty");
        check_operand("x", x, count);
        check_operand("y", y, count);
        require(dtype_of(x) != DType::kFloat64 && dtype_of(x) == dtype_of(y),
                "x and y must be of one dtype, not float64");
        require(p >= 0 && p < 1, "p must be in [0, 1)");
        require(threads > 0, "threads must be positive" + got(threads));
        DropoutParams params{data_of(x),
                             data_of(y),
                             dtype_of(x),
                             count,
                             static_cast<int32_t>(std::llrint(p * (1 << kFractionBits))),
                             static_cast<float>(1 / (1 - p)),
                             {keys[0], keys[1]}};
        py::gil_scoped_release release;
        dropout(params, threads);
      },
      "Dropout by a hash of the seed.");
}

// The index and conversion functions that host and device share, for the tests.
void bind_testing(py::module_& testing) {
  testing.def("output_size", [](const Triple& input, const Triple& kernel, const Triple& stride,
                                const Triple& padding, const Triple& dilation,
                                const Triple& output_padding, bool transposed) {
    ConvGeometry g = geometry_of(1, 1, 1, kernel, transposed);
    copy_triple(stride, g.stride);
    copy_triple(padding, g.padding);
    copy_triple(dilation, g.dilation);
    copy_triple(output_padding, g.output_padding);
    return Triple{output_size(g, 0, input[0]), output_size(g, 1, input[1]),
                  output_size(g, 2, input[2])};
  });
  testing.def("input_coordinate",
              [](int64_t output, int64_t tap, int64_t input, int64_t kernel, int64_t stride,
                 int64_t padding, int64_t dilation, bool transposed) {
                ConvGeometry g = geometry_of(1, 1, 1, Triple{kernel, 1, 1}, transposed);
                g.stride[0] = stride;
                g.padding[0] = padding;
                g.dilation[0] = dilation;
                return input_coordinate(g, 0, output, tap, input);
              });
  testing.def(
      "offset_of", [](const std::vector<int64_t>& stride, const std::vector<int64_t>& index) {
        require(stride.size() <= kMaxDims && stride.size() == index.size(),
                "stride and index must have one length, at most " + std::to_string(kMaxDims));
        TensorView view{};
        view.dims = static_cast<int32_t>(stride.size());
        for (size_t i = 0; i < stride.size(); ++i) view.stride[i] = stride[i];
        return offset_of(view, index.data());
      });
  testing.def("to_bfloat16", [](double value) { return round_from<BFloat16>(value).bits; });
  testing.def("to_float16", [](double value) { return round_from<Float16>(value).bits; });
  testing.def("from_bfloat16", [](uint16_t bits) { return to_float(BFloat16{bits}); });
  testing.def("from_float16", [](uint16_t bits) { return to_float(Float16{bits}); });
  testing.def(
      "parallel_sum",
      [](int64_t count, int threads, int64_t fail_at) {
        std::vector<int64_t> seen(static_cast<size_t>(count), 0);
        {
          py::gil_scoped_release release;
          parallel_for(count, 1, threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
              if (i == fail_at) throw std::runtime_error("failed at " + std::to_string(i));
              seen[static_cast<size_t>(i)] += i;
            }
          });
        }
        int64_t sum = 0;
        for (int64_t value : seen) sum += value;
        return sum;
      },
      "Sum of 0..count-1 by a parallel loop; throws inside the loop at item `fail_at`.");
}

}  // namespace
}  // namespace petite_fast

PYBIND11_MODULE(_native, m) {
  m.doc() = "petite_fast's compiled operators; use petite_fast.backends.native.";
  py::module_ testing = m.def_submodule("testing", "Hooks for the tests.");
  m.def("build_info", &petite_fast::build_info);
  m.def("set_isa", &petite_fast::set_isa, "Choose the CPU instruction set by name.");
  petite_fast::bind_effective_weight(m, testing);
  petite_fast::bind_compress(m);
  petite_fast::bind_conv_halo(m, testing);
  petite_fast::bind_dropout(m);
  petite_fast::bind_bottleneck(m);
  petite_fast::bind_low_rank(m);
  petite_fast::bind_depthwise(m, testing);
  petite_fast::bind_norm_act(m, testing);
  petite_fast::bind_shuffle(m);
  petite_fast::bind_stem(m);
  petite_fast::bind_testing(testing);
}
