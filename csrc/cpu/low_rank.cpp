// CPU form of common/low_rank.h; compiled once per instruction set, each into its own namespace
// PF_ISA.
#include "common/low_rank.h"

#include <cstring>

#include "cpu/low_rank_products.h"
#include "cpu/low_rank_scratch.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

// Where a tile lies among the outputs.
struct Tile {
  int64_t n, row, rows, plane, planes;
};

Tile tile_of(const LowRankShape& s, const LowRankPlan& plan, int64_t unit) {
  const int64_t column = unit / plan.plane_tiles;
  const int64_t row = column % plan.row_tiles * plan.rows;
  const int64_t plane = unit % plan.plane_tiles * plan.planes;
  return {column / plan.row_tiles, row, low_rank_smaller(plan.rows, s.output[1] - row), plane,
          low_rank_smaller(plan.planes, s.output[0] - plane)};
}

template <typename Function>
void with_type(DType dtype, const Function& function) {
  if (dtype == DType::kBFloat16) return function(BFloat16{});
  function(0.0f);
}

// One thread's scratch and sums.
struct Worker {
  const LowRankParams& p;
  const LowRankPlan& plan;
  float *x, *y, *g, *t;
  float *sums_a, *sums_b, *sums_bias;
  int64_t column = -1;  // of tiles that the planes in the ring belong to
  int64_t next = 0;     // padded input plane that is not in the ring yet
  int64_t offsets[kLowRankMaxPlanes * kLowRankMaxTaps];
  int64_t zero = 0;

  Worker(const LowRankParams& params, const LowRankPlan& a_plan, float* scratch)
      : p(params), plan(a_plan) {
    std::memset(scratch, 0, sizeof(float) * low_rank_thread_floats(plan));
    x = scratch;
    y = x + plan.x;
    g = y + plan.y;
    t = g + plan.low;
    sums_a = t + plan.low;
    sums_b = sums_a + p.shape.channels * plan.taps * p.shape.rank;
    sums_bias = sums_b + p.shape.outputs * p.shape.rank;
  }

  // Channels [channel, channel + channels) of the tile's input, and where its taps find them.
  void pack_x(const Tile& tile, int64_t column_of_tile, int64_t channel, int64_t channels) {
    const LowRankShape& s = p.shape;
    if (column != column_of_tile || channels < s.channels) next = 0;
    column = column_of_tile;
    const int64_t first = s.stride[0] * tile.plane;
    const int64_t end = first + s.stride[0] * (tile.planes - 1) + s.kernel[0];
    with_type(p.x.dtype, [&](auto element) {
      using T = const decltype(element);
      const auto sample = sample_of<T>(p.x, tile.n, s.channels, s.input).part(channel, channels);
      for (next = low_rank_larger(next, first); next < end; ++next) {
        if (next % s.stride[0] >= plan.phases[0]) continue;  // no tap falls on it
        by_channel(sample, [&](const auto& part, int64_t c) {
          pack_input_plane(s, plan, part, next, tile.row, tile.rows,
                           x + (c * plan.slots + next % plan.slots) * plan.in_plane);
        });
      }
    });
    int64_t* offset = offsets;
    for (int64_t plane = first; plane < first + s.stride[0] * tile.planes; plane += s.stride[0]) {
      for (int64_t i = 0; i < plan.taps; ++i) {
        const int64_t kw = i % s.kernel[2], kh = i / s.kernel[2] % s.kernel[1];
        const int64_t kd = i / (s.kernel[1] * s.kernel[2]);
        const int64_t phase = kh % s.stride[1] * plan.phases[2] + kw % s.stride[2];
        *offset++ = (plane + kd) % plan.slots * plan.in_plane + phase * plan.sub_plane +
                    kh / s.stride[1] * plan.pitch + kw / s.stride[2];
      }
    }
  }

  void pack_output(const LowRankVolume& volume, int64_t all, int64_t channel, int64_t channels,
                   const Tile& tile, float* target) {
    with_type(volume.dtype, [&](auto element) {
      using T = const decltype(element);
      const auto sample = sample_of<T>(volume, tile.n, all, p.shape.output).part(channel, channels);
      by_channel(sample, [&](const auto& part, int64_t c) {
        for (int64_t i = 0; i < tile.planes; ++i) {
          pack_output_plane(p.shape, plan, part, tile.plane + i, tile.row, tile.rows,
                            target + (c * plan.planes + i) * plan.out_plane);
        }
      });
    });
  }

  void unpack_t(const Tile& tile) {
    with_type(p.t.dtype, [&](auto element) {
      using T = decltype(element);
      const auto sample = sample_of<T>(p.t, tile.n, p.shape.rank, p.shape.output);
      for (int64_t i = 0; i < tile.planes; ++i) {
        unpack_output_plane(p.shape, plan, sample, tile.plane + i, tile.row, tile.rows,
                            t + i * plan.out_plane);
      }
    });
  }

