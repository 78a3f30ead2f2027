// The shuffle between a volume and the matrix of its blocks, for convolutions whose kernel is their
// stride: their blocks do not overlap, so the convolution is one matrix product per sample.
//
//   volume[c, d * kd + a, h * kh + b, w * kw + e]  <->  matrix[(c, a, b, e), (d, h, w)]
//
// Floor: each element is read once and written once, no flops. The matrix is cut so that it stays
// in L2, so what counts is the volume: 4 bytes an element at ~15 GB/s, 0.94 ms for 32 channels at
// 48^3 (14 MB), beside 5.7 ms at 80 GFLOP/s for the product with 64 channels.
#pragma once

#include <cstdint>

namespace petite_fast {

// How the blocks lie in the matrix.
enum class ShuffleForm : int32_t {
  kColumns = 0,       // [(c, a, b, e), voxel]
  kRows = 1,          // [voxel, (c, a, b, e)]
  kChannelsLast = 2,  // [voxel, (a, b, e, c)], of a channels-last volume
};
constexpr int kShuffleFormCount = 3;

struct ShuffleParams {
  ShuffleForm form;
  bool to_volume;
  int64_t channels;
  int64_t block[3];   // kd, kh, kw
  int64_t blocks[3];  // D, H, W: how many whole blocks the volume has
  int64_t size[3];    // of the volume: at least blocks * block, the rest is not touched
  int64_t first;      // the matrix holds `rows` rows of W blocks from the row `first` = d * H + h
  int64_t rows;
  float* volume;  // one sample
  float* matrix;
  const float* bias;  // added to the volume, or null: [channels], channels last [(e, c)]
};

}  // namespace petite_fast
