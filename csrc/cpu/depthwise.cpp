// CPU form of common/depthwise.h: a convolution and its adjoint. Compiled once per instruction set,
// each into its own namespace PF_ISA.
#include "common/depthwise.h"

#include "cpu/depthwise_pack.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

constexpr int64_t kShort = 4;  // targets computed together at least
constexpr int64_t kLong = 8;   // the most: accumulators of independent chains

// In a register: the compiler would read memory again at every use, and loads are the bottleneck.
inline Floats load_once(const float* source) {
  Floats value = load(source);
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
  return value;
}

// A row of the source and its three taps.
struct Line {
  const float* source;
  const float* taps;
};

struct Lines {
  Line line[kDepthwiseSide * kDepthwiseSide];
  int count = 0;

  // To the next block of lanes.
  void move(int64_t source, int64_t taps) {
    for (int l = 0; l < count; ++l) line[l] = {line[l].source + source, line[l].taps + taps};
  }
};

// Targets t < kCount of a row, out[t] = bias + sum over lines and k of taps[k] source[t * S + k].
template <int S, int kCount>
inline void gather(const Lines& lines, int64_t from, Floats bias, float* out) {
  Floats sum[kCount];
#pragma GCC unroll 8
  for (int t = 0; t < kCount; ++t) sum[t] = bias;
  for (int l = 0; l < lines.count; ++l) {
    const float* source = lines.line[l].source + from * S * kLanes;
    const float* taps = lines.line[l].taps;
    const Floats w[3] = {load(taps), load(taps + kLanes), load(taps + 2 * kLanes)};
#pragma GCC unroll 17
    for (int j = 0; j < S * (kCount - 1) + 3; ++j) {
      const Floats x = load_once(source + j * kLanes);
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) {
        if (j >= k && (j - k) % S == 0 && (j - k) / S < kCount) sum[(j - k) / S] += w[k] * x;
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kCount; ++t) store(out + (from + t) * kLanes, sum[t]);
}

// The adjoint of stride 2 makes pairs of targets: the even one reads two sources, the odd one one.
template <int kPairs>
inline void spread(const Lines& lines, int64_t from, Floats bias, float* out) {
  Floats even[kPairs], odd[kPairs];
#pragma GCC unroll 4
  for (int t = 0; t < kPairs; ++t) even[t] = odd[t] = bias;
  for (int l = 0; l < lines.count; ++l) {
    const float* source = lines.line[l].source + from * kLanes;
    const float* taps = lines.line[l].taps;
    const Floats w[3] = {load(taps), load(taps + kLanes), load(taps + 2 * kLanes)};
    Floats before = load(source);
#pragma GCC unroll 4
    for (int t = 0; t < kPairs; ++t) {
      const Floats here = load_once(source + (t + 1) * kLanes);
      even[t] += w[2] * before;
      even[t] += w[0] * here;
      odd[t] += w[1] * here;
      before = here;
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kPairs; ++t) {
    store(out + 2 * (from + t) * kLanes, even[t]);
    store(out + (2 * (from + t) + 1) * kLanes, odd[t]);
  }
}

// How rows lie in the ring and among the results, in vectors.
struct RowPlan {
  bool pairs;          // the adjoint of stride 2
  bool flipped;        // the adjoint of stride 1 is a convolution with the taps reversed
  int64_t low;         // zeros in front of a source row
  int64_t pitch;       // source
  int64_t computed;    // results of a row, some of them beyond its end
  int64_t out_before;  // results in front of the first that is wanted

  RowPlan(const DepthwiseAxis& w, bool adjoint) {
    pairs = adjoint && w.stride == 2;
    flipped = adjoint && w.stride == 1;
    out_before = pairs ? w.padding : 0;
    computed = round_up(target_size(w, adjoint) + out_before, kShort);
    low = pairs ? 1 : flipped ? kDepthwiseSide - 1 - w.padding : w.padding;
    const int64_t reach =
        pairs ? computed / 2 + 1 : (computed - 1) * (adjoint ? 1 : w.stride) + kDepthwiseSide;
    pitch = std::max(reach, low + source_size(w, adjoint));
  }
};

// `count` rows of results, a few columns at a time: what one row reads, the next reads again.
void compute_rows(const RowPlan& plan, int64_t stride, const Lines* lines, int64_t count,
                  Floats bias, float* out) {
  const int64_t pitch = plan.computed * kLanes;
  for (int64_t t = 0; t < plan.computed; t += kLong) {
    const bool is_long = t + kLong <= plan.computed;
    for (int64_t r = 0; r < count; ++r) {
      float* row = out + r * pitch;
      if (plan.pairs) {
        is_long ? spread<kLong / 2>(lines[r], t / 2, bias, row)
                : spread<kShort / 2>(lines[r], t / 2, bias, row);
      } else if (stride == 1 || plan.flipped) {
        is_long ? gather<1, kLong>(lines[r], t, bias, row)
                : gather<1, kShort>(lines[r], t, bias, row);
      } else {
        is_long ? gather<2, kLong>(lines[r], t, bias, row)
                : gather<2, kShort>(lines[r], t, bias, row);
      }
    }
  }
}

constexpr int64_t kTapFloats = kDepthwiseTaps * kLanes;

// taps[block][tap][lane] and bias[block][lane]
template <typename T>
void pack_taps(const DepthwiseParams& p, const LaneGroup& group, bool flipped, float* taps,
               float* bias) {
  for (int64_t l = 0; l < group.lanes; ++l) {
    const int64_t channel = (group.channel + l) % p.shape.channels;
    const T* weight = static_cast<const T*>(p.weight) + channel * kDepthwiseTaps;
    float* to = taps + l / kLanes * kTapFloats + l % kLanes;
    for (int tap = 0; tap < kDepthwiseTaps; ++tap) {
      to[(flipped ? tap - 2 * (tap % 3) + 2 : tap) * kLanes] = widen<float>(weight[tap]);
    }
    if (p.bias != nullptr) bias[l] = widen<float>(static_cast<const T*>(p.bias)[channel]);
  }
}

// What a unit works on.
struct Workspace {
  Ring ring;
  float* results;
  int64_t block_results;  // floats
};

template <typename T>
void run_unit(const DepthwiseParams& p, const RowPlan& plan, const Unit& unit, Workspace work) {
  const auto& [d, h, w] = p.shape.axis;
  const bool adjoint = p.adjoint;
  const LaneGroup& group = unit.group;
  constexpr int64_t kBlocks = LaneGroups::kMostBlocks;
  alignas(64) float taps[kBlocks * kTapFloats] = {}, bias[kBlocks * kLanes] = {};
  pack_taps<T>(p, group, plan.flipped, taps, bias);

  const int64_t source_width = source_size(w, adjoint), source_rows = source_size(h, adjoint);
  const int64_t width = target_size(w, adjoint), height = target_size(h, adjoint);
  const bool last = p.shape.channels_last;
  const Volume<const T> source{static_cast<const T*>(p.source),
                               source_size(d, adjoint) * source_rows * source_width,
                               p.shape.channels, last};
  const Volume<T> target{static_cast<T*>(p.target), target_size(d, adjoint) * height * width,
                         p.shape.channels, last};
  Ring& ring = work.ring;
  ring.first = first_source(h, adjoint, unit.height[0]);
  const int64_t band = last_source(h, adjoint, unit.height[1] - 1) + 1 - ring.first;
  const int64_t step = rows_at_once(width);

  int64_t next = 0;  // source plane to pack
  for (int64_t od = unit.depth[0]; od < unit.depth[1]; ++od) {
    const int64_t from = first_source(d, adjoint, od), to = last_source(d, adjoint, od);
    for (next = std::max(next, from); next <= to; ++next) {
      pack(source, group, (next * source_rows + ring.first) * source_width, band * source_width,
           Rows{ring.row(next, ring.first) + ring.low * kLanes, source_width, ring.pitch,
                ring.floats()});
    }
    for (int64_t begin = unit.height[0]; begin < unit.height[1]; begin += step) {
      const int64_t end = std::min(begin + step, unit.height[1]);
      Lines lines[kMostRows];
      for (int64_t oh = begin; oh < end; ++oh) {
        Lines& row = lines[oh - begin];
        for (int64_t id = from; id <= to; ++id) {
          const int64_t plane = kDepthwiseSide * depthwise_tap(d, adjoint, od, id);
          const int64_t bottom = last_source(h, adjoint, oh);
          for (int64_t ih = first_source(h, adjoint, oh); ih <= bottom; ++ih) {
            const int64_t tap = plane + depthwise_tap(h, adjoint, oh, ih);
            row.line[row.count++] = {ring.row(id, ih), taps + tap * kDepthwiseSide * kLanes};
          }
        }
      }
      for (int64_t b = 0; b < group.blocks(); ++b) {
        compute_rows(plan, w.stride, lines, end - begin, load(bias + b * kLanes),
                     work.results + b * work.block_results);
        for (int64_t r = 0; r < end - begin; ++r) lines[r].move(ring.floats(), kTapFloats);
      }
      unpack(
          Rows{work.results + plan.out_before * kLanes, width, plan.computed, work.block_results},
          (od * height + begin) * width, (end - begin) * width, target, group);
    }
  }
}

}  // namespace

void depthwise(const DepthwiseParams& p, int threads) {
  const auto& [d, h, w] = p.shape.axis;
  const RowPlan plan(w, p.adjoint);
  threads = useful_threads(p.shape, p.adjoint, threads);
  const Units units(p.shape, p.adjoint, plan.pitch * kLanes, threads);
  const int64_t blocks = units.groups.blocks();
  const int64_t results = rows_at_once(target_size(w, p.adjoint)) * plan.computed * kLanes;
  const Ring ring{nullptr, plan.pitch, units.most_source_rows(h, p.adjoint), plan.low, 0};
  parallel_for(units.count, 1, threads, [&](int64_t begin, int64_t end) {
    const Scratch scratch(blocks * (ring.floats() + results));
    Workspace work{ring, scratch.at() + blocks * ring.floats(), results};
    work.ring.at = scratch.at();
    for (int64_t u = begin; u < end; ++u) {
      if (p.shape.dtype == DType::kFloat32) {
        run_unit<float>(p, plan, units[u], work);
      } else {
        run_unit<BFloat16>(p, plan, units[u], work);
      }
    }
  });
}

}  // namespace PF_ISA
}  // namespace petite_fast
