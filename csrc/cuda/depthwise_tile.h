// What the depthwise CUDA kernels share: channels-last volumes, and how a block's part of them gets
// into shared memory. The kernels' phases between two barriers are functions, so that the host can
// run them (cpu/emulate_depthwise.cpp).
//
// A block has kTileChannels channels of a few rows and columns, and walks over planes. Sixteen
// threads side by side have two channels each of one run of voxels: sums or weights of 27 taps of
// two channels are 54 registers, those of eight would not fit. So shared memory is filled by 16
// bytes a thread and read by pairs; the pairs of sixteen threads are whole sectors when stored.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/depthwise.h"
#include "common/macros.h"
#include "cuda/pair.h"

namespace petite_fast {

constexpr int kPairLanes = 16;
constexpr int kTileChannels = 2 * kPairLanes;
constexpr int kVectorBytes = 16;
constexpr int64_t kMostPlaneElements = (int64_t{1} << 31) - 1;  // offsets in a plane are 32-bit

// A depthwise convolution or adjoint on the device. Volumes are channels-last, sizes and taps those
// of common/depthwise.h, except that an adjoint of stride 1 is a convolution with flipped taps.
struct DepthwiseCudaParams {
  DepthwiseShape shape;
  int32_t large_plane, small_plane;  // elements of a plane
  bool flipped;                      // tap k is weight[26 - k]
  bool aligned;   // every voxel of the volumes that are read starts at a multiple of 16 bytes
  int64_t chunk;  // target planes of a block
  const void* source;
  const void* weight;  // [C, 27]
  const void* bias;    // [C] or null
  void* target;
};

// Channels of the volume from the first of a tile on.
PF_HOST_DEVICE int channels_left(const DepthwiseShape& s, int64_t first_channel) {
  return static_cast<int>(s.channels - first_channel);
}

// Where a block or an item of its work is.
struct DepthwisePlace {
  int64_t sample, plane, row, col, channel;
  int planes;
};

struct DepthwiseExtent {
  int64_t planes, rows, cols;
};

PF_HOST_DEVICE int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

PF_HOST_DEVICE int64_t channel_tiles(const DepthwiseShape& s) {
  return parts(s.channels, kTileChannels);
}

// Items of one channel tile: chunks of planes, tiles of `rows` by `cols`.
PF_HOST_DEVICE int64_t depthwise_items(const DepthwiseShape& s, DepthwiseExtent size, int64_t chunk,
                                       int rows, int cols) {
  return s.samples * parts(size.planes, chunk) * parts(size.rows, rows) * parts(size.cols, cols);
}

// Columns vary fastest: blocks that run together share the borders of their tiles in L2.
PF_HOST_DEVICE DepthwisePlace place_of(DepthwiseExtent size, int64_t chunk, int rows, int cols,
                                       int64_t item, int64_t channel_tile) {
  const int64_t across = parts(size.cols, cols), down = parts(size.rows, rows);
  const int64_t deep = parts(size.planes, chunk);
  DepthwisePlace place;
  place.channel = channel_tile * kTileChannels;
  place.col = item % across * cols;
  item /= across;
  place.row = item % down * rows;
  item /= down;
  place.plane = item % deep * chunk;
  place.sample = item / deep;
  const int64_t left = size.planes - place.plane;
  place.planes = static_cast<int>(left < chunk ? left : chunk);
  return place;
}

// Planes of a block: about 1024 blocks, but not so few planes that reading the two around them
// again counts.
PF_HOST_DEVICE int64_t depthwise_chunk(const DepthwiseShape& s, DepthwiseExtent size, int rows,
                                       int cols) {
  constexpr int64_t kFewest = 4, kMost = 32, kBlocks = 1024;
  const int64_t blocks = channel_tiles(s) * depthwise_items(s, size, 1, rows, cols);
  const int64_t chunk = parts(blocks, kBlocks);
  return chunk < kFewest ? kFewest : chunk > kMost ? kMost : chunk;
}

// The thread's place in its block: positions side by side are neighbouring rows. The number of
// voxels from row to row is odd, so that two rows of 64 bytes a voxel lie in different banks.
struct DepthwiseLane {
  int pair, row, segment;  // pair: the first of its two channels in the tile
};

PF_HOST_DEVICE DepthwiseLane lane_of(int thread, int rows) {
  const int position = thread / kPairLanes;
  return {thread % kPairLanes * 2, position % rows, position / rows};
}

// 16 bytes to shared memory, or zeros. On the device the copy is only on its way.
PF_HOST_DEVICE void copy_vector(void* to, const void* from, bool inside) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(inside ? kVectorBytes : 0)
               : "memory");
#else
  if (inside) {
    memcpy(to, from, kVectorBytes);
  } else {
    memset(to, 0, kVectorBytes);
  }
#endif
}

// A part of a plane, kRows x kUsed voxels of kTileChannels channels, and what one of kThreads
// threads copies of it.
template <typename T, int kRows, int kUsed, int kThreads>
struct Window {
  static constexpr int kCols = kUsed | 1;
  static constexpr int kVector = kVectorBytes / sizeof(T);
  static constexpr int kPerVoxel = kTileChannels / kVector;
  static constexpr int kVectors = kRows * kCols * kPerVoxel;
  static constexpr int kCopies = (kVectors + kThreads - 1) / kThreads;
  static constexpr int kElements = kVectors * kVector;

