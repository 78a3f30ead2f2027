// A convolution of few channels to many, the first layer of a network, and its weight gradient:
//
//   y[n, o, v] = bias[o] + sum_t W[o, t] x_t[n, v]        grad_W[o, t] = sum_{n, v} grad_y[n, o, v]
//   x_t[n, v]
//
// with x_t the input as the tap t = (c, a, b, e) sees it, zero outside. Contiguous volumes.
//
// Floor for 1 -> 32 channels, k3 at 48^3: y is 14 MB, 0.95 ms at 15 GB/s; 191 MFLOP are 2.4 ms at
// 80 GFLOP/s. A library that works on blocks of 16 input channels computes 16 times that, or copies
// y from another layout; here the few channels lie in a slab of padded rows, and a tap is an offset
// into it.
#pragma once

#include <cstdint>

#include "common/conv_geometry.h"
#include "common/macros.h"

namespace petite_fast {

constexpr int64_t kStemMaxTaps = 512;  // of all input channels
constexpr int64_t kStemLanes = 16;     // of the widest vector
constexpr int64_t kStemVoxels = 1024;  // output voxels of one channel per slab, about
constexpr int64_t kStemOutputs = 24;   // outputs are padded to a multiple of every tile's height

struct StemParams {
  ConvGeometry geometry;  // groups 1, not transposed
  int64_t batch;
  int64_t input[3], output[3];
  const float* x;
  const float* weight;  // [O, taps]; not read for the gradient
  const float* bias;    // [O] or null
  const float* grad_y;  // null: forward
  float* out;           // y, or grad_W [O, taps]
  float* workspace;     // stem_workspace floats
};

PF_HOST_DEVICE int64_t stem_round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

PF_HOST_DEVICE int64_t stem_taps(const ConvGeometry& g) { return g.in_channels * kernel_volume(g); }

// Output rows of one slab.
PF_HOST_DEVICE int64_t stem_rows(const StemParams& p) {
  const int64_t rows = (kStemVoxels + p.output[2] - 1) / p.output[2];
  return rows < p.output[1] ? rows : p.output[1];
}

// A slab has, per channel and depth tap, the input rows that `stem_rows` output rows see; a row is
// split by the remainder of its columns modulo the stride, so that a tap reads consecutive
// elements.
PF_HOST_DEVICE int64_t stem_slab_rows(const StemParams& p) {
  const ConvGeometry& g = p.geometry;
  return (stem_rows(p) - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1;
}

PF_HOST_DEVICE int64_t stem_pitch(const StemParams& p) {
  const ConvGeometry& g = p.geometry;
  return stem_round_up(p.output[2], kStemLanes) + (g.kernel[2] - 1) * g.dilation[2] / g.stride[2];
}

PF_HOST_DEVICE int64_t stem_slab(const StemParams& p) {
  const ConvGeometry& g = p.geometry;
  return g.in_channels * g.kernel[0] * stem_slab_rows(p) * g.stride[2] * stem_pitch(p);
}

// Per thread: a slab, and for the gradient a vector of partial sums per weight.
PF_HOST_DEVICE int64_t stem_thread_workspace(const StemParams& p) {
  const int64_t weights =
      stem_round_up(p.geometry.out_channels, kStemOutputs) * (stem_taps(p.geometry) + kStemOutputs);
  return stem_slab(p) + (p.grad_y != nullptr ? weights * kStemLanes : 0);
}

// Before the threads': the weight and the bias by tiles.
PF_HOST_DEVICE int64_t stem_weight_workspace(const StemParams& p) {
  return stem_round_up(p.geometry.out_channels, kStemOutputs) * (stem_taps(p.geometry) + 1);
}

PF_HOST_DEVICE int64_t stem_workspace(const StemParams& p, int threads) {
  return stem_weight_workspace(p) + threads * stem_thread_workspace(p);
}

}  // namespace petite_fast
