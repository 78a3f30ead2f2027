// CPU form of common/stem.h; compiled once per instruction set, each into its own namespace PF_ISA.
#include "common/stem.h"

#include <algorithm>
#include <cstring>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

using Vec = Vector<float>;
typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));

constexpr int kLanes = VectorOf<float>::kLanes;
// Forward: kTile outputs times kWide vectors of voxels are summed in registers.
constexpr int kTile = kRegisters >= 32 ? 8 : 4;
constexpr int kWide = 3;
// Gradient: kGradOutputs times kGradTaps vectors; 27 taps are three times nine.
constexpr int kGradOutputs = kRegisters >= 32 ? 3 : 4;
constexpr int kGradTaps = kRegisters >= 32 ? 9 : 3;

// One slab's place: sample, output plane, first output row and how many.
struct Place {
  int64_t sample, plane, row, rows;
};

Place place_of(const StemParams& p, int64_t item) {
  const int64_t rows = stem_rows(p), per_plane = (p.output[1] + rows - 1) / rows;
  const int64_t row = item % per_plane * rows, plane = item / per_plane % p.output[0];
  return {item / per_plane / p.output[0], plane, row, std::min(rows, p.output[1] - row)};
}

int64_t item_count(const StemParams& p) {
  const int64_t rows = stem_rows(p);
  return p.batch * p.output[0] * ((p.output[1] + rows - 1) / rows);
}

// One padded input row, split by its columns modulo the stride.
void split_row(const StemParams& p, const float* source, float* target) {
  const int64_t stride = p.geometry.stride[2], padding = p.geometry.padding[2];
  const int64_t pitch = stem_pitch(p), size = p.input[2];
  for (int64_t phase = 0; phase < stride; ++phase, target += pitch) {
    // Column i of this part is column i * stride + phase - padding of the input.
    const int64_t first =
        std::min(pitch, std::max<int64_t>(0, (padding - phase + stride - 1) / stride));
    const int64_t behind = (size + padding - phase + stride - 1) / stride;
    const int64_t last = std::min(pitch, std::max(first, behind));
    std::fill(target, target + first, 0.0f);
    std::fill(target + last, target + pitch, 0.0f);
    const float* from = source + phase - padding;
    if (stride == 1) {
      std::copy(from + first, from + last, target + first);
    } else if (stride == 2) {
      for (int64_t i = first; i < last; ++i) target[i] = from[2 * i];
    } else {
      for (int64_t i = first; i < last; ++i) target[i] = from[stride * i];
    }
  }
}

