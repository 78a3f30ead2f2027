// The weight gradient of a depthwise convolution, phase by phase: see cuda/depthwise_tile.h.
//
// First the blocks of a channel tile share its items (chunks of planes of tiles of grad_y) and each
// writes one sum per weight; then these sums are added in their order, so that the result does not
// depend on which block came first.
//
// Zeros outside x and grad_y are multiplied as torch does it: a value that is not finite may make
// all 27 gradients of its channel NaN.
#pragma once

#include "cuda/depthwise_tile.h"

namespace petite_fast {

struct DepthwiseGradWeightCudaParams {
  DepthwiseShape shape;
  int32_t large_plane, small_plane;  // elements of a plane
  bool aligned;                      // see DepthwiseCudaParams, of x and grad_y
  int64_t chunk;                     // planes of grad_y in an item
  int64_t shares;                    // blocks of a channel tile
  const void* x;
  const void* grad_y;
  float* partial;     // [shares, 27, C]
  void* grad_weight;  // [C, 27]
};

template <typename T, int S>
struct GradWeightTile {
  static constexpr int kRun = S == 1 ? 8 : 4;   // voxels of grad_y of a thread, along the row
  static constexpr int kRows = S == 1 ? 8 : 4;  // of grad_y
  static constexpr int kCols = 2 * kRun;
  static constexpr int kThreads = kPairLanes * kRows * 2;
  static constexpr int kSlots = kDepthwiseSide + S;  // planes of x: three and the next S
  static constexpr int kSpan = (kRun - 1) * S + kDepthwiseSide;
  using Source =
      Window<T, (kRows - 1) * S + kDepthwiseSide, (kCols - 1) * S + kDepthwiseSide, kThreads>;
  using Grad = Window<T, kRows, kCols, kThreads>;
  static constexpr int kVolumeBytes =
      (kSlots * Source::kElements + 2 * Grad::kElements) * int{sizeof(T)};
  // At the end: the sums of the positions of the block.
  static constexpr int kSumBytes = kThreads / kPairLanes * kStagedWeights * int{sizeof(float)};
  static constexpr int kSharedBytes = kVolumeBytes > kSumBytes ? kVolumeBytes : kSumBytes;
};

// Step i of an item has its plane i of grad_y.
template <typename T, int S>
struct GradWeightThread {
  using Tile = GradWeightTile<T, S>;
  int thread, pair;
  int source_corner, grad_corner;  // of the run's first elements in a slot
  int channels_left;
  typename Tile::Source source_window;
  typename Tile::Grad grad_window;
  PlaneWalk source;
  int steps;
  int64_t grad;  // offset of plane 0
  Pair sum[kDepthwiseTaps];
};

template <typename T, int S>
PF_HOST_DEVICE void begin_grad_weight(int thread, GradWeightThread<T, S>& t) {
  using Tile = GradWeightTile<T, S>;
  const DepthwiseLane lane = lane_of(thread, Tile::kRows);
  const int col = lane.segment * Tile::kRun;
  t.thread = thread;
  t.pair = lane.pair;
  t.source_corner = (lane.row * Tile::Source::kCols + col) * S * kTileChannels + lane.pair;
  t.grad_corner = (lane.row * Tile::Grad::kCols + col) * kTileChannels + lane.pair;
  PF_UNROLL
  for (int tap = 0; tap < kDepthwiseTaps; ++tap) t.sum[tap] = Pair{};
}

template <typename T, int S>
PF_HOST_DEVICE void open_item(const DepthwiseGradWeightCudaParams& p, const DepthwisePlace& place,
                              GradWeightThread<T, S>& t) {
  const auto& [d, h, w] = p.shape.axis;
  t.channels_left = channels_left(p.shape, place.channel);
  t.source = walk_planes(place.sample, place.plane * S - d.padding, d.large, p.large_plane,
                         (place.planes - 1) * S + kDepthwiseSide);
  t.steps = place.planes;
  t.grad = (place.sample * d.small + place.plane) * p.small_plane;
  open_window(t.source_window, p.shape.channels, h.large, w.large, place.row * S - h.padding,
              place.col * S - w.padding, place.channel, t.thread);
  open_window(t.grad_window, p.shape.channels, h.small, w.small, place.row, place.col,
              place.channel, t.thread);
}

template <typename T, int S>
PF_HOST_DEVICE T* source_slot(T* shared, int plane) {
  using Tile = GradWeightTile<T, S>;
  return shared + plane % Tile::kSlots * Tile::Source::kElements;
}

template <typename T, int S>
PF_HOST_DEVICE T* grad_slot(T* shared, int step) {
  using Tile = GradWeightTile<T, S>;
  return shared + Tile::kSlots * Tile::Source::kElements + step % 2 * Tile::Grad::kElements;
}

// What step `step` needs and the one before did not.
template <typename T, int S>
PF_HOST_DEVICE void fetch_grad_weight(const DepthwiseGradWeightCudaParams& p,
                                      const GradWeightThread<T, S>& t, int step, T* shared) {
  if (step >= t.steps) return;
  const T* x = static_cast<const T*>(p.x);
  const T* grad_y = static_cast<const T*>(p.grad_y);
  PF_NO_UNROLL
  for (int i = step == 0 ? 0 : (step - 1) * S + kDepthwiseSide; i < step * S + kDepthwiseSide;
       ++i) {
    if (!inside(t.source, i)) continue;
    fetch(t.source_window, x + plane_offset(t.source, i, p.large_plane), true, p.aligned,
          t.channels_left, t.thread, source_slot<T, S>(shared, i));
  }
  fetch(t.grad_window, grad_y + t.grad + static_cast<int64_t>(step) * p.small_plane, true,
        p.aligned, t.channels_left, t.thread, grad_slot<T, S>(shared, step));
}

template <typename T, int S>
PF_HOST_DEVICE void add_grad_weight(GradWeightThread<T, S>& t, int step, T* shared) {
  using Tile = GradWeightTile<T, S>;
  const T* grad = grad_slot<T, S>(shared, step) + t.grad_corner;
  Pair g[Tile::kRun];
  PF_UNROLL
  for (int r = 0; r < Tile::kRun; ++r) g[r] = load_pair(grad + r * kTileChannels);
  PF_UNROLL
  for (int kd = 0; kd < kDepthwiseSide; ++kd) {
    if (!inside(t.source, step * S + kd)) continue;
    const T* from = source_slot<T, S>(shared, step * S + kd) + t.source_corner;
    PF_UNROLL
    for (int kh = 0; kh < kDepthwiseSide; ++kh) {
      Pair x[Tile::kSpan];
      PF_UNROLL
      for (int j = 0; j < Tile::kSpan; ++j) {
        x[j] = load_pair(from + (kh * Tile::Source::kCols + j) * kTileChannels);
      }
      PF_UNROLL
      for (int r = 0; r < Tile::kRun; ++r) {
        PF_UNROLL
        for (int kw = 0; kw < kDepthwiseSide; ++kw) {
          add_product(t.sum[(kd * kDepthwiseSide + kh) * kDepthwiseSide + kw], g[r], x[r * S + kw]);
        }
      }
    }
  }
}

// sums[position][tap][channel of the tile]
template <typename T, int S>
PF_HOST_DEVICE void leave_sums(const GradWeightThread<T, S>& t, float* sums) {
  float* own = sums + t.thread / kPairLanes * kStagedWeights + t.pair;
  PF_UNROLL
  for (int tap = 0; tap < kDepthwiseTaps; ++tap) {
    store_pair(own + tap * kTileChannels, t.sum[tap]);
  }
}

PF_HOST_DEVICE void add_positions(const DepthwiseGradWeightCudaParams& p, int64_t share,
                                  int64_t first_channel, int positions, int thread, int threads,
                                  const float* sums) {
  const int64_t channels = p.shape.channels;
  for (int i = thread; i < kStagedWeights; i += threads) {
    const int64_t channel = first_channel + i % kTileChannels;
    if (channel >= channels) continue;
    float sum = 0;
    for (int position = 0; position < positions; ++position) {
      sum += sums[position * kStagedWeights + i];
    }
    p.partial[(share * kDepthwiseTaps + i / kTileChannels) * channels + channel] = sum;
  }
}

// The second stage: a block has kSumWeights weights, their shares are dealt to kSumSlices threads.
constexpr int kSumWeights = 8;  // neighbouring channels, a sector of 32 bytes
constexpr int kSumSlices = 32;

PF_HOST_DEVICE int64_t weight_count(const DepthwiseGradWeightCudaParams& p) {
  return p.shape.channels * kDepthwiseTaps;
}

// sums[slice][weight]
PF_HOST_DEVICE void add_shares(const DepthwiseGradWeightCudaParams& p, int64_t block, int thread,
                               float* sums) {
  const int64_t weight = block * kSumWeights + thread % kSumWeights;
  float sum = 0;
  if (weight < weight_count(p)) {
    PF_UNROLL_4
    for (int64_t share = thread / kSumWeights; share < p.shares; share += kSumSlices) {
      sum += p.partial[share * weight_count(p) + weight];
    }
  }
  sums[thread] = sum;
}

template <typename T>
PF_HOST_DEVICE void add_slices(const DepthwiseGradWeightCudaParams& p, int64_t block, int thread,
                               const float* sums) {
  const int64_t weight = block * kSumWeights + thread;
  if (thread >= kSumWeights || weight >= weight_count(p)) return;
  float sum = 0;
  for (int slice = 0; slice < kSumSlices; ++slice) sum += sums[slice * kSumWeights + thread];
  const int64_t tap = weight / p.shape.channels, channel = weight % p.shape.channels;
  static_cast<T*>(p.grad_weight)[channel * kDepthwiseTaps + tap] = round_from<T>(sum);
}

}  // namespace petite_fast