  static_assert(kThreads % kPerVoxel == 0, "a thread copies the same channels of all its voxels");

  int32_t offset[kCopies];  // in the plane; -1: outside
};

PF_HOST_DEVICE int32_t plane_elements(const DepthwiseShape& s, bool large) {
  const auto& [d, h, w] = s.axis;
  return static_cast<int32_t>((large ? h.large * w.large : h.small * w.small) * s.channels);
}

template <typename T, int kRows, int kUsed, int kThreads>
PF_HOST_DEVICE void open_window(Window<T, kRows, kUsed, kThreads>& window, int64_t channels,
                                int64_t rows, int64_t cols, int64_t first_row, int64_t first_col,
                                int64_t first_channel, int thread) {
  using W = Window<T, kRows, kUsed, kThreads>;
  PF_UNROLL
  for (int i = 0; i < W::kCopies; ++i) {
    const int vector = thread + i * kThreads;
    const int voxel = vector / W::kPerVoxel;
    const int64_t row = first_row + voxel / W::kCols, col = first_col + voxel % W::kCols;
    const int64_t channel = first_channel + vector % W::kPerVoxel * W::kVector;
    const bool inside = vector < W::kVectors && voxel % W::kCols < kUsed && row >= 0 &&
                        row < rows && col >= 0 && col < cols && channel < channels;
    window.offset[i] = inside ? static_cast<int32_t>((row * cols + col) * channels + channel) : -1;
  }
}

// Copies the window of `plane` to shared memory; zeros where the window or the plane is outside.
template <typename T, int kRows, int kUsed, int kThreads>
PF_HOST_DEVICE void fetch(const Window<T, kRows, kUsed, kThreads>& window, const T* plane,
                          bool plane_inside, bool aligned, int channels_left, int thread, T* to) {
  using W = Window<T, kRows, kUsed, kThreads>;
  to += thread * W::kVector;
  if (aligned) {
    PF_UNROLL
    for (int i = 0; i < W::kCopies; ++i) {
      // Only the last copy is not for all threads.
      if ((i + 1) * kThreads > W::kVectors && thread + i * kThreads >= W::kVectors) return;
      const bool inside = plane_inside && window.offset[i] >= 0;
      copy_vector(to + i * kThreads * W::kVector, plane + (inside ? window.offset[i] : 0), inside);
    }
    return;
  }
  const int channels = channels_left - thread % W::kPerVoxel * W::kVector;
  PF_UNROLL
  for (int i = 0; i < W::kCopies; ++i) {
    if ((i + 1) * kThreads > W::kVectors && thread + i * kThreads >= W::kVectors) return;
    const int left = plane_inside && window.offset[i] >= 0 ? channels : 0;
    PF_NO_UNROLL
    for (int e = 0; e < W::kVector; ++e) {
      to[i * kThreads * W::kVector + e] = e < left ? plane[window.offset[i] + e] : T{};
    }
  }
}

// The planes that a block reads, step by step from the plane `first` of the volume's `size`.
struct PlaneWalk {
  int64_t start;   // of step 0's plane, in elements; may be before the volume
  int begin, end;  // steps whose planes are in the volume
};

PF_HOST_DEVICE PlaneWalk walk_planes(int64_t sample, int64_t first, int64_t size, int32_t elements,
                                     int steps) {
  const int64_t after = size - first;
  return {(sample * size + first) * elements, static_cast<int>(first < 0 ? -first : 0),
          static_cast<int>(after < steps ? after : steps)};
}

PF_HOST_DEVICE bool inside(const PlaneWalk& walk, int step) {
  return step >= walk.begin && step < walk.end;
}

PF_HOST_DEVICE int64_t plane_offset(const PlaneWalk& walk, int step, int32_t elements) {
  return walk.start + static_cast<int64_t>(step) * elements;
}

// Weights as [tap][channel of the tile] in float, and the bias behind them.
constexpr int kStagedWeights = kDepthwiseTaps * kTileChannels;
constexpr int kStaged = kStagedWeights + kTileChannels;

template <typename T>
PF_HOST_DEVICE void stage_weights(const DepthwiseCudaParams& p, int64_t first_channel, int thread,
                                  int threads, float* staged) {
  const T* weight = static_cast<const T*>(p.weight) + first_channel * kDepthwiseTaps;
  const T* bias = static_cast<const T*>(p.bias);
  const int left = channels_left(p.shape, first_channel);
  for (int i = thread; i < kStagedWeights; i += threads) {
    const int channel = i / kDepthwiseTaps, k = i % kDepthwiseTaps;
    const int tap = p.flipped ? kDepthwiseTaps - 1 - k : k;
    staged[tap * kTileChannels + channel] = channel < left ? widen<float>(weight[i]) : 0.0f;
  }
  for (int i = thread; i < kTileChannels; i += threads) {
    staged[kStagedWeights + i] =
        bias != nullptr && i < left ? widen<float>(bias[first_channel + i]) : 0.0f;
  }
}

PF_HOST_DEVICE Pair staged_weight(const float* staged, int pair, int tap) {
  return load_pair(staged + tap * kTileChannels + pair);
}

PF_HOST_DEVICE Pair staged_bias(const float* staged, int pair) {
  return staged_weight(staged, pair, kDepthwiseTaps);
}

}  // namespace petite_fast