void fill_slab(const StemParams& p, const Place& place, float* slab) {
  const ConvGeometry& g = p.geometry;
  const int64_t length = g.stride[2] * stem_pitch(p), rows = stem_slab_rows(p);
  const int64_t used = (place.rows - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1;
  for (int64_t c = 0; c < g.in_channels; ++c) {
    for (int64_t a = 0; a < g.kernel[0]; ++a, slab += rows * length) {
      const int64_t d = input_coordinate(g, 0, place.plane, a, p.input[0]);
      for (int64_t i = 0; i < used; ++i) {
        const int64_t h = place.row * g.stride[1] - g.padding[1] + i;
        float* target = slab + i * length;
        if (d < 0 || h < 0 || h >= p.input[1]) {
          std::fill(target, target + length, 0.0f);
          continue;
        }
        const int64_t plane = (place.sample * g.in_channels + c) * p.input[0] + d;
        split_row(p, p.x + (plane * p.input[1] + h) * p.input[2], target);
      }
    }
  }
}

// Where each tap starts in a slab; padded with the first place.
void find_taps(const StemParams& p, int64_t* offsets) {
  const ConvGeometry& g = p.geometry;
  const int64_t pitch = stem_pitch(p), rows = stem_slab_rows(p), stride = g.stride[2];
  int64_t t = 0;
  for (int64_t plane = 0; plane < g.in_channels * g.kernel[0]; ++plane) {
    for (int64_t b = 0; b < g.kernel[1]; ++b) {
      for (int64_t e = 0; e < g.kernel[2]; ++e) {
        const int64_t column = e * g.dilation[2];
        offsets[t++] = ((plane * rows + b * g.dilation[1]) * stride + column % stride) * pitch +
                       column / stride;
      }
    }
  }
  for (int64_t i = 0; i < kStemOutputs; ++i) offsets[t + i] = 0;
}

void store_some(float* target, Vec value, int64_t count) {
  if (count >= kLanes) return store_vector(target, value);
  float lanes[kLanes];
  store_vector(lanes, value);
  for (int64_t i = 0; i < count; ++i) target[i] = lanes[i];
}

// A vector of voxels of one output row: where its taps and its outputs start, and how many exist.
struct Run {
  const float* source;
  int64_t target;
  int64_t voxels;
};

// kWide runs for kTile outputs of which the first `outputs` exist.
void multiply(const Run* runs, const int64_t* offsets, int64_t taps, const float* weight,
              const float* bias, float* y, int64_t pitch, int64_t outputs) {
  Vec sum[kTile][kWide];
#pragma GCC unroll 8
  for (int o = 0; o < kTile; ++o) {
#pragma GCC unroll 3
    for (int i = 0; i < kWide; ++i) sum[o][i] = Vec{} + bias[o];
  }
  for (int64_t t = 0; t < taps; ++t, weight += kTile) {
    Vec x[kWide];
#pragma GCC unroll 3
    for (int i = 0; i < kWide; ++i) x[i] = load_vector<float>(runs[i].source + offsets[t]);
#pragma GCC unroll 8
    for (int o = 0; o < kTile; ++o) {
#pragma GCC unroll 3
      for (int i = 0; i < kWide; ++i) sum[o][i] += weight[o] * x[i];
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kTile; ++o) {
    if (o >= outputs) break;
#pragma GCC unroll 3
    for (int i = 0; i < kWide; ++i) {
      store_some(y + o * pitch + runs[i].target, sum[o][i], runs[i].voxels);
    }
  }
}

void forward_slab(const StemParams& p, const Place& place, const int64_t* offsets,
                  const float* slab) {
  const ConvGeometry& g = p.geometry;
  const int64_t taps = stem_taps(g), width = p.output[2];
  const int64_t pitch = p.output[0] * p.output[1] * width;
  const int64_t row_step = g.stride[1] * g.stride[2] * stem_pitch(p);
  const float* bias =
      p.workspace + stem_weight_workspace(p) - stem_round_up(g.out_channels, kStemOutputs);
  for (int64_t o = 0; o < g.out_channels; o += kTile) {
    const float* weight = p.workspace + o * taps;
    const int64_t outputs = std::min<int64_t>(kTile, g.out_channels - o);
    float* y = p.out + (place.sample * g.out_channels + o) * pitch +
               (place.plane * p.output[1] + place.row) * width;
    int64_t row = 0, w = 0;
    while (row < place.rows) {
      Run runs[kWide];
      for (int i = 0; i < kWide; ++i) {
        if (row == place.rows) {  // behind the last one: computed, not stored
          runs[i] = {slab, 0, 0};
          continue;
        }
        runs[i] = {slab + row * row_step + w, row * width + w, width - w};
        w += kLanes;
        if (w >= width) {
          w = 0;
          ++row;
        }
      }
      multiply(runs, offsets, taps, weight, bias + o, y, pitch, outputs);
    }
  }
}

// The first `count` lanes at `source`, zero behind; `end` is where its memory ends.
Vec load_some(const float* source, const float* end, int64_t count, Mask mask) {
  float lanes[kLanes] = {};
  if (end - source < kLanes) {
    for (int64_t i = 0; i < count; ++i) lanes[i] = source[i];
    source = lanes;
  }
  return reinterpret_cast<Vec>(reinterpret_cast<Mask>(load_vector<float>(source)) & mask);
}

using Sums = Vec[kGradOutputs][kGradTaps];

template <bool kMasked>
static inline void add_products(Sums& sums, const Vec* grad, const float* source,
                                const int64_t* offsets, Mask mask) {
#pragma GCC unroll 9
  for (int t = 0; t < kGradTaps; ++t) {
    Vec x = load_vector<float>(source + offsets[t]);
#if defined(__x86_64__)
    // Else the compiler reads x from memory for every product, and loads are what bounds the loop.
    asm("" : "+v"(x));
#endif
    if constexpr (kMasked) x = reinterpret_cast<Vec>(reinterpret_cast<Mask>(x) & mask);
#pragma GCC unroll 4
    for (int o = 0; o < kGradOutputs; ++o) sums[o][t] += grad[o] * x;
  }
}

// A tile of weights over all voxels of a slab; `partial` has a vector per weight.
void gradient_tile(const StemParams& p, const float* grad_y, const float* end, int64_t pitch,
                   int64_t outputs, const float* slab, const int64_t* offsets, int64_t rows,
                   float* partial) {
  const int64_t width = p.output[2], whole = width / kLanes * kLanes;
  const int64_t row_step = p.geometry.stride[1] * p.geometry.stride[2] * stem_pitch(p);
  Mask some{};
  for (int i = 0; i < kLanes; ++i) some[i] = i < width - whole ? -1 : 0;
  Sums sums{};
  for (int64_t row = 0; row < rows; ++row, grad_y += width, slab += row_step) {
    Vec grad[kGradOutputs];
    for (int64_t w = 0; w < whole; w += kLanes) {
#pragma GCC unroll 4
      for (int o = 0; o < kGradOutputs; ++o) {
        grad[o] = load_vector<float>(grad_y + std::min<int64_t>(o, outputs - 1) * pitch + w);
      }
      add_products<false>(sums, grad, slab + w, offsets, some);
    }
    if (whole == width) continue;
#pragma GCC unroll 4
    for (int o = 0; o < kGradOutputs; ++o) {
      const float* source = grad_y + std::min<int64_t>(o, outputs - 1) * pitch + whole;
      grad[o] = load_some(source, end, width - whole, some);
    }
    // What lies behind the row may be infinite: zeros in grad alone would make it NaN.
    add_products<true>(sums, grad, slab + whole, offsets, some);
  }
#pragma GCC unroll 4
  for (int o = 0; o < kGradOutputs; ++o) {
#pragma GCC unroll 9
    for (int t = 0; t < kGradTaps; ++t, partial += kLanes) {
      store_vector(partial, load_vector<float>(partial) + sums[o][t]);
    }
  }
}

int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }

void gradient_slab(const StemParams& p, const Place& place, const int64_t* offsets,
                   const float* slab, float* partial) {
  const ConvGeometry& g = p.geometry;
  const int64_t pitch = p.output[0] * p.output[1] * p.output[2];
  const float* end = p.grad_y + p.batch * g.out_channels * pitch;
  const int64_t start = (place.plane * p.output[1] + place.row) * p.output[2];
  for (int64_t o = 0; o < g.out_channels; o += kGradOutputs) {
    const float* grad_y = p.grad_y + (place.sample * g.out_channels + o) * pitch + start;
    const int64_t outputs = std::min<int64_t>(kGradOutputs, g.out_channels - o);
    for (int64_t t = 0; t < stem_taps(g); t += kGradTaps) {
      gradient_tile(p, grad_y, end, pitch, outputs, slab, offsets + t, place.rows, partial);
      partial += kGradOutputs * kGradTaps * kLanes;
    }
  }
}

// grad_W from the partial sums of every thread, in a fixed order.
void sum_partials(const StemParams& p, const float* first, int64_t step, int64_t parts) {
  const int64_t taps = stem_taps(p.geometry), tap_tiles = tiles(taps, kGradTaps);
  for (int64_t o = 0; o < p.geometry.out_channels; ++o) {
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t tile = o / kGradOutputs * tap_tiles + t / kGradTaps;
      const int64_t inside = o % kGradOutputs * kGradTaps + t % kGradTaps;
      const float* partial = first + (tile * kGradOutputs * kGradTaps + inside) * kLanes;
      float total = 0.0f;
      for (int64_t i = 0; i < parts; ++i, partial += step) {
        for (int lane = 0; lane < kLanes; ++lane) total += partial[lane];
      }
      p.out[o * taps + t] = total;
    }
  }
}

