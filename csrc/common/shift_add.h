// The last step of a convolution's adjoint towards few channels (grad_x of a stem):
//
//   grad_x[c, o * stride + tap * dilation - padding] += matrix[(c, tap), o]
//
// matrix = W' grad_y is a product, taken for some rows of output voxels at a time so that it stays
// in L2. Floor for 32 -> 1 channels, k3 at 48^3: grad_y once is 14 MB, 0.95 ms at 15 GB/s; the
// product's 191 MFLOP are 2.4 ms at 80 GFLOP/s; the 3 M additions are read from L2, 0.3 ms.
#pragma once

#include <cstdint>

#include "common/conv_geometry.h"

namespace petite_fast {

struct ShiftAddParams {
  ConvGeometry geometry;  // in_channels are those of grad_x; groups 1, not transposed
  int64_t input[3], output[3];
  int64_t first, rows;  // rows of output voxels, numbered d * H + h
  const float* matrix;  // [(c, a, b, e), rows * W]
  float* grad_x;        // one sample, contiguous
};

}  // namespace petite_fast
