// CPU form of common/depthwise.h: the weight gradient. Compiled once per instruction set, each into
// its own namespace PF_ISA.
//
// Sums are float: over a row, then over a plane, then over the planes of a unit, then over units in
// a fixed order.
#include "common/depthwise.h"
#include "cpu/depthwise_pack.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

constexpr int64_t kSumFloats = kDepthwiseTaps * kLanes;

// The part [begin, end) of a row of targets whose three taps all lie inside the row of sources.
struct Interior {
  int64_t begin, end;

  explicit Interior(const DepthwiseAxis& w) {
    const int64_t room = w.large - kDepthwiseSide + w.padding;  // begin of the last full triple
    begin = std::min(w.padding, w.small);
    end = room < 0 ? begin : std::max(begin, std::min(w.small, room / w.stride + 1));
  }
};

// Adds the products of a row of grad_y and of kRows rows of x to sums[row][tap].
template <int S, int kRows>
inline void add_row(const DepthwiseAxis& w, const Interior& interior, const float* grad,
                    const float* x, int64_t pitch, float* sums) {
  Floats sum[kRows][kDepthwiseSide] = {};
  const auto edge = [&](int64_t t) {
    const Floats g = load(grad + t * kLanes);
    const int64_t first = t * S - w.padding;
    for (int k = 0; k < kDepthwiseSide; ++k) {
      if (first + k < 0 || first + k >= w.large) continue;
      for (int r = 0; r < kRows; ++r) sum[r][k] += g * load(x + (r * pitch + first + k) * kLanes);
    }
  };
  for (int64_t t = 0; t < interior.begin; ++t) edge(t);
  for (int64_t t = interior.begin; t < interior.end; ++t) {
    const Floats g = load(grad + t * kLanes);
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r) {
      const float* here = x + (r * pitch + t * S - w.padding) * kLanes;
#pragma GCC unroll 3
      for (int k = 0; k < kDepthwiseSide; ++k) sum[r][k] += g * load(here + k * kLanes);
    }
  }
  for (int64_t t = interior.end; t < w.small; ++t) edge(t);
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kDepthwiseSide; ++k) {
      float* to = sums + (r * kDepthwiseSide + k) * kLanes;
      store(to, load(to) + sum[r][k]);
    }
  }
}

template <int S>
inline void add_rows(int64_t rows, const DepthwiseAxis& w, const Interior& interior,
                     const float* grad, const float* x, int64_t pitch, float* sums) {
  if (rows == 3) return add_row<S, 3>(w, interior, grad, x, pitch, sums);
  if (rows == 2) return add_row<S, 2>(w, interior, grad, x, pitch, sums);
  if (rows == 1) add_row<S, 1>(w, interior, grad, x, pitch, sums);
}

