// One thread block of the CUDA convolution that reads its input once: kernel 3, stride 1, one
// group, channels last, y[v, o] = sum over taps and c of x[v + tap - padding, c] W[tap, c, o].
//
// A block makes 4 x 8 x 8 output voxels of kColumns channels. The input voxels that they see, a box
// of 6 x 10 x 10 (the halo), come to shared memory once for every kChannels input channels; the 27
// shifted views are read from there as matrices of 16 voxels by 16 channels. A warp makes two rows
// of eight voxels at all four depths: for one (kh, kw) these see six matrices, and each is read
// once for up to three depths. So the weight follows in threes, the taps of all kd for one (kh,
// kw), the next three while the present ones are multiplied.
//
// Rows of eight voxels are read at once. kPitch is 16 bytes more than a voxel's channels, so the
// eight start in different banks and every address is a sum of a thread's own place and a constant.
//
// grad_x is the same function of grad_y, with mirrored taps, exchanged channels and padding 2 - p.
//
// The functions are written for a Machine that runs kWarps warps of kLanes lanes itself: one of
// each on the device, all of them in the host's emulator. Registers are arrays over these.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "common/dtype.h"
#include "common/macros.h"

namespace petite_fast {

struct ConvHaloParams {
  const void* x;       // [batch, input, in_channels]
  const void* weight;  // [27, in_channels / 16, out_channels / 16, 32 lanes, 8], see load_weights
  const void* bias;    // [out_channels] or null
  void* y;             // [batch, output, out_channels]
  DType dtype;         // of all of them: kBFloat16 or kFloat16
  int64_t batch;
  int32_t in_channels;  // multiples of 16
  int32_t out_channels;
  int32_t input[3];
  int32_t output[3];  // input + 2 padding - 2
  int32_t padding[3];
};

constexpr int kTileDepth = 4;
constexpr int kTileHeight = 8;
constexpr int kTileWidth = 8;
constexpr int kTileVoxels = kTileDepth * kTileHeight * kTileWidth;
constexpr int kHaloHeight = kTileHeight + 2;
constexpr int kHaloWidth = kTileWidth + 2;
constexpr int kHaloVoxels = (kTileDepth + 2) * kHaloHeight * kHaloWidth;
constexpr int kConvHaloWarps = kTileHeight / 2;
constexpr int kConvHaloThreads = 32 * kConvHaloWarps;
constexpr int kMatrixBytes = 512;  // 16 x 16 values: 16 bytes of every lane
constexpr int kPlaneTaps = 9;      // (kh, kw)

template <typename Value, int columns, int channels>
struct ConvHaloKind {
  using T = Value;
  static constexpr int kColumns = columns;
  static constexpr int kChannels = channels;
  static constexpr int kPitch = 2 * channels + 16;
  static constexpr int kInBlocks = channels / 16;
  static constexpr int kOutBlocks = columns / 16;
  static constexpr int kTapBytes = 3 * kInBlocks * kOutBlocks * kMatrixBytes;
  static constexpr int kWeights = kHaloVoxels * kPitch;  // where they start
  static constexpr int kStagedBytes = kWeights + 2 * kTapBytes;
  // The result takes the same memory on its way out.
  static constexpr int kResultPitch = 2 * columns + 16;
  static constexpr int kResultBytes = kTileVoxels * kResultPitch;
  static constexpr int kSharedBytes = kStagedBytes > kResultBytes ? kStagedBytes : kResultBytes;
};

// Columns of a block: the least padding, where a block's input costs as much as 32 columns.
static inline int conv_halo_columns(int out_channels) {
  int best = 0;
  int64_t least = INT64_MAX;
  for (int columns = 64; columns >= 16; columns -= 16) {
    const int64_t cost = (out_channels + columns - 1) / columns * int64_t{columns + 32};
    if (cost < least) {
      least = cost;
      best = columns;
    }
  }
  return best;
}

// Whether places inside the halo, which may leave the volume, fit 32 bits.
static inline bool conv_halo_fits(const ConvHaloParams& p) {
  return int64_t{6} * (p.input[1] + kHaloHeight) * (p.input[2] + kHaloWidth) <=
         INT32_MAX / p.in_channels;
}

static inline int64_t conv_halo_blocks(const ConvHaloParams& p) {
  const int columns = conv_halo_columns(p.out_channels);
  return p.batch * ((p.out_channels + columns - 1) / columns) *
         ((p.output[0] + kTileDepth - 1) / kTileDepth) *
         ((p.output[1] + kTileHeight - 1) / kTileHeight) *
         ((p.output[2] + kTileWidth - 1) / kTileWidth);
}

template <typename T, int columns, typename Visit>
void visit_conv_halo_channels(const ConvHaloParams& p, Visit visit) {
  if (p.in_channels % 32 == 0) {
    visit(ConvHaloKind<T, columns, 32>{});
  } else {
    visit(ConvHaloKind<T, columns, 16>{});
  }
}

template <typename T, typename Visit>
void visit_conv_halo_columns(const ConvHaloParams& p, Visit visit) {
  switch (conv_halo_columns(p.out_channels)) {
    case 16:
      return visit_conv_halo_channels<T, 16>(p, visit);
    case 32:
      return visit_conv_halo_channels<T, 32>(p, visit);
    case 48:
      return visit_conv_halo_channels<T, 48>(p, visit);
    default:
      return visit_conv_halo_channels<T, 64>(p, visit);
  }
}

// Calls visit with the ConvHaloKind that fits.
template <typename Visit>
void visit_conv_halo(const ConvHaloParams& p, Visit visit) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return visit_conv_halo_columns<BFloat16>(p, visit);
    case DType::kFloat16:
      return visit_conv_halo_columns<Float16>(p, visit);
    default:
      throw std::invalid_argument("conv_halo: dtype must be bfloat16 or float16");
  }
}

