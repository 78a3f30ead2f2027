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
  const bool pairs = p.shape.channels % 2 == 0;
  PF_UNROLL
  for (int r = 0; r < ConvTile<T, S>::kRun; ++r) {
    if (r >= t.run) return;
    if (pairs) {
      store_pair(to, sum[r]);
    } else {
      store_channels(to, sum[r], t.pair + 1 < t.channels_left);
    }
    to += p.shape.channels;
  }
}

// Adds the source plane of `step`; `phase` is step % kPeriod, known to the compiler.
template <typename T, int S>
PF_HOST_DEVICE void add_conv(const DepthwiseCudaParams& p, ConvThread<T, S>& t, int step, int phase,
                             const float* staged, const T* slot) {
  using Tile = ConvTile<T, S>;
  const auto live = [phase](int kd) { return (phase - kd + Tile::kPeriod) / S % Tile::kLive; };
  const auto reaches = [phase](int kd) { return (phase - kd + Tile::kPeriod) % S == 0; };
  if (reaches(0)) {
    const Pair bias = staged_bias(staged, t.pair);
    PF_UNROLL
    for (int r = 0; r < Tile::kRun; ++r) t.sum[live(0)][r] = bias;
  }
  if (inside(t.source, step)) {
    PF_UNROLL
    for (int kh = 0; kh < kDepthwiseSide; ++kh) {
      const T* row = slot + t.corner + kh * Tile::Source::kCols * kTileChannels;
      Pair x[Tile::kSpan];
      PF_UNROLL
      for (int j = 0; j < Tile::kSpan; ++j) x[j] = load_pair(row + j * kTileChannels);
      PF_UNROLL
      for (int kd = 0; kd < kDepthwiseSide; ++kd) {
        if (!reaches(kd) || step < kd || (step - kd) / S >= t.planes) continue;
        PF_UNROLL
        for (int kw = 0; kw < kDepthwiseSide; ++kw) {
          const int tap = (kd * kDepthwiseSide + kh) * kDepthwiseSide + kw;
          const Pair weight = staged_weight(staged, t.pair, tap);
          PF_UNROLL
          for (int r = 0; r < Tile::kRun; ++r) {
            add_product(t.sum[live(kd)][r], weight, x[r * S + kw]);
          }
        }
      }
    }
  }
  constexpr int kLast = kDepthwiseSide - 1;
  if (reaches(kLast) && step >= kLast) store_conv(p, t, (step - kLast) / S, t.sum[live(kLast)]);
}

}  // namespace petite_fast
