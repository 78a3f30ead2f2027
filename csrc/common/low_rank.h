// The products of a convolution whose weight has few rows, r of them (LoRA's A; T taps, tile by
// tile, so that t and G are never whole in memory unless t is asked for):
//
//     t[q, v] = sum_{c, tap} A[q, c, tap] x[c, s v + tap - p]
//     G[q, v] = sum_o B[o, q] dy[o, v]                       (dy itself where there is no B)
//     dA[q, c, tap] = sum_v G[q, v] x[c, s v + tap - p]
//     dB[o, q] = sum_v dy[o, v] t[q, v]                      db[o] = sum_v dy[o, v]
//
// Floor: x and dy are read once, 4 (C + O) bytes a voxel; t and dA are 2 r C T flops a voxel each,
// G and dB 2 r O. For C = O = 32, r = 4, 27 taps at 48^3: 28 MB or 2 ms, 1.6 GFLOP or 20 ms a
// thread.
//
// A tile is `planes` output planes of `rows` rows. Its part of x lies in scratch as float planes in
// which a row is followed by the zeros that the padding asks for, and a strided convolution's rows
// and columns are sorted by their phase: each tap is then a fixed offset into a flat array, and
// rows need no remainders. Tiles that follow each other in depth share planes, in a ring of slots,
// unless there are so many channels that a tile works on some at a time.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