// total[block][tap][lane] of one unit.
template <typename T>
void run_unit(const DepthwiseGradWeightParams& p, const Unit& unit, Ring ring, float* grads,
              int64_t block_grads, float* total) {
  const auto& [d, h, w] = p.shape.axis;
  const bool last = p.shape.channels_last;
  const Volume<const T> source{static_cast<const T*>(p.x), d.large * h.large * w.large,
                               p.shape.channels, last};
  const Volume<const T> grad_y{static_cast<const T*>(p.grad_y), d.small * h.small * w.small,
                               p.shape.channels, last};
  const Interior interior(w);
  ring.first = first_source(h, false, unit.height[0]);
  const int64_t band = last_source(h, false, unit.height[1] - 1) + 1 - ring.first;
  const int64_t step = rows_at_once(w.small);
  const int64_t blocks = unit.group.blocks();
  alignas(64) float sums[LaneGroups::kMostBlocks * kSumFloats];

  int64_t next = 0;
  for (int64_t od = unit.depth[0]; od < unit.depth[1]; ++od) {
    const int64_t from = first_source(d, false, od), to = last_source(d, false, od);
    for (next = std::max(next, from); next <= to; ++next) {
      pack(source, unit.group, (next * h.large + ring.first) * w.large, band * w.large,
           Rows{ring.row(next, ring.first), w.large, ring.pitch, ring.floats()});
    }
    std::memset(sums, 0, sizeof(sums));
    for (int64_t begin = unit.height[0]; begin < unit.height[1]; begin += step) {
      const int64_t end = std::min(begin + step, unit.height[1]);
      pack(grad_y, unit.group, (od * h.small + begin) * w.small, (end - begin) * w.small,
           Rows{grads, w.small, w.small, block_grads});
      for (int64_t oh = begin; oh < end; ++oh) {
        const float* grad = grads + (oh - begin) * w.small * kLanes;
        const int64_t top = first_source(h, false, oh);
        const int64_t rows = last_source(h, false, oh) + 1 - top;
        for (int64_t id = from; id <= to; ++id) {
          const int64_t tap = (depthwise_tap(d, false, od, id) * kDepthwiseSide +
                               depthwise_tap(h, false, oh, top)) *
                              kDepthwiseSide;
          for (int64_t b = 0; b < blocks; ++b) {
            const float* x = ring.row(id, top) + b * ring.floats();
            float* sum = sums + b * kSumFloats + tap * kLanes;
            if (w.stride == 1) {
              add_rows<1>(rows, w, interior, grad + b * block_grads, x, ring.pitch, sum);
            } else {
              add_rows<2>(rows, w, interior, grad + b * block_grads, x, ring.pitch, sum);
            }
          }
        }
      }
    }
    for (int64_t i = 0; i < blocks * kSumFloats; ++i) total[i] += sums[i];
  }
}

template <typename T>
void add_units(const DepthwiseGradWeightParams& p, const Units& units, const float* totals) {
  const LaneGroups& groups = units.groups;
  const int64_t per_group = units.chunks * units.bands;
  const int64_t unit_floats = groups.blocks() * kSumFloats;
  for (int64_t c = 0; c < p.shape.channels; ++c) {
    float sum[kDepthwiseTaps] = {};
    for (int64_t n = 0; n < p.shape.samples; ++n) {
      // Where this channel of this sample was summed.
      const int64_t row = p.shape.channels_last ? c : n * p.shape.channels + c;
      const int64_t group =
          row / groups.lanes + (p.shape.channels_last ? n * groups.per_sample : 0);
      const int64_t lane = row % groups.lanes;
      const float* total =
          totals + group * per_group * unit_floats + lane / kLanes * kSumFloats + lane % kLanes;
      for (int64_t u = 0; u < per_group; ++u, total += unit_floats) {
        for (int tap = 0; tap < kDepthwiseTaps; ++tap) sum[tap] += total[tap * kLanes];
      }
    }
    T* target = static_cast<T*>(p.grad_weight) + c * kDepthwiseTaps;
    for (int tap = 0; tap < kDepthwiseTaps; ++tap) target[tap] = round_from<T>(sum[tap]);
  }
}

template <typename T>
void run(const DepthwiseGradWeightParams& p, int threads) {
  const auto& [d, h, w] = p.shape.axis;
  threads = useful_threads(p.shape, false, threads);
  const Units units(p.shape, false, w.large * kLanes, threads);
  const int64_t blocks = units.groups.blocks();
  const int64_t grads = rows_at_once(w.small) * w.small * kLanes;
  const Ring ring{nullptr, w.large, units.most_source_rows(h, false), 0, 0};
  float* totals = p.zeros(p.owner, units.count * blocks * kSumFloats);
  parallel_for(units.count, 1, threads, [&](int64_t begin, int64_t end) {
    const Scratch scratch(blocks * (ring.floats() + grads));
    Ring own = ring;
    own.at = scratch.at();
    for (int64_t u = begin; u < end; ++u) {
      run_unit<T>(p, units[u], own, own.at + blocks * ring.floats(), grads,
                  totals + u * blocks * kSumFloats);
    }
  });
  add_units<T>(p, units, totals);
}

}  // namespace

void depthwise_grad_weight(const DepthwiseGradWeightParams& p, int threads) {
  if (p.shape.dtype == DType::kFloat32) return run<float>(p, threads);
  run<BFloat16>(p, threads);
}

}  // namespace PF_ISA
}  // namespace petite_fast
