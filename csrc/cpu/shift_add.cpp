// CPU form of common/shift_add.h; compiled once per instruction set, each into its own namespace
// PF_ISA. Every row of grad_x belongs to one thread, so nothing is added to twice at once.
#include "common/shift_add.h"

#include <algorithm>

#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

constexpr int64_t kGrain = 64;  // rows of grad_x worth waking a thread for

// target[w * stride + shift] += source[w] where that is inside.
void add_row(float* __restrict target, const float* __restrict source, int64_t size, int64_t count,
             int64_t stride, int64_t shift) {
  const int64_t first = shift < 0 ? (-shift + stride - 1) / stride : 0;
  const int64_t last = std::min(count, (size - shift + stride - 1) / stride);
  if (stride == 1) {
    for (int64_t w = first; w < last; ++w) target[w + shift] += source[w];
  } else {
    for (int64_t w = first; w < last; ++w) target[w * stride + shift] += source[w];
  }
}

// Output coordinate whose tap reads the input coordinate, or -1.
int64_t output_coordinate(const ShiftAddParams& p, int axis, int64_t input, int64_t tap) {
  const ConvGeometry& g = p.geometry;
  const int64_t shifted = input + g.padding[axis] - tap * g.dilation[axis];
  if (shifted < 0 || shifted % g.stride[axis] != 0) return -1;
  const int64_t output = shifted / g.stride[axis];
  return output < p.output[axis] ? output : -1;
}

void add_to_row(const ShiftAddParams& p, int64_t c, int64_t plane, int64_t row) {
  const ConvGeometry& g = p.geometry;
  const int64_t width = p.output[2], columns = p.rows * width;
  float* target = p.grad_x + ((c * p.input[0] + plane) * p.input[1] + row) * p.input[2];
  for (int64_t a = 0; a < g.kernel[0]; ++a) {
    const int64_t d = output_coordinate(p, 0, plane, a);
    if (d < 0) continue;
    for (int64_t b = 0; b < g.kernel[1]; ++b) {
      const int64_t h = output_coordinate(p, 1, row, b);
      const int64_t at = d * p.output[1] + h - p.first;
      if (h < 0 || at < 0 || at >= p.rows) continue;
      const int64_t tap = ((c * g.kernel[0] + a) * g.kernel[1] + b) * g.kernel[2];
      const float* source = p.matrix + tap * columns + at * width;
      for (int64_t e = 0; e < g.kernel[2]; ++e, source += columns) {
        add_row(target, source, p.input[2], width, g.stride[2], e * g.dilation[2] - g.padding[2]);
      }
    }
  }
}

}  // namespace

void shift_add(const ShiftAddParams& p, int threads) {
  const ConvGeometry& g = p.geometry;
  // Planes of grad_x that the rows' planes reach.
  const int64_t low = p.first / p.output[1] * g.stride[0] - g.padding[0];
  const int64_t high = (p.first + p.rows - 1) / p.output[1] * g.stride[0] - g.padding[0] +
                       (g.kernel[0] - 1) * g.dilation[0];
  const int64_t begin = std::max<int64_t>(0, low), end = std::min(p.input[0], high + 1);
  if (begin >= end) return;
  const int64_t planes = end - begin, height = p.input[1];
  parallel_for(g.in_channels * planes * height, kGrain, threads, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      add_to_row(p, i / height / planes, begin + i / height % planes, i % height);
    }
  });
}

}  // namespace PF_ISA
}  // namespace petite_fast