struct ConvHaloPlace {
  int64_t n;
  int32_t first[3];  // output voxel
  int32_t column;    // first output channel
};

// Blocks of one tile's columns come after each other, then those of its neighbours in a row: what
// they share of the input is read from the L2 cache.
PF_HOST_DEVICE ConvHaloPlace conv_halo_place(const ConvHaloParams& p, int64_t block, int columns) {
  ConvHaloPlace place;
  const int32_t column_blocks = (p.out_channels + columns - 1) / columns;
  place.column = static_cast<int32_t>(block % column_blocks) * columns;
  block /= column_blocks;
  const int32_t tile[3] = {kTileDepth, kTileHeight, kTileWidth};
  for (int i = 2; i >= 0; --i) {
    const int32_t tiles = (p.output[i] + tile[i] - 1) / tile[i];
    place.first[i] = static_cast<int32_t>(block % tiles) * tile[i];
    block /= tiles;
  }
  place.n = block;
  return place;
}

PF_HOST_DEVICE bool is_inside(int32_t i, int32_t size) { return i >= 0 && i < size; }

// kChannels channels of the halo; zeros where it leaves the volume.
template <typename Kind, typename Machine>
PF_BLOCK void load_halo(const ConvHaloParams& p, const ConvHaloPlace& place, int32_t channel,
                        Machine& machine) {
  constexpr int kPieces = Kind::kChannels / 8;  // of 16 bytes
  const char* x = static_cast<const char*>(p.x);
  int32_t first[3];
  for (int i = 0; i < 3; ++i) first[i] = place.first[i] - p.padding[i];
  const int64_t row = (place.n * p.input[0] + first[0]) * p.input[1] + first[1];
  const int64_t origin = (row * p.input[2] + first[2]) * p.in_channels + channel;
  for (int own = 0; own < Machine::kThreads; ++own) {
    PF_NO_UNROLL
    for (int i = machine.thread(own); i < kHaloVoxels * kPieces; i += kConvHaloThreads) {
      const int voxel = i / kPieces;
      const int piece = i % kPieces;
      const int32_t d = voxel / (kHaloHeight * kHaloWidth);
      const int32_t h = voxel / kHaloWidth % kHaloHeight;
      const int32_t w = voxel % kHaloWidth;
      const bool inside = is_inside(first[0] + d, p.input[0]) &&
                          is_inside(first[1] + h, p.input[1]) &&
                          is_inside(first[2] + w, p.input[2]);
      const int32_t source = ((d * p.input[1] + h) * p.input[2] + w) * p.in_channels + piece * 8;
      machine.copy16(voxel * Kind::kPitch + piece * 16, x + (inside ? 2 * (origin + source) : 0),
                     inside);
    }
  }
}

