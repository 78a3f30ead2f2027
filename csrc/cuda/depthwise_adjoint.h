// The adjoint of a depthwise convolution with stride 2, phase by phase: see cuda/depthwise_tile.h.
//
// Targets are taken in cells of 2 x 2 x 2: with u = target + padding = 2 q + parity per axis,
//
//     parity 0: tap 0 of source q and tap 2 of source q - 1      parity 1: tap 1 of source q
//
// so that a cell reads 8 sources and each tap once. A block has kRows x kCols cells of a plane.
#pragma once

#include "cuda/depthwise_tile.h"

namespace petite_fast {

template <typename T>
struct AdjointTile {
  static constexpr int kRun = 4;  // cells of a thread, along the row
  static constexpr int kRows = 8;
  static constexpr int kCols = 2 * kRun;
  static constexpr int kThreads = kPairLanes * kRows * 2;
  static constexpr int kSlots = 3;  // source planes: q - 1, q and the next
  using Source = Window<T, kRows + 1, kCols + 1, kThreads>;
  static constexpr int kSharedBytes =
      kSlots * Source::kElements * int{sizeof(T)} + kStaged * int{sizeof(float)};
};

PF_HOST_DEVICE int64_t first_cell(const DepthwiseAxis& a) { return a.padding / 2; }

PF_HOST_DEVICE int64_t cells(const DepthwiseAxis& a) {
  return (a.large - 1 + a.padding) / 2 - first_cell(a) + 1;
}

PF_HOST_DEVICE DepthwiseExtent adjoint_extent(const DepthwiseShape& s) {
  return {cells(s.axis[0]), cells(s.axis[1]), cells(s.axis[2])};
}

template <typename T>
struct AdjointThread {
  int thread, pair;
  int corner;  // in a slot, of the source before the run's first cell: row and column q - 1
  int channels_left;
  typename AdjointTile<T>::Source window;
  PlaneWalk source;
  int planes;           // of cells
  int plane, row, col;  // of the first target of the run's first cell; may be before the volume
  int64_t target;       // its offset
  Pair weight[kDepthwiseTaps];
};

template <typename T>
PF_HOST_DEVICE void begin_adjoint(const DepthwiseCudaParams& p, const DepthwisePlace& place,
                                  int thread, const float* staged, AdjointThread<T>& t) {
  using Tile = AdjointTile<T>;
  const auto& [d, h, w] = p.shape.axis;
  const DepthwiseLane lane = lane_of(thread, Tile::kRows);
  const int64_t plane = first_cell(d) + place.plane, row = first_cell(h) + place.row;
  const int64_t col = first_cell(w) + place.col;
  t.thread = thread;
  t.pair = lane.pair;
  t.corner =
      (lane.row * Tile::Source::kCols + lane.segment * Tile::kRun) * kTileChannels + lane.pair;
  t.channels_left = channels_left(p.shape, place.channel);
  t.planes = place.planes;
  t.plane = static_cast<int>(2 * plane - d.padding);
  t.row = static_cast<int>(2 * (row + lane.row) - h.padding);
  t.col = static_cast<int>(2 * (col + lane.segment * Tile::kRun) - w.padding);
  t.target = (((place.sample * d.large + t.plane) * h.large + t.row) * w.large + t.col) *
                 p.shape.channels +
             place.channel + lane.pair;
  t.source = walk_planes(place.sample, plane - 1, d.small, p.small_plane, place.planes + 1);
  open_window(t.window, p.shape.channels, h.small, w.small, row - 1, col - 1, place.channel,
              thread);
  PF_UNROLL
  for (int tap = 0; tap < kDepthwiseTaps; ++tap) {
    t.weight[tap] = staged_weight(staged, t.pair, tap);
  }
}

// Step i reads the source plane before the block's i-th cell plane; 0 <= i <= planes.
template <typename T>
PF_HOST_DEVICE void fetch_adjoint(const DepthwiseCudaParams& p, const AdjointThread<T>& t, int step,
                                  T* slot) {
  if (step > t.planes) return;
  const bool there = inside(t.source, step);
  const int64_t offset = there ? plane_offset(t.source, step, p.small_plane) : 0;
  fetch(t.window, static_cast<const T*>(p.source) + offset, there, p.aligned, t.channels_left,
        t.thread, slot);
}

// Adds a row of sources (from the one before the run's first cell) to the targets of both parities.
template <typename T>
PF_HOST_DEVICE void add_adjoint_row(const T* row, const Pair (&weight)[kDepthwiseTaps], int kd,
                                    int kh, Pair (&sum)[2][AdjointTile<T>::kRun]) {
  constexpr int kRun = AdjointTile<T>::kRun;
  const int tap = (kd * kDepthwiseSide + kh) * kDepthwiseSide;
  Pair y[kRun + 1];
  PF_UNROLL
  for (int j = 0; j <= kRun; ++j) y[j] = load_pair(row + j * kTileChannels);
  PF_UNROLL
  for (int r = 0; r < kRun; ++r) {
    add_product(sum[0][r], weight[tap], y[r + 1]);
    add_product(sum[0][r], weight[tap + 2], y[r]);
    add_product(sum[1][r], weight[tap + 1], y[r + 1]);
  }
}

// The targets of the block's cell plane `step` - 1; `before` and `here` are the source planes q - 1
// and q.
template <typename T>
PF_HOST_DEVICE void add_adjoint(const DepthwiseCudaParams& p, const AdjointThread<T>& t, int step,
                                const float* staged, const T* before, const T* here) {
  using Tile = AdjointTile<T>;
  const auto& [d, h, w] = p.shape.axis;
  if (t.pair >= t.channels_left) return;
  const bool pairs = p.shape.channels % 2 == 0;
  const Pair bias = staged_bias(staged, t.pair);
  PF_UNROLL
  for (int deep = 0; deep < 2; ++deep) {
    const int planes = 2 * (step - 1) + deep;
    if (t.plane + planes < 0 || t.plane + planes >= d.large) continue;
    PF_UNROLL
    for (int down = 0; down < 2; ++down) {
      if (t.row + down < 0 || t.row + down >= h.large) continue;
      Pair sum[2][Tile::kRun];
      PF_UNROLL
      for (int r = 0; r < Tile::kRun; ++r) sum[0][r] = sum[1][r] = bias;
      PF_UNROLL
      for (int kd = deep; kd < kDepthwiseSide; kd += 2) {
        const T* from = (kd == 2 ? before : here) + t.corner;
        PF_UNROLL
        for (int kh = down; kh < kDepthwiseSide; kh += 2) {
          const int rows = kh == 2 ? 0 : Tile::Source::kCols * kTileChannels;
          add_adjoint_row<T>(from + rows, t.weight, kd, kh, sum);
        }
      }
      T* to = static_cast<T*>(p.target) + t.target + static_cast<int64_t>(planes) * p.large_plane +
              down * w.large * p.shape.channels;
      PF_UNROLL
      for (int i = 0; i < 2 * Tile::kRun; ++i, to += p.shape.channels) {
        if (t.col + i < 0 || t.col + i >= w.large) continue;
        if (pairs) {
          store_pair(to, sum[i % 2][i / 2]);
        } else {
          store_channels(to, sum[i % 2][i / 2], t.pair + 1 < t.channels_left);
        }
      }
    }
  }
}

}  // namespace petite_fast
