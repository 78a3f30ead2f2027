// The bottleneck adapter on volumes, x [N, C, S] and its hidden layer [N, H, S]:
//
//   a = Wd x + bd        y = x + Wu act(a) + bu
//   g = act'(a) . (Wu' grad_y)        grad_x = grad_y + Wd' g
//   grad_Wd = g x'   grad_bd = sum g   grad_Wu = grad_y act(a)'   grad_bu = sum grad_y
//
// Forward 4 C H flops and 2 C elements a voxel, backward 10 C H and 3 C. For C 32, H 8 at 48^3 that
// is 0.11 and 0.28 GFLOP, 28 and 42 MB: 0.9 and 1.8 ms at 160 GFLOP/s and 30 GB/s.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

namespace petite_fast {

enum class BottleneckActivation : int32_t { kRelu = 0, kGelu = 1 };

constexpr int64_t kBottleneckTile = 512;  // voxels: 64 KB of x for 32 channels
constexpr int64_t kBottleneckRows = 4;    // of a product that are made together

struct BottleneckParams {
  const void* x;       // [N, C, S] of dtype
  const void* grad_y;  // the same, or null for the forward
  void* out;           // y or grad_x
  DType dtype;         // float32 or bfloat16
  int64_t batch, channels, hidden, voxels;
  BottleneckActivation activation;
  const float* down;       // [H, C]
  const float* down_bias;  // [H]
  const float* up;         // [C, H]
  const float* up_bias;    // [C]; forward only
  float* grads;  // grad_Wd [H, C], grad_bd [H], grad_Wu [C, H], grad_bu [C]; backward only
  float* workspace;
};

PF_HOST_DEVICE int64_t bottleneck_round_up(int64_t n) {
  return (n + kBottleneckRows - 1) / kBottleneckRows * kBottleneckRows;
}

// Floats of all gradients together.
PF_HOST_DEVICE int64_t bottleneck_gradients(const BottleneckParams& p) {
  return 2 * p.channels * p.hidden + p.hidden + p.channels;
}

// Floats of both weights, each as it is and transposed, their rows padded.
PF_HOST_DEVICE int64_t bottleneck_weights(const BottleneckParams& p) {
  return 2 *
         (bottleneck_round_up(p.hidden) * p.channels + bottleneck_round_up(p.channels) * p.hidden);
}

// Floats that a thread works on: tiles of x, grad_y and the result; of a, act(a) and g; gradients.
PF_HOST_DEVICE int64_t bottleneck_thread_workspace(const BottleneckParams& p) {
  const int64_t rows = 3 * p.channels + 3 * bottleneck_round_up(p.hidden);
  return rows * kBottleneckTile + bottleneck_gradients(p);
}

PF_HOST_DEVICE int64_t bottleneck_workspace(const BottleneckParams& p, int threads) {
  return bottleneck_weights(p) + threads * bottleneck_thread_workspace(p);
}

}  // namespace petite_fast
