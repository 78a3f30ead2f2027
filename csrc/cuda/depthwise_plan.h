// How the depthwise CUDA kernels are started: from the operator's arguments to their parameters.
#pragma once

#include "cuda/depthwise_adjoint.h"
#include "cuda/depthwise_conv.h"
#include "cuda/depthwise_grad_weight.h"

namespace petite_fast {

// Calls fn(T{}) with the element type.
template <typename Fn>
void with_element_type(DType dtype, const Fn& fn) {
  if (dtype == DType::kFloat32) fn(float{});
  if (dtype == DType::kBFloat16) fn(BFloat16{});
  if (dtype == DType::kFloat16) fn(Float16{});
}

inline int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline bool voxels_aligned(const DepthwiseShape& s, const void* volume) {
  return reinterpret_cast<uintptr_t>(volume) % kVectorBytes == 0 &&
         s.channels * element_bytes(s.dtype) % kVectorBytes == 0;
}

// Stride 2 of all axes, else 1 of all axes.
inline bool strided(const DepthwiseShape& s) { return s.axis[0].stride == 2; }

struct DepthwisePlan {
  DepthwiseCudaParams params;
  bool adjoint;  // of stride 2
};

inline DepthwisePlan plan_depthwise(const DepthwiseParams& given) {
  DepthwisePlan plan{{given.shape, 0, 0, false, voxels_aligned(given.shape, given.source), 1,
                      given.source, given.weight, given.bias, given.target},
                     given.adjoint};
  DepthwiseShape& s = plan.params.shape;
  if (given.adjoint && !strided(s)) {
    // grad_x[i] = sum over k of w[2 - k] grad_y[i + k - (2 - padding)]
    plan.adjoint = false;
    plan.params.flipped = true;
    for (DepthwiseAxis& a : s.axis) {
      a = {a.small, a.large, 1, kDepthwiseSide - 1 - a.padding};
    }
  }
  plan.params.large_plane = plane_elements(s, true);
  plan.params.small_plane = plane_elements(s, false);
  if (plan.adjoint) {
    using Tile = AdjointTile<float>;
    plan.params.chunk = depthwise_chunk(s, adjoint_extent(s), Tile::kRows, Tile::kCols);
  } else {
    using One = ConvTile<float, 1>;
    using Two = ConvTile<float, 2>;
    plan.params.chunk = depthwise_chunk(s, conv_extent(s), strided(s) ? Two::kRows : One::kRows,
                                        strided(s) ? Two::kCols : One::kCols);
  }
  return plan;
}

inline int64_t grad_weight_items(const DepthwiseShape& s, int64_t chunk) {
  using One = GradWeightTile<float, 1>;
  using Two = GradWeightTile<float, 2>;
  return depthwise_items(s, conv_extent(s), chunk, strided(s) ? Two::kRows : One::kRows,
                         strided(s) ? Two::kCols : One::kCols);
}

inline int64_t grad_weight_chunk(const DepthwiseShape& s) {
  using One = GradWeightTile<float, 1>;
  using Two = GradWeightTile<float, 2>;
  return depthwise_chunk(s, conv_extent(s), strided(s) ? Two::kRows : One::kRows,
                         strided(s) ? Two::kCols : One::kCols);
}

// Blocks of a channel tile: of the sizes alone, so that the sums are the same on every device.
inline int64_t grad_weight_shares(const DepthwiseShape& s) {
  constexpr int64_t kBlocks = 512;
  const int64_t items = grad_weight_items(s, grad_weight_chunk(s));
  const int64_t shares = parts(kBlocks, channel_tiles(s));
  return items < shares ? items : shares;
}

inline int64_t grad_weight_workspace(const DepthwiseShape& s) {
  return grad_weight_shares(s) * kDepthwiseTaps * s.channels;
}

inline DepthwiseGradWeightCudaParams plan_grad_weight(const DepthwiseShape& s, const void* x,
                                                      const void* grad_y, float* partial,
                                                      void* grad_weight) {
  return {s,
          plane_elements(s, true),
          plane_elements(s, false),
          voxels_aligned(s, x) && voxels_aligned(s, grad_y),
          grad_weight_chunk(s),
          grad_weight_shares(s),
          x,
          grad_y,
          partial,
          grad_weight};
}

}  // namespace petite_fast