// [O, taps] -> [tile, taps, kTile] and the bias behind it, zero where there is no output.
void pack_weight(const StemParams& p) {
  const int64_t taps = stem_taps(p.geometry), outputs = p.geometry.out_channels;
  const int64_t padded = stem_round_up(outputs, kStemOutputs);
  float* bias = p.workspace + padded * taps;
  for (int64_t o = 0; o < padded; ++o) {
    float* target = p.workspace + o / kTile * kTile * taps + o % kTile;
    for (int64_t t = 0; t < taps; ++t) target[t * kTile] = o < outputs ? p.weight[o * taps + t] : 0;
    bias[o] = o < outputs && p.bias != nullptr ? p.bias[o] : 0;
  }
}

}  // namespace

void stem(const StemParams& p, int threads) {
  const bool forward = p.grad_y == nullptr;
  int64_t offsets[kStemMaxTaps + kStemOutputs];
  find_taps(p, offsets);
  if (forward) pack_weight(p);
  const int64_t items = item_count(p), step = stem_thread_workspace(p), slab_size = stem_slab(p);
  const int64_t parts = std::min<int64_t>(threads, items);
  float* first = p.workspace + stem_weight_workspace(p);
  parallel_for(parts, 1, static_cast<int>(parts), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* slab = first + part * step;
      std::fill(slab + slab_size, slab + step, 0.0f);
      for (int64_t i = items * part / parts; i < items * (part + 1) / parts; ++i) {
        const Place place = place_of(p, i);
        fill_slab(p, place, slab);
        if (forward) {
          forward_slab(p, place, offsets, slab);
        } else {
          gradient_slab(p, place, offsets, slab, slab + slab_size);
        }
      }
    }
  });
  if (!forward) sum_partials(p, first + slab_size, step, parts);
}

}  // namespace PF_ISA
}  // namespace petite_fast
