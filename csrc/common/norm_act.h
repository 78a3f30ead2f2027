// A normalisation, its affine map, a residual and a piecewise linear activation:
//     xhat = (x - mean) / sqrt(var + eps)      n = weight * xhat + bias
//     norm first: y = act(n + residual)        act_first: the same n for act(x)
//     act(v) = v for v > 0, else slope * v
//
// x is dense, [outer, channels, inner] or, channels last, [outer, inner, channels]; a layer norm is
// the latter with outer 1 and one statistic per row. Statistics, parameters and sums are float,
// accumulated in double.
#pragma once

#include <math.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

namespace petite_fast {

// The codes are part of the Python interface. kGroup: per sample and group of channels; kBatch: per
// channel over all samples; kFixed: per channel, given; kLayer: per row.
enum class Norm : int32_t { kGroup = 0, kBatch = 1, kFixed = 2, kLayer = 3 };
constexpr int kNormCount = 4;

// Where the backward finds xhat; the codes are part of the Python interface. kNone: not needed.
enum class NormSource : int32_t { kNone = 0, kY = 1, kXhat = 2 };
constexpr int kNormSourceCount = 3;

struct NormActShape {
  int64_t outer;
  int64_t channels;
  int64_t inner;
  int64_t groups;  // per sample, of kGroup
  Norm norm;
  bool channels_last;
  bool act_first;
  float eps;
  DType
      dtype;  // of x, y, xhat, the residual and their gradients: float, bfloat16 or, in CUDA, half
};

struct NormActAffine {
  const float* weight;  // [channels]; null: ones
  const float* bias;    // [channels]; null: zeros
  const float* slopes;  // [channels]; null: `slope` everywhere
  float slope;          // 1: the identity
};

// The channels whose xhat is kept beside y, in ascending order: xhat is then [outer, count, inner]
// or [outer, inner, count].
struct KeptChannels {
  const int64_t* index;
  int64_t count;
};

struct NormActForward {
  NormActShape shape;
  NormActAffine affine;
  KeptChannels kept;
  const void* x;
  const void* residual;  // null: none
  void* y;
  float* mean;     // kFixed reads both, the others write them
  float* var;      // biased
  void* xhat;      // null: not kept; whole when kept.count is 0
  uint8_t* signs;  // null: not kept; one row of whole bytes per row of memory
  double* workspace;
};

struct NormActBackward {
  NormActShape shape;
  NormActAffine affine;
  KeptChannels kept;
  NormSource source;
  const void* grad_y;
  const void* y;         // kY
  const void* xhat;      // kXhat: whole; kY: of the kept channels
  const void* residual;  // kY, norm first; null: none
  const uint8_t* signs;  // null: read off y
  const float* var;
  void* grad_x;         // null: not wanted; so below
  void* grad_residual;  // the gradient of the activation's input, norm first
  float* grad_weight;
  float* grad_bias;
  double* workspace;
};

// Rows of elements and of their signs: bit i of byte j of a row says whether element 8 j + i > 0.
struct SignRows {
  int64_t rows;
  int64_t length;
  DType dtype;         // of the values
  const void* values;  // [rows, length]; packing only
  uint8_t* positive;   // [rows, length] of 0 and 1; unpacking only
  uint8_t* bits;       // [rows, ceil(length / 8)]
};

// Work is split into units whatever the number of threads, so that sums do not depend on it: pieces
// of a row, or rows of channels.
constexpr int64_t kNormUnit = 8192;         // elements of a unit where channels come before voxels
constexpr int64_t kNormLastUnit = 32768;    // about that many where they are last
constexpr int64_t kNormMaxChannels = 4096;  // where they are last: rows are staged on the stack

PF_HOST_DEVICE int64_t norm_divide_up(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

PF_HOST_DEVICE int64_t sign_row_bytes(const NormActShape& s) {
  return norm_divide_up(s.channels_last ? s.channels : s.inner, 8);
}

PF_HOST_DEVICE int64_t statistics_count(const NormActShape& s) {
  switch (s.norm) {
    case Norm::kGroup:
      return s.outer * s.groups;
    case Norm::kBatch:
    case Norm::kFixed:
      return s.channels;
    case Norm::kLayer:
      return s.inner;
  }
  return 0;
}

// Rows of one unit, channels last.
PF_HOST_DEVICE int64_t last_unit_rows(const NormActShape& s) {
  const int64_t rows = kNormLastUnit / s.channels;
  return rows < 1 ? 1 : rows;
}

// Units per sample.
PF_HOST_DEVICE int64_t unit_count(const NormActShape& s) {
  return s.channels_last ? norm_divide_up(s.inner, last_unit_rows(s))
                         : s.channels * norm_divide_up(s.inner, kNormUnit);
}

// Doubles that a call works on: two sums per unit and row (per channel of a unit, channels last)
// and two per statistic.
PF_HOST_DEVICE int64_t norm_act_workspace(const NormActShape& s) {
  const int64_t per_unit = s.channels_last ? 2 * s.channels : 2;
  return s.outer * (unit_count(s) * per_unit + 2 * s.channels) +
         (s.norm == Norm::kLayer ? 0 : 2 * statistics_count(s));
}

// Mean and sum of squared differences of a growing set of values.
struct Moments {
  double count;
  double mean;
  double squares;
};

// Sets are merged as by Chan et al.
PF_HOST_DEVICE void merge(Moments& all, const Moments& other) {
  if (other.count == 0) return;
  const double total = all.count + other.count;
  const double delta = other.mean - all.mean;
  const double share = other.count / total;
  all.mean += delta * share;
  all.squares += other.squares + delta * delta * all.count * share;
  all.count = total;
}

PF_HOST_DEVICE float reciprocal_std(float var, float eps) { return 1 / sqrtf(var + eps); }

PF_HOST_DEVICE bool is_identity(const NormActAffine& a) {
  return a.slopes == nullptr && a.slope == 1;
}

// How many of the kept channels come before this one.
PF_HOST_DEVICE int64_t kept_before(const KeptChannels& kept, int64_t channel) {
  int64_t low = 0, high = kept.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (kept.index[middle] < channel) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Position of a channel among those kept, or -1.
PF_HOST_DEVICE int64_t kept_slot(const KeptChannels& kept, int64_t channel) {
  const int64_t slot = kept_before(kept, channel);
  return slot < kept.count && kept.index[slot] == channel ? slot : -1;
}

// The parameters of one channel, and what they are divided by.
struct ChannelValues {
  float weight;
  float inverse_weight;  // 0 where xhat is kept
  float bias;
  float slope;
  float inverse_slope;
  int64_t slot;  // among the kept channels, or -1
};

PF_HOST_DEVICE ChannelValues channel_values(const NormActAffine& a, const KeptChannels& kept,
                                            int64_t channel) {
  ChannelValues v;
  v.weight = a.weight == nullptr ? 1 : a.weight[channel];
  v.bias = a.bias == nullptr ? 0 : a.bias[channel];
  v.slope = a.slopes == nullptr ? a.slope : a.slopes[channel];
  v.slot = kept_slot(kept, channel);
  v.inverse_weight = v.slot < 0 ? 1 / v.weight : 0;
  v.inverse_slope = 1 / v.slope;
  return v;
}

}  // namespace petite_fast
