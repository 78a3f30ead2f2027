// A depthwise convolution, phase by phase: see cuda/depthwise_tile.h.
//
// Each source plane is read once, while the two or three target planes that it reaches are in the
// making: a voxel read from shared memory and widened serves 9 taps, of runs of kRun targets.
#pragma once

#include "cuda/depthwise_tile.h"

namespace petite_fast {

template <typename T, int S>
struct ConvTile {
  static constexpr int kRun = S == 1 ? 8 : 4;   // targets of a thread, along the row
  static constexpr int kRows = S == 1 ? 8 : 4;  // of targets
  static constexpr int kCols = 2 * kRun;
  static constexpr int kThreads = kPairLanes * kRows * 2;
  static constexpr int kLive = S == 1 ? 3 : 2;   // target planes in the making
  static constexpr int kPeriod = kLive * S;      // steps after which these have the same places
  static constexpr int kSlots = S == 1 ? 3 : 2;  // source planes in shared memory
  static constexpr int kSpan = (kRun - 1) * S + kDepthwiseSide;  // sources of a run
  using Source =
      Window<T, (kRows - 1) * S + kDepthwiseSide, (kCols - 1) * S + kDepthwiseSide, kThreads>;
  static constexpr int kSharedBytes =
      kSlots * Source::kElements * int{sizeof(T)} + kStaged * int{sizeof(float)};
};

PF_HOST_DEVICE DepthwiseExtent conv_extent(const DepthwiseShape& s) {
  return {s.axis[0].small, s.axis[1].small, s.axis[2].small};
}

// What a thread keeps. Step i reads the source plane of target plane 0 and tap i.
template <typename T, int S>
struct ConvThread {
  using Tile = ConvTile<T, S>;
  int thread, pair;
  int corner;  // of the run's first source in a slot
  int channels_left;
  typename Tile::Source window;
  PlaneWalk source;
  int planes;      // of targets
  int run;         // targets of the run that exist
  int64_t target;  // offset of the run's first target in its first plane
  Pair sum[Tile::kLive][Tile::kRun];
};

template <typename T, int S>
PF_HOST_DEVICE int conv_steps(const ConvThread<T, S>& t) {
  return (t.planes - 1) * S + kDepthwiseSide;
}

template <typename T, int S>
PF_HOST_DEVICE void begin_conv(const DepthwiseCudaParams& p, const DepthwisePlace& place,
                               int thread, ConvThread<T, S>& t) {
  using Tile = ConvTile<T, S>;
  const auto& [d, h, w] = p.shape.axis;
  const DepthwiseLane lane = lane_of(thread, Tile::kRows);
  const int64_t channel = place.channel + lane.pair;
  const int64_t row = place.row + lane.row, col = place.col + lane.segment * Tile::kRun;
  const bool inside = row < h.small && col < w.small && channel < p.shape.channels;
  const int64_t run = inside ? w.small - col : 0;
  t.thread = thread;
  t.pair = lane.pair;
  t.corner =
      (lane.row * Tile::Source::kCols + lane.segment * Tile::kRun) * S * kTileChannels + lane.pair;
  t.channels_left = channels_left(p.shape, place.channel);
  t.planes = place.planes;
  t.run = static_cast<int>(run < Tile::kRun ? run : Tile::kRun);
  t.target = (((place.sample * d.small + place.plane) * h.small + row) * w.small + col) *
                 p.shape.channels +
             channel;
  t.source =
      walk_planes(place.sample, place.plane * S - d.padding, d.large, p.large_plane, conv_steps(t));
  open_window(t.window, p.shape.channels, h.large, w.large, place.row * S - h.padding,
              place.col * S - w.padding, place.channel, thread);
}

template <typename T, int S>
PF_HOST_DEVICE void fetch_conv(const DepthwiseCudaParams& p, const ConvThread<T, S>& t, int step,
                               T* slot) {
  if (!inside(t.source, step)) return;
  fetch(t.window, static_cast<const T*>(p.source) + plane_offset(t.source, step, p.large_plane),
        true, p.aligned, t.channels_left, t.thread, slot);
}

template <typename T, int S>
PF_HOST_DEVICE void store_conv(const DepthwiseCudaParams& p, const ConvThread<T, S>& t, int plane,
                               const Pair (&sum)[ConvTile<T, S>::kRun]) {
  T* to = static_cast<T*>(p.target) + t.target + static_cast<int64_t>(plane) * p.small_plane;
  const bool both = t.pair + 1 < t.channels_left;
  if (p.shape.channels % 2 == 0) {
    PF_UNROLL
    for (int r = 0; r < ConvTile<T, S>::kRun; ++r, to += p.shape.channels) {
      if (r < t.run) store_pair(to, sum[r]);
    }
  } else {
    PF_UNROLL
    for (int r = 0; r < ConvTile<T, S>::kRun; ++r, to += p.shape.channels) {
      if (r < t.run) store_channels(to, sum[r], both);
    }
  }
}

// Where the sums of the target plane are that tap `kd` of a step leads to, and whether to one.
template <typename T, int S>
PF_HOST_DEVICE constexpr int live_place(int phase, int kd) {
  return (phase - kd + ConvTile<T, S>::kPeriod) / S % ConvTile<T, S>::kLive;
}

template <int S>
PF_HOST_DEVICE constexpr bool reaches(int phase, int kd) {
  return (phase - kd + kDepthwiseSide * S) % S == 0;
}

// Adds the sources `x` of row `kh` by the plane `kd` of taps.
template <typename T, int S>
PF_HOST_DEVICE void add_row(const Pair (&x)[ConvTile<T, S>::kSpan], const float* staged, int pair,
                            int kd, int kh, Pair (&sum)[ConvTile<T, S>::kRun]) {
  PF_UNROLL
  for (int kw = 0; kw < kDepthwiseSide; ++kw) {
    const Pair weight =
        staged_weight(staged, pair, (kd * kDepthwiseSide + kh) * kDepthwiseSide + kw);
    PF_UNROLL
    for (int r = 0; r < ConvTile<T, S>::kRun; ++r) add_product(sum[r], weight, x[r * S + kw]);
  }
}

template <typename T, int S>
PF_HOST_DEVICE void load_row(const ConvThread<T, S>& t, const T* slot, int kh,
                             Pair (&x)[ConvTile<T, S>::kSpan]) {
  const T* row = slot + t.corner + kh * ConvTile<T, S>::Source::kCols * kTileChannels;
  PF_UNROLL
  for (int j = 0; j < ConvTile<T, S>::kSpan; ++j) x[j] = load_pair(row + j * kTileChannels);
}

template <typename T, int S>
PF_HOST_DEVICE void start_sums(ConvThread<T, S>& t, int phase, const float* staged) {
  const Pair bias = staged_bias(staged, t.pair);
  PF_UNROLL
  for (int r = 0; r < ConvTile<T, S>::kRun; ++r) t.sum[live_place<T, S>(phase, 0)][r] = bias;
}

// Adds the source plane of `step`; `phase` is step % kPeriod, known to the compiler.
template <typename T, int S>
PF_HOST_DEVICE void add_conv(const DepthwiseCudaParams& p, ConvThread<T, S>& t, int step, int phase,
                             const float* staged, const T* slot) {
  constexpr int kLast = kDepthwiseSide - 1;
  Pair x[ConvTile<T, S>::kSpan];
  if (inside(t.source, step) && step >= kLast && step < t.planes * S) {
    // All taps lead to target planes of the block: no branch in between.
    if (reaches<S>(phase, 0)) start_sums(t, phase, staged);
    PF_UNROLL
    for (int kh = 0; kh < kDepthwiseSide; ++kh) {
      load_row(t, slot, kh, x);
      PF_UNROLL
      for (int kd = 0; kd < kDepthwiseSide; ++kd) {
        if (!reaches<S>(phase, kd)) continue;
        add_row<T, S>(x, staged, t.pair, kd, kh, t.sum[live_place<T, S>(phase, kd)]);
      }
    }
  } else {
    if (reaches<S>(phase, 0)) start_sums(t, phase, staged);
    const int rows = inside(t.source, step) ? kDepthwiseSide : 0;
    PF_NO_UNROLL
    for (int kh = 0; kh < rows; ++kh) {
      load_row(t, slot, kh, x);
      PF_UNROLL
      for (int kd = 0; kd < kDepthwiseSide; ++kd) {
        if (!reaches<S>(phase, kd) || step < kd || (step - kd) / S >= t.planes) continue;
        add_row<T, S>(x, staged, t.pair, kd, kh, t.sum[live_place<T, S>(phase, kd)]);
      }
    }
  }
  if (reaches<S>(phase, kLast) && step >= kLast) {
    store_conv(p, t, (step - kLast) / S, t.sum[live_place<T, S>(phase, kLast)]);
  }
}

}  // namespace petite_fast