  // Calls function(first output, outputs in scratch) for all outputs; `packed`: they are there.
  template <typename Function>
  void over_outputs(const Tile& tile, bool packed, const Function& function) {
    const int64_t outputs = p.shape.outputs;
    for (int64_t first = 0; first < outputs; first += plan.y_channels) {
      const int64_t count = low_rank_smaller(plan.y_channels, outputs - first);
      if (!packed || count < outputs) pack_output(p.grad_y, outputs, first, count, tile, y);
      const int64_t stride = plan.planes * plan.out_plane;
      function(first, TapPlanes{y, count, stride, &zero, 1, 1});
    }
  }

  void sum_outputs(const TapPlanes& grads, int64_t count, float* sums) {
    for (int64_t o = 0; o < grads.channels; ++o) {
      const float* row = grads.data + o * grads.channel_stride;
      Floats sum{};
      for (int64_t i = 0; i < count; i += kLanes) sum += load_vector<float>(row + i);
      sums[o] += sum_lanes(sum);
    }
  }

  void run(int64_t unit) {
    const LowRankShape& s = p.shape;
    const Tile tile = tile_of(s, plan, unit);
    const int64_t stride = plan.planes * plan.out_plane;
    const int64_t whole = tile.planes * plan.out_plane;
    const int64_t count = tile.rows * plan.pitch;
    const bool forward = p.grad_y.data == nullptr;
    const bool makes_t = forward || (p.grad_b != nullptr && p.t.data == nullptr);
    const bool makes_g = p.grad_a != nullptr && p.b != nullptr;

    if (makes_g || p.grad_bias != nullptr) {
      over_outputs(tile, false, [&](int64_t first, const TapPlanes& grads) {
        if (p.grad_bias != nullptr) sum_outputs(grads, whole, sums_bias + first);
        if (!makes_g) return;
        project(grads, {p.b + first * s.rank, first > 0}, {g, s.rank, stride, whole}, whole);
      });
    } else if (p.grad_a != nullptr) {
      pack_output(p.grad_y, s.rank, 0, s.rank, tile, g);
    }
    for (int64_t c = 0; c < s.channels && (makes_t || p.grad_a != nullptr); c += plan.x_channels) {
      const int64_t channels = low_rank_smaller(plan.x_channels, s.channels - c);
      pack_x(tile, unit / plan.plane_tiles, c, channels);
      const int64_t first = c * plan.taps * s.rank;
      const TapPlanes inputs{x,       channels,    plan.slots * plan.in_plane,
                             offsets, tile.planes, plan.taps};
      if (makes_t) {
        project(inputs, {p.a + first, c > 0}, {t, s.rank, stride, plan.out_plane}, count);
      }
      if (p.grad_a != nullptr) {
        correlate(inputs, {g, s.rank, stride, plan.out_plane}, count, sums_a + first);
      }
    }
    if (forward) return unpack_t(tile);
    if (p.grad_b == nullptr) return;
    if (p.t.data != nullptr) pack_output(p.t, s.rank, 0, s.rank, tile, t);
    over_outputs(tile, makes_g || p.grad_bias != nullptr,
                 [&](int64_t first, const TapPlanes& grads) {
                   correlate(grads, {t, s.rank, stride, whole}, whole, sums_b + first * s.rank);
                 });
  }
};

// The sums of all threads, in their order. Returns whether they are finite.
bool add_up(const LowRankParams& p, const LowRankPlan& plan, const float* sums, int used) {
  const LowRankShape& s = p.shape;
  const int64_t step = low_rank_thread_floats(plan), columns = s.channels * plan.taps;
  float not_finite = 0;
  const auto total = [&](int64_t i) {
    float sum = sums[i];
    for (int k = 1; k < used; ++k) sum += sums[k * step + i];
    not_finite += sum * 0.0f;
    return sum;
  };
  if (p.grad_a != nullptr) {
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t q = 0; q < s.rank; ++q) p.grad_a[q * columns + i] = total(i * s.rank + q);
    }
  }
  const int64_t first = columns * s.rank, second = first + s.outputs * s.rank;
  if (p.grad_b != nullptr) {
    for (int64_t i = 0; i < s.outputs * s.rank; ++i) p.grad_b[i] = total(first + i);
  }
  if (p.grad_bias != nullptr) {
    for (int64_t o = 0; o < s.outputs; ++o) p.grad_bias[o] = total(second + o);
  }
  return not_finite == 0;
}

}  // namespace

void low_rank(const LowRankParams& p, int threads) {
  const LowRankPlan plan = low_rank_plan(p.shape, threads);
  const int64_t units = low_rank_units(p.shape, plan);
  const int used = static_cast<int>(low_rank_smaller(threads, units));
  const int64_t step = low_rank_thread_floats(plan);
  float* scratch = p.workspace + (16 - reinterpret_cast<uintptr_t>(p.workspace) / 4 % 16) % 16;
  // Not by units: a thread's sums belong to its number, whatever team the runtime gives.
  parallel_for(used, 1, used, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Worker worker(p, plan, scratch + i * step);
      for (int64_t unit = units * i / used; unit < units * (i + 1) / used; ++unit) worker.run(unit);
    }
  });
  *p.finite = add_up(p, plan, scratch + step - plan.sums, used);
}

}  // namespace PF_ISA
}  // namespace petite_fast
