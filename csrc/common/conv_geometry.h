// A 3-D convolution's sizes, in the order depth, height, width, and the index maths on them.
// The formulas are those of torch.nn.Conv3d and torch.nn.ConvTranspose3d.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace petite_fast {

struct ConvGeometry {
  int64_t in_channels;
  int64_t out_channels;
  int64_t groups;
  int64_t kernel[3];
  int64_t stride[3];
  int64_t padding[3];
  int64_t dilation[3];
  int64_t output_padding[3];  // transposed only
  bool transposed;
};

// A convolution weight is used as a matrix: one row per leading channel, one column per
// (second channel, kernel position).
PF_HOST_DEVICE int64_t kernel_volume(const ConvGeometry& g) {
  return g.kernel[0] * g.kernel[1] * g.kernel[2];
}

PF_HOST_DEVICE int64_t weight_rows(const ConvGeometry& g) {
  return g.transposed ? g.in_channels : g.out_channels;
}

PF_HOST_DEVICE int64_t weight_cols(const ConvGeometry& g) {
  return (g.transposed ? g.out_channels : g.in_channels) / g.groups * kernel_volume(g);
}

// Output channel that the weight element (row, col) belongs to; groups own contiguous rows.
PF_HOST_DEVICE int64_t output_channel(const ConvGeometry& g, int64_t row, int64_t col) {
  if (!g.transposed) return row;
  const int64_t group = row / (g.in_channels / g.groups);
  return group * (g.out_channels / g.groups) + col / kernel_volume(g);
}

PF_HOST_DEVICE int64_t output_size(const ConvGeometry& g, int axis, int64_t input) {
  const int64_t reach = g.dilation[axis] * (g.kernel[axis] - 1);
  if (g.transposed) {
    return (input - 1) * g.stride[axis] - 2 * g.padding[axis] + reach + g.output_padding[axis] + 1;
  }
  return (input + 2 * g.padding[axis] - reach - 1) / g.stride[axis] + 1;
}

// Input coordinate that kernel position `tap` of output coordinate `output` reads; -1 when it
// falls outside an input of size `input`, or (transposed) between two input voxels.
PF_HOST_DEVICE int64_t input_coordinate(const ConvGeometry& g, int axis, int64_t output,
                                        int64_t tap, int64_t input) {
  int64_t position;
  if (g.transposed) {
    const int64_t scattered = output + g.padding[axis] - tap * g.dilation[axis];
    if (scattered < 0 || scattered % g.stride[axis] != 0) return -1;
    position = scattered / g.stride[axis];
  } else {
    position = output * g.stride[axis] - g.padding[axis] + tap * g.dilation[axis];
  }
  return position >= 0 && position < input ? position : -1;
}

}  // namespace petite_fast
