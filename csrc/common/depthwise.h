// A depthwise 3-D convolution with a 3x3x3 kernel, its adjoint and its weight gradient.
//
//     y[n, c, o] = bias[c] + sum over k in 3x3x3 of w[c, k] x[n, c, o * stride + k - padding]
//
// The adjoint gathers too: an element of grad_x reads the grad_y it fed, 27 of them for stride 1, 1
// to 8 for stride 2. It is grad_x of the convolution and y of the transposed one.
//
// Floor for 32 channels at 48^3 in float32: 28 MB to copy are 1.9 ms at 15 GB/s, 191 Mflop are
// 2.4 ms at 80 GFLOP/s, on one thread. (grad_weight reads 28 MB and writes nothing.)
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

namespace petite_fast {

constexpr int kDepthwiseSide = 3;
constexpr int kDepthwiseTaps = 27;

// One axis of the plain convolution: `large` is the size of x, `small` that of y.
struct DepthwiseAxis {
  int64_t large;
  int64_t small;
  int64_t stride;
  int64_t padding;
};

struct DepthwiseShape {
  int64_t samples;
  int64_t channels;
  DepthwiseAxis axis[3];
  bool channels_last;  // of both volumes
  DType dtype;         // float32 or bfloat16, of everything
};

struct DepthwiseParams {
  DepthwiseShape shape;
  bool adjoint;  // the source is the small volume and the target the large one
  const void* source;
  const void* weight;  // [C, 27]
  const void* bias;    // [C] or null
  void* target;
};

struct DepthwiseGradWeightParams {
  DepthwiseShape shape;
  const void* x;
  const void* grad_y;
  void* grad_weight;  // [C, 27]
  // Zeroed memory for the sums of the threads, which `owner` frees: an object that frees it in the
  // kernel would bring in a weak symbol, its exception handler's.
  float* (*zeros)(void* owner, int64_t floats);
  void* owner;
};

PF_HOST_DEVICE int64_t source_size(const DepthwiseAxis& a, bool adjoint) {
  return adjoint ? a.small : a.large;
}

PF_HOST_DEVICE int64_t target_size(const DepthwiseAxis& a, bool adjoint) {
  return adjoint ? a.large : a.small;
}

// The sources of target `o` are first <= i <= last, each through the tap `depthwise_tap`.
PF_HOST_DEVICE int64_t first_source(const DepthwiseAxis& a, bool adjoint, int64_t o) {
  if (!adjoint) return o * a.stride < a.padding ? 0 : o * a.stride - a.padding;
  const int64_t from = o + a.padding - (kDepthwiseSide - 1);
  return from <= 0 ? 0 : (from + a.stride - 1) / a.stride;
}

PF_HOST_DEVICE int64_t last_source(const DepthwiseAxis& a, bool adjoint, int64_t o) {
  const int64_t last =
      adjoint ? (o + a.padding) / a.stride : o * a.stride - a.padding + (kDepthwiseSide - 1);
  const int64_t size = source_size(a, adjoint);
  return last < size ? last : size - 1;
}

PF_HOST_DEVICE int64_t depthwise_tap(const DepthwiseAxis& a, bool adjoint, int64_t o, int64_t i) {
  return adjoint ? o + a.padding - i * a.stride : i + a.padding - o * a.stride;
}

}  // namespace petite_fast