namespace petite_fast {

constexpr int64_t kLowRankMaxTaps = 27;
constexpr int64_t kLowRankMaxPlanes = 16;

struct LowRankShape {
  int64_t batch;
  int64_t channels;  // C
  int64_t outputs;   // O
  int64_t rank;      // r
  int64_t input[3];
  int64_t output[3];
  int64_t kernel[3];
  int64_t stride[3];
  int64_t padding[3];
};

// A dense [N, channels, D, H, W] tensor, or with the channels last in memory.
struct LowRankVolume {
  void* data;  // null: absent
  DType dtype;
  bool channels_last;
};

struct LowRankParams {
  LowRankShape shape;
  LowRankVolume x;
  LowRankVolume grad_y;
  LowRankVolume t;   // read where grad_y is given, else written
  const float* a;    // [C, T, r]
  const float* b;    // [O, r]
  float* grad_a;     // [r, C, T]; null: not asked for, as the next two
  float* grad_b;     // [O, r]
  float* grad_bias;  // [O]
  float* workspace;
  // Set to whether the gradients are. The zeros between a tile's rows meet x of other rows, so that
  // an infinity makes NaNs where it has no part.
  bool* finite;
};

struct LowRankPlan {
  int64_t taps;
  int64_t phases[3];  // of the strides, those that a tap falls on
  int64_t reach[3];   // offset of the last tap, in steps of the stride
  int64_t rows, planes;
  int64_t row_tiles, plane_tiles;
  int64_t pitch;                   // floats from row to row
  int64_t sub_plane;               // floats of one phase of an input plane
  int64_t in_plane;                // floats of an input plane
  int64_t slots;                   // input planes in the ring
  int64_t out_plane;               // floats of an output plane
  int64_t x_channels, y_channels;  // of C and O, at a time
  int64_t x, y, low;               // floats of scratch: x, dy, and each of G and t
  int64_t sums;                    // floats of dA, dB and db
};

PF_HOST_DEVICE int64_t low_rank_smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PF_HOST_DEVICE int64_t low_rank_larger(int64_t a, int64_t b) { return a > b ? a : b; }
PF_HOST_DEVICE int64_t low_rank_divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
// A whole number of cache lines.
PF_HOST_DEVICE int64_t low_rank_round_up(int64_t floats) { return (floats + 15) / 16 * 16; }

// All channels where `most` floats hold them, else equal parts of some eights that `few` floats
// hold.
PF_HOST_DEVICE int64_t low_rank_chunk(int64_t channels, int64_t floats, int64_t most, int64_t few) {
  if (channels * floats <= most) return channels;
  const int64_t parts = low_rank_divide_up(channels, low_rank_larger(8, few / floats));
  return low_rank_divide_up(low_rank_divide_up(channels, parts), 8) * 8;
}

// G of a tile stays in the first-level cache, x and dy in the second.
PF_HOST_DEVICE LowRankPlan low_rank_plan(const LowRankShape& s, int threads) {
  constexpr int64_t kLowFloats = 6144, kPositions = 1536;
  constexpr int64_t kRing = 144 * 1024, kChunk = 80 * 1024;
  LowRankPlan plan{};
  plan.taps = s.kernel[0] * s.kernel[1] * s.kernel[2];
  for (int i = 0; i < 3; ++i) {
    plan.phases[i] = low_rank_smaller(s.stride[i], s.kernel[i]);
    plan.reach[i] = (s.kernel[i] - 1) / s.stride[i];
  }
  // Zeros at the end of a row serve as the zeros before the next one; outputs share no place.
  const int64_t after = s.output[2] + s.kernel[2] - 1 - s.padding[2] - s.input[2];
  const int64_t zeros = low_rank_smaller(s.padding[2], low_rank_larger(0, after));
  const int64_t shared = s.stride[2] == 1 ? low_rank_smaller(zeros, plan.reach[2]) : 0;
  plan.pitch = s.output[2] + plan.reach[2] - shared;

  const int64_t positions = low_rank_smaller(kPositions, kLowFloats / low_rank_smaller(s.rank, 8));
  // With a few rows each, more and more of x is read twice.
  const int64_t least = low_rank_smaller(s.output[1], 4 * plan.reach[1] + 1);
  const int64_t most = low_rank_larger(least, positions / plan.pitch);
  plan.row_tiles = low_rank_divide_up(s.output[1], most);
  plan.rows = low_rank_divide_up(s.output[1], plan.row_tiles);
  plan.out_plane = low_rank_round_up(plan.rows * plan.pitch);
  // As many planes as fit, but a tile for every thread.
  const int64_t fit = low_rank_smaller(kLowRankMaxPlanes, positions / plan.out_plane);
  const int64_t wanted = low_rank_divide_up(threads, s.batch * plan.row_tiles);
  plan.plane_tiles = low_rank_larger(low_rank_divide_up(s.output[0], low_rank_larger(1, fit)),
                                     low_rank_smaller(s.output[0], wanted));
  plan.planes = low_rank_divide_up(s.output[0], plan.plane_tiles);
  plan.plane_tiles = low_rank_divide_up(s.output[0], plan.planes);

  plan.sub_plane = low_rank_round_up(plan.out_plane + plan.reach[1] * plan.pitch + plan.reach[2]);
  plan.in_plane = plan.phases[1] * plan.phases[2] * plan.sub_plane;
  plan.slots = s.stride[0] * (plan.planes - 1) + s.kernel[0];
  plan.x_channels = low_rank_chunk(s.channels, plan.slots * plan.in_plane, kRing, kChunk);
  plan.y_channels = low_rank_chunk(s.outputs, plan.planes * plan.out_plane, kChunk, kChunk);
  plan.x = plan.x_channels * plan.slots * plan.in_plane;
  plan.y = plan.y_channels * plan.planes * plan.out_plane;
  plan.low = s.rank * plan.planes * plan.out_plane;
  plan.sums = low_rank_round_up(s.channels * plan.taps * s.rank + s.outputs * s.rank + s.outputs);
  return plan;
}

PF_HOST_DEVICE int64_t low_rank_units(const LowRankShape& s, const LowRankPlan& plan) {
  return s.batch * plan.row_tiles * plan.plane_tiles;
}

PF_HOST_DEVICE int64_t low_rank_thread_floats(const LowRankPlan& plan) {
  return plan.x + plan.y + 2 * plan.low + plan.sums;
}

// Floats of a call's workspace, the last cache line for its alignment.
PF_HOST_DEVICE int64_t low_rank_workspace(const LowRankShape& s, int threads) {
  return low_rank_thread_floats(low_rank_plan(s, threads)) * threads + 16;
}

}  // namespace petite_fast