// W at three taps, in the order in which a matrix instruction takes it: for 16 input and 16 output
// channels every lane has 16 bytes, W[2 t + 8 half + i, g + 8 tile] for g = lane / 4, t = lane % 4,
// by (tile, half, i).
template <typename Kind, typename Machine>
PF_BLOCK void load_weights(const ConvHaloParams& p, const ConvHaloPlace& place, int32_t channel,
                           int plane_tap, Machine& machine) {
  const char* weight = static_cast<const char*>(p.weight);
  const int to = Kind::kWeights + plane_tap % 2 * Kind::kTapBytes;
  for (int own = 0; own < Machine::kThreads; ++own) {
    PF_NO_UNROLL
    for (int i = machine.thread(own); i < Kind::kTapBytes / 16; i += kConvHaloThreads) {
      const int lane = i % 32;
      const int column = place.column + i / 32 % Kind::kOutBlocks * 16;
      const int row = channel + i / (32 * Kind::kOutBlocks) % Kind::kInBlocks * 16;
      const int kd = i / (32 * Kind::kOutBlocks * Kind::kInBlocks);
      const bool inside = column < p.out_channels;
      const int64_t source =
          (int64_t{kd * kPlaneTaps + plane_tap} * p.in_channels + row) * p.out_channels +
          int64_t{16} * column;
      machine.copy16(to + i * 16, weight + (inside ? 2 * source + lane * 16 : 0), inside);
    }
  }
}

// sums += x[shifted by the three taps of one (kh, kw)] W, for one warp.
template <typename Kind, typename Machine>
PF_BLOCK void multiply_taps(int warp, int plane_tap, Machine& machine,
                            float (&sums)[kTileDepth][Kind::kColumns / 8][Machine::kLanes][4]) {
  constexpr int kLanes = Machine::kLanes;
  int voxels[kLanes];
  int weights[kLanes];
  for (int own = 0; own < kLanes; ++own) {
    const int lane = machine.lane(own);
    const int h = 2 * warp + lane / 8 % 2 + plane_tap / 3;
    const int w = lane % 8 + plane_tap % 3;
    voxels[own] = (h * kHaloWidth + w) * Kind::kPitch + lane / 16 * 16;
    weights[own] = Kind::kWeights + plane_tap % 2 * Kind::kTapBytes + lane * 16;
  }
  PF_UNROLL
  for (int k = 0; k < Kind::kInBlocks; ++k) {
    uint32_t b[3][Kind::kOutBlocks][kLanes][4];
    PF_UNROLL
    for (int kd = 0; kd < 3; ++kd) {
      PF_UNROLL
      for (int n = 0; n < Kind::kOutBlocks; ++n) {
        const int matrix = (kd * Kind::kInBlocks + k) * Kind::kOutBlocks + n;
        machine.load16(weights, matrix * kMatrixBytes, b[kd][n]);
      }
    }
    PF_UNROLL
    for (int depth = 0; depth < kTileDepth + 2; ++depth) {
      uint32_t a[kLanes][4];
      machine.load_matrices(voxels, depth * kHaloHeight * kHaloWidth * Kind::kPitch + 32 * k, a);
      PF_UNROLL
      for (int kd = 0; kd < 3; ++kd) {
        if (depth < kd || depth - kd >= kTileDepth) continue;
        PF_UNROLL
        for (int n = 0; n < Kind::kColumns / 8; ++n) {
          machine.template multiply<typename Kind::T>(a, b[kd][n / 2], n % 2, sums[depth - kd][n]);
        }
      }
    }
  }
}

