// CPU form of common/bottleneck.h; compiled once per instruction set, each into its own namespace
// PF_ISA. A tile of voxels of all channels stays in the cache from its first product to its last.
#include "common/bottleneck.h"

#include <algorithm>

#include "cpu/gelu.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

using Vec = Vector<float>;
constexpr int kLanes = VectorOf<float>::kLanes;
constexpr int kRows = kBottleneckRows;
constexpr int kWide = kRegisters == 32 ? 4 : 2;  // vectors of a row that are made together
constexpr int64_t kTile = kBottleneckTile;

// [rows, inner] -> [tile of kRows, inner, kRows], zero behind the last row.
void pack(const float* weight, int64_t rows, int64_t inner, int64_t row_step, int64_t inner_step,
          float* out) {
  for (int64_t r = 0; r < rows; r += kRows) {
    for (int64_t i = 0; i < inner; ++i, out += kRows) {
      for (int64_t k = 0; k < kRows; ++k) {
        out[k] = r + k < rows ? weight[(r + k) * row_step + i * inner_step] : 0.0f;
      }
    }
  }
}

// out[r] = start[r] + bias[r] + sum over i of weight[r, i] in[i], for rows of kTile voxels. Rows
// behind the last one are computed where out has room for them (`padded`), else left out.
void product(const float* weight, int64_t rows, int64_t inner, const float* in, const float* bias,
             const float* start, bool padded, float* out) {
  for (int64_t r = 0; r < rows; r += kRows, weight += kRows * inner) {
    const int64_t stored = padded ? kRows : std::min<int64_t>(kRows, rows - r);
    for (int64_t v = 0; v < kTile; v += kWide * kLanes) {
      Vec sums[kRows][kWide];
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) {
        const int64_t row = std::min<int64_t>(r + k, rows - 1);
        const float first = bias == nullptr ? 0.0f : bias[row];
#pragma GCC unroll 4
        for (int w = 0; w < kWide; ++w) {
          sums[k][w] = Vec{} + first;
          if (start != nullptr) {
            sums[k][w] += load_vector<float>(start + row * kTile + v + w * kLanes);
          }
        }
      }
      for (int64_t i = 0; i < inner; ++i) {
        Vec values[kWide];
#pragma GCC unroll 4
        for (int w = 0; w < kWide; ++w) {
          values[w] = load_vector<float>(in + i * kTile + v + w * kLanes);
        }
#pragma GCC unroll 4
        for (int k = 0; k < kRows; ++k) {
          const float factor = weight[i * kRows + k];
#pragma GCC unroll 4
          for (int w = 0; w < kWide; ++w) sums[k][w] += values[w] * factor;
        }
      }
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) {
        if (k >= stored) continue;
#pragma GCC unroll 4
        for (int w = 0; w < kWide; ++w) {
          store_vector(out + (r + k) * kTile + v + w * kLanes, sums[k][w]);
        }
      }
    }
  }
}

// out[r, c] += sum over voxels of left[r] right[c]; sums[r] += those of left.
void outer_product(const float* left, int64_t rows, const float* right, int64_t columns, float* out,
                   float* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    // In eight sums, then in pairs: one long sum would round as often as there are voxels.
    Vec part[8] = {};
    for (int64_t v = 0; v < kTile; v += 8 * kLanes) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) part[i] += load_vector<float>(left + r * kTile + v + i * kLanes);
    }
    sums[r] += sum_lanes(((part[0] + part[1]) + (part[2] + part[3])) +
                         ((part[4] + part[5]) + (part[6] + part[7])));
  }
  for (int64_t r = 0; r < rows; r += kRows) {
    for (int64_t c = 0; c < columns; c += kWide) {
      Vec products[kRows][kWide] = {};
      for (int64_t v = 0; v < kTile; v += kLanes) {
        Vec values[kWide];
#pragma GCC unroll 4
        for (int w = 0; w < kWide; ++w) {
          values[w] = load_vector<float>(right + std::min<int64_t>(c + w, columns - 1) * kTile + v);
        }
#pragma GCC unroll 4
        for (int k = 0; k < kRows; ++k) {
          const Vec factor =
              load_vector<float>(left + std::min<int64_t>(r + k, rows - 1) * kTile + v);
#pragma GCC unroll 4
          for (int w = 0; w < kWide; ++w) products[k][w] += factor * values[w];
        }
      }
      for (int64_t k = 0; k < std::min<int64_t>(kRows, rows - r); ++k) {
        for (int64_t w = 0; w < std::min<int64_t>(kWide, columns - c); ++w) {
          out[(r + k) * columns + c + w] += sum_lanes(products[k][w]);
        }
      }
    }
  }
}

