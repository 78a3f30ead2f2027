// The way of volumes into the scratch of common/low_rank.h and back.
//
// Everything has internal linkage: the file is compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/low_rank.h"
#include "cpu/simd.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

// One sample of a volume, strides in elements.
template <typename T>
struct Sample {
  T* data;
  int64_t channels;
  int64_t channel, plane, row, column;

  Sample part(int64_t first, int64_t count) const {
    return {data + first * channel, count, channel, plane, row, column};
  }
};

template <typename T>
Sample<T> sample_of(const LowRankVolume& volume, int64_t n, int64_t channels, const int64_t* size) {
  const int64_t voxels = size[0] * size[1] * size[2];
  T* data = static_cast<T*>(volume.data) + n * channels * voxels;
  if (volume.channels_last) {
    return {data, channels, 1, size[1] * size[2] * channels, size[2] * channels, channels};
  }
  return {data, channels, voxels, size[1] * size[2], size[2], 1};
}

// Calls function(channels that lie together in memory, number of the first).
template <typename T, typename Function>
void by_channel(const Sample<T>& sample, const Function& function) {
  if (sample.channel == 1) return function(sample, 0);
  for (int64_t c = 0; c < sample.channels; ++c) function(sample.part(c, 1), c);
}

// The elements of a row that one phase takes: `count` of them from `source` on, every `step`th, to
// `target` on.
struct Columns {
  int64_t source, target, count, step;
};

static Columns columns_of(int64_t phase, int64_t stride, int64_t padding, int64_t input,
                          int64_t wanted) {
  const int64_t first = low_rank_divide_up(low_rank_larger(0, padding - phase), stride);
  const int64_t source = stride * first + phase - padding;
  const int64_t there = source < input ? low_rank_divide_up(input - source, stride) : 0;
  return {source, first, low_rank_larger(0, low_rank_smaller(there, wanted - first)), stride};
}

template <typename T>
void pack_row(const T* __restrict source, int64_t step, int64_t count, float* __restrict target) {
  if (step == 1) {
    for (int64_t i = 0; i < count; ++i) target[i] = widen<float>(source[i]);
  } else if (step == 2) {
    for (int64_t i = 0; i < count; ++i) target[i] = widen<float>(source[2 * i]);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i] = widen<float>(source[step * i]);
  }
}

// A row of all channels, which lie together in memory, some at a time.
template <typename T>
void pack_last(const Sample<const T>& sample, const T* row, const Columns& columns, float* target,
               int64_t channel_stride) {
  constexpr int64_t kTogether = 16;
  const int64_t step = columns.step * sample.column;
  for (int64_t first = 0; first < sample.channels; first += kTogether) {
    const int64_t count = low_rank_smaller(kTogether, sample.channels - first);
    float* to = target + first * channel_stride;
    const T* from = row + first;
    for (int64_t i = 0; i < columns.count; ++i, from += step) {
      for (int64_t c = 0; c < count; ++c) to[c * channel_stride + i] = widen<float>(from[c]);
    }
  }
}

template <typename T>
void pack_columns(const Sample<const T>& sample, const T* row, const Columns& columns,
                  float* target, int64_t channel_stride) {
  row += columns.source * sample.column;
  target += columns.target;
  if (sample.channel == 1) return pack_last(sample, row, columns, target, channel_stride);
  for (int64_t c = 0; c < sample.channels; ++c) {
    pack_row(row + c * sample.channel, columns.step * sample.column, columns.count,
             target + c * channel_stride);
  }
}

// Plane `plane` of the padded input, the rows of output rows [row, row + rows), all phases. What
// the padding puts beside a row is never written: it stays zero.
template <typename T>
void pack_input_plane(const LowRankShape& s, const LowRankPlan& plan, const Sample<const T>& sample,
                      int64_t plane, int64_t row, int64_t rows, float* target) {
  const int64_t channel_stride = plan.slots * plan.in_plane;
  const int64_t depth = plane - s.padding[0];
  const bool inside = depth >= 0 && depth < s.input[0];
  for (int64_t high = 0; high < plan.phases[1]; ++high) {
    for (int64_t wide = 0; wide < plan.phases[2]; ++wide) {
      const Columns columns =
          columns_of(wide, s.stride[2], s.padding[2], s.input[2], s.output[2] + plan.reach[2]);
      float* sub_plane = target + (high * plan.phases[2] + wide) * plan.sub_plane;
      for (int64_t i = 0; i < rows + plan.reach[1]; ++i) {
        const int64_t height = s.stride[1] * (row + i) + high - s.padding[1];
        float* to = sub_plane + i * plan.pitch;
        if (inside && height >= 0 && height < s.input[1]) {
          pack_columns(sample, sample.data + depth * sample.plane + height * sample.row, columns,
                       to, channel_stride);
        } else {
          for (int64_t c = 0; c < sample.channels; ++c) {
            std::memset(to + c * channel_stride, 0, sizeof(float) * plan.pitch);
          }
        }
      }
    }
  }
}

// `rows` rows of an output plane, zeros between and behind them.
template <typename T>
void pack_output_plane(const LowRankShape& s, const LowRankPlan& plan,
                       const Sample<const T>& sample, int64_t plane, int64_t row, int64_t rows,
                       float* target) {
  const int64_t channel_stride = plan.planes * plan.out_plane;
  const T* source = sample.data + plane * sample.plane + row * sample.row;
  for (int64_t i = 0; i < rows; ++i) {
    pack_columns(sample, source + i * sample.row, Columns{0, 0, s.output[2], 1},
                 target + i * plan.pitch, channel_stride);
  }
  const int64_t end = (rows - 1) * plan.pitch + s.output[2];
  for (int64_t c = 0; c < sample.channels; ++c) {
    std::memset(target + c * channel_stride + end, 0, sizeof(float) * (plan.out_plane - end));
  }
}

template <typename T>
void unpack_output_plane(const LowRankShape& s, const LowRankPlan& plan, const Sample<T>& sample,
                         int64_t plane, int64_t row, int64_t rows, const float* source) {
  const int64_t channel_stride = plan.planes * plan.out_plane;
  for (int64_t i = 0; i < rows; ++i) {
    T* to = sample.data + plane * sample.plane + (row + i) * sample.row;
    for (int64_t c = 0; c < sample.channels; ++c) {
      const float* from = source + c * channel_stride + i * plan.pitch;
      T* target = to + c * sample.channel;
      if (sample.column == 1) {
        for (int64_t j = 0; j < s.output[2]; ++j) target[j] = round_from<T>(from[j]);
      } else {
        for (int64_t j = 0; j < s.output[2]; ++j) {
          target[j * sample.column] = round_from<T>(from[j]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace PF_ISA
}  // namespace petite_fast