// sums + bias, rounded, to shared memory.
template <typename Kind, typename Machine>
PF_BLOCK void round_result(
    const ConvHaloParams& p, const ConvHaloPlace& place, int warp, Machine& machine,
    const float (&sums)[kTileDepth][Kind::kColumns / 8][Machine::kLanes][4]) {
  using T = typename Kind::T;
  constexpr int kLanes = Machine::kLanes;
  const T* bias = static_cast<const T*>(p.bias);
  PF_UNROLL
  for (int n = 0; n < Kind::kColumns / 8; ++n) {
    float added[kLanes][2] = {};
    int to[kLanes];
    for (int own = 0; own < kLanes; ++own) {
      const int lane = machine.lane(own);
      const int column = n * 8 + lane % 4 * 2;
      to[own] = (warp * 16 + lane / 4) * Kind::kResultPitch + 2 * column;
      if (bias != nullptr && place.column + column < p.out_channels) {
        added[own][0] = to_float(bias[place.column + column]);
        added[own][1] = to_float(bias[place.column + column + 1]);
      }
    }
    PF_UNROLL
    for (int depth = 0; depth < kTileDepth; ++depth) {
      PF_UNROLL
      for (int half = 0; half < 2; ++half) {
        uint32_t pair[kLanes];
        for (int own = 0; own < kLanes; ++own) {
          pair[own] =
              machine.template round_pair<T>(sums[depth][n][own][2 * half] + added[own][0],
                                             sums[depth][n][own][2 * half + 1] + added[own][1]);
        }
        machine.store4(to, (depth * 64 + half * 8) * Kind::kResultPitch, pair);
      }
    }
  }
}

// Eight lanes take the same piece of eight voxels: those start in different banks.
template <typename Kind, typename Machine>
PF_BLOCK void store_result(const ConvHaloParams& p, const ConvHaloPlace& place, int warp,
                           Machine& machine) {
  constexpr int kPieces = Kind::kColumns / 8;
  constexpr int kLanes = Machine::kLanes;
  char* y = static_cast<char*>(p.y);
  PF_NO_UNROLL
  for (int first = warp * 32; first < kTileVoxels * kPieces; first += kConvHaloThreads) {
    int voxel[kLanes];
    int piece[kLanes];
    int from[kLanes];
    uint32_t values[kLanes][4];
    for (int own = 0; own < kLanes; ++own) {
      const int i = first + machine.lane(own);
      voxel[own] = i / 8 / kPieces * 8 + i % 8;
      piece[own] = i / 8 % kPieces;
      from[own] = voxel[own] * Kind::kResultPitch + piece[own] * 16;
    }
    machine.load16(from, 0, values);
    for (int own = 0; own < kLanes; ++own) {
      const int32_t d = place.first[0] + voxel[own] / (kTileHeight * kTileWidth);
      const int32_t h = place.first[1] + voxel[own] / kTileWidth % kTileHeight;
      const int32_t w = place.first[2] + voxel[own] % kTileWidth;
      const int32_t column = place.column + piece[own] * 8;
      if (d < p.output[0] && h < p.output[1] && w < p.output[2] && column < p.out_channels) {
        const int64_t target = ((place.n * p.output[0] + d) * p.output[1] + h) * p.output[2] + w;
        machine.store16(y + 2 * (target * p.out_channels + column), values[own]);
      }
    }
  }
}

template <typename Kind, typename Machine>
PF_BLOCK void conv_halo_block(const ConvHaloParams& p, int64_t block, Machine& machine) {
  const ConvHaloPlace place = conv_halo_place(p, block, Kind::kColumns);
  float sums[Machine::kWarps][kTileDepth][Kind::kColumns / 8][Machine::kLanes][4] = {};
  for (int32_t channel = 0; channel < p.in_channels; channel += Kind::kChannels) {
    machine.barrier();  // the last channels are no longer read
    load_halo<Kind>(p, place, channel, machine);
    load_weights<Kind>(p, place, channel, 0, machine);
    PF_NO_UNROLL
    for (int plane_tap = 0; plane_tap < kPlaneTaps; ++plane_tap) {
      machine.wait();
      machine.barrier();  // everybody's copies are here, and the taps before are no longer read
      if (plane_tap + 1 < kPlaneTaps) load_weights<Kind>(p, place, channel, plane_tap + 1, machine);
      for (int own = 0; own < Machine::kWarps; ++own) {
        multiply_taps<Kind>(machine.warp(own), plane_tap, machine, sums[own]);
      }
    }
  }
  machine.barrier();
  for (int own = 0; own < Machine::kWarps; ++own) {
    round_result<Kind>(p, place, machine.warp(own), machine, sums[own]);
  }
  machine.barrier();
  for (int own = 0; own < Machine::kWarps; ++own) {
    store_result<Kind>(p, place, machine.warp(own), machine);
  }
}

}  // namespace petite_fast