// a -> act(a), and g times act'(a) where there is a g.
void activate(BottleneckActivation activation, int64_t count, float* a, float* g) {
  const bool is_gelu = activation == BottleneckActivation::kGelu;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec value = load_vector<float>(a + i);
    if (is_gelu) {
      const Gelu both = gelu(value);
      store_vector(a + i, both.value);
      if (g != nullptr) store_vector(g + i, load_vector<float>(g + i) * both.slope);
    } else {
      store_vector(a + i, value <= 0.0f ? Vec{} : value);
      // Times 0, as in PyTorch: an infinite gradient is NaN there.
      const Vec slope = value > 0.0f ? Vec{} + 1.0f : Vec{};
      if (g != nullptr) store_vector(g + i, load_vector<float>(g + i) * slope);
    }
  }
}

template <typename T>
void read_tile(const T* source, int64_t channels, int64_t pitch, int64_t count, float* tile) {
  for (int64_t c = 0; c < channels; ++c, source += pitch, tile += kTile) {
    for (int64_t i = 0; i < count; ++i) tile[i] = widen<float>(source[i]);
    std::fill(tile + count, tile + kTile, 0.0f);
  }
}

template <typename T>
void write_tile(const float* tile, int64_t channels, int64_t pitch, int64_t count, T* target) {
  for (int64_t c = 0; c < channels; ++c, target += pitch, tile += kTile) {
    for (int64_t i = 0; i < count; ++i) target[i] = round_from<T>(tile[i]);
  }
}

struct Weights {  // packed
  const float *down, *up, *up_transposed, *down_transposed;
};

template <typename T>
void run_tiles(const BottleneckParams& p, const Weights& weights, int64_t begin, int64_t end,
               float* memory) {
  const int64_t tiles = (p.voxels + kTile - 1) / kTile, padded = bottleneck_round_up(p.hidden);
  float* x = memory;
  float* grad_y = x + p.channels * kTile;
  float* out = grad_y + p.channels * kTile;
  float* a = out + p.channels * kTile;
  float* g = a + padded * kTile;
  float* grads = memory + bottleneck_thread_workspace(p) - bottleneck_gradients(p);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item % tiles * kTile, count = std::min(kTile, p.voxels - first);
    const int64_t place = item / tiles * p.channels * p.voxels + first;
    read_tile(static_cast<const T*>(p.x) + place, p.channels, p.voxels, count, x);
    product(weights.down, p.hidden, p.channels, x, p.down_bias, nullptr, true, a);
    if (p.grad_y == nullptr) {
      activate(p.activation, p.hidden * kTile, a, nullptr);
      product(weights.up, p.channels, p.hidden, a, p.up_bias, x, false, out);
    } else {
      read_tile(static_cast<const T*>(p.grad_y) + place, p.channels, p.voxels, count, grad_y);
      product(weights.up_transposed, p.hidden, p.channels, grad_y, nullptr, nullptr, true, g);
      activate(p.activation, p.hidden * kTile, a, g);
      product(weights.down_transposed, p.channels, p.hidden, g, nullptr, grad_y, false, out);
      float* grad_up = grads + p.hidden * (p.channels + 1);
      outer_product(g, p.hidden, x, p.channels, grads, grads + p.hidden * p.channels);
      outer_product(grad_y, p.channels, a, p.hidden, grad_up, grad_up + p.hidden * p.channels);
    }
    write_tile(out, p.channels, p.voxels, count, static_cast<T*>(p.out) + place);
  }
}

}  // namespace

void bottleneck(const BottleneckParams& p, int threads) {
  const int64_t c = p.channels, h = p.hidden;
  const int64_t by_hidden = bottleneck_round_up(h) * c, by_channel = bottleneck_round_up(c) * h;
  float* packed = p.workspace;
  const Weights weights{packed, packed + by_hidden, packed + by_hidden + by_channel,
                        packed + 2 * by_hidden + by_channel};
  pack(p.down, h, c, c, 1, packed);
  pack(p.up, c, h, h, 1, packed + by_hidden);
  pack(p.up, h, c, 1, h, packed + by_hidden + by_channel);
  pack(p.down, c, h, 1, c, packed + 2 * by_hidden + by_channel);
  const int64_t items = p.batch * ((p.voxels + kTile - 1) / kTile);
  const int64_t parts = std::min<int64_t>(threads, items);
  const int64_t step = bottleneck_thread_workspace(p), count = bottleneck_gradients(p);
  float* first = packed + bottleneck_weights(p);
  parallel_for(parts, 1, static_cast<int>(parts), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* memory = first + part * step;
      std::fill(memory + step - count, memory + step, 0.0f);
      const int64_t from = items * part / parts, to = items * (part + 1) / parts;
      if (p.dtype == DType::kFloat32) {
        run_tiles<float>(p, weights, from, to, memory);
      } else {
        run_tiles<BFloat16>(p, weights, from, to, memory);
      }
    }
  });
  if (p.grad_y == nullptr) return;
  for (int64_t i = 0; i < count; ++i) {
    float total = 0.0f;
    for (int64_t part = 0; part < parts; ++part) total += first[(part + 1) * step - count + i];
    p.grads[i] = total;
  }
}

}  // namespace PF_ISA
}  // namespace petite_fast
