// The two products behind common/low_rank.h, on flat float arrays whose length is a whole number of
// cache lines: `project` sums over channels and taps, `correlate` over positions.
//
// Everything has internal linkage: the file is compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

using Floats = Vector<float>;
constexpr int kLanes = VectorOf<float>::kLanes;
constexpr int kSums = kRegisters * 3 / 4;  // vectors of sums in registers
constexpr int kMaxRows = kRegisters / 4;   // of a low-rank operand, at a time
constexpr int kMaxVectors = 6;

// A load for several products: GCC would repeat it in each, and loads are what is scarce.
inline Floats load_once(const float* source) {
  Floats value = load_vector<float>(source);
#if defined(__AVX512F__)
  __asm__("" : "+v"(value));
#elif defined(__SSE2__)
  __asm__("" : "+x"(value));
#endif
  return value;
}

// Channels of planes; plane i of a channel and its taps begin at offsets[i * taps + tap].
struct TapPlanes {
  const float* data;
  int64_t channels;
  int64_t channel_stride;
  const int64_t* offsets;
  int64_t planes;
  int64_t taps;
};

// Rows of [planes, plane] floats.
template <typename T>
struct LowRows {
  T* data;
  int64_t rows;
  int64_t row_stride;
  int64_t plane;
};

// Block `i` of `count` things cut into `blocks` almost equal ones.
struct Block {
  int64_t begin;
  int64_t size;
  Block(int64_t count, int64_t blocks, int64_t i)
      : begin(count * i / blocks), size(count * (i + 1) / blocks - count * i / blocks) {}
};

struct Factors {
  const float* a;  // [channels, taps, rows]
  bool add;        // to what is there
};

template <int kRows, int kVectors>
void project_block(const TapPlanes& x, const int64_t* offsets, int64_t position, Factors factors,
                   int64_t row, const LowRows<float>& rows, int64_t first) {
  float* out = rows.data + row * rows.row_stride + first + position;
  const float* a = factors.a + row;
  Floats sum[kRows][kVectors] = {};
  const float* channel = x.data + position;
  for (int64_t c = 0; c < x.channels; ++c, channel += x.channel_stride) {
    for (int64_t tap = 0; tap < x.taps; ++tap, a += rows.rows) {
      const float* source = channel + offsets[tap];
      Floats value[kVectors];
      for (int v = 0; v < kVectors; ++v) value[v] = load_vector<float>(source + v * kLanes);
      for (int q = 0; q < kRows; ++q) {
        const Floats factor = Floats{} + a[q];
        for (int v = 0; v < kVectors; ++v) sum[q][v] += factor * value[v];
      }
    }
  }
  for (int q = 0; q < kRows; ++q) {
    for (int v = 0; v < kVectors; ++v) {
      float* target = out + q * rows.row_stride + v * kLanes;
      const Floats before = factors.add ? load_vector<float>(target) : Floats{};
      store_vector<float>(target, before + sum[q][v]);
    }
  }
}

template <int kRows>
constexpr int vectors_of() {
  return kSums / kRows < kMaxVectors ? kSums / kRows : kMaxVectors;
}

template <int kRows, int kVectors = vectors_of<kRows>()>
void project_vectors(int64_t vectors, const TapPlanes& x, const int64_t* offsets, int64_t position,
                     const Factors& factors, int64_t row, const LowRows<float>& out,
                     int64_t first) {
  if constexpr (kVectors > 0) {
    if (vectors == kVectors) {
      return project_block<kRows, kVectors>(x, offsets, position, factors, row, out, first);
    }
    project_vectors<kRows, kVectors - 1>(vectors, x, offsets, position, factors, row, out, first);
  }
}

// The rows of `block`, in one plane.
template <int kRows = kMaxRows>
void project_rows(const Block& block, const TapPlanes& x, int64_t plane, int64_t vectors,
                  const Factors& factors, const LowRows<float>& out) {
  if constexpr (kRows > 0) {
    if (block.size != kRows) {
      return project_rows<kRows - 1>(block, x, plane, vectors, factors, out);
    }
    const int64_t parts = (vectors + vectors_of<kRows>() - 1) / vectors_of<kRows>();
    for (int64_t i = 0; i < parts; ++i) {
      const Block part(vectors, parts, i);
      project_vectors<kRows>(part.size, x, x.offsets + plane * x.taps, part.begin * kLanes, factors,
                             block.begin, out, plane * out.plane);
    }
  }
}

// out[q, v] = sum_{c, tap} a[c, tap, q] x[c, v + offset of the tap], the first `count` positions of
// each plane rounded up to vectors. Some channels at a time: long sums lose digits.
static void project(const TapPlanes& x, const Factors& factors, const LowRows<float>& out,
                    int64_t count) {
  constexpr int64_t kTerms = 1024;
  const int64_t vectors = (count + kLanes - 1) / kLanes;
  const int64_t blocks = (out.rows + kMaxRows - 1) / kMaxRows;
  const int64_t parts = (x.channels * x.taps + kTerms - 1) / kTerms;
  for (int64_t plane = 0; plane < x.planes; ++plane) {
    for (int64_t k = 0; k < parts; ++k) {
      const Block channels(x.channels, parts, k);
      TapPlanes part = x;
      part.data += channels.begin * x.channel_stride;
      part.channels = channels.size;
      const Factors of_part{factors.a + channels.begin * x.taps * out.rows, factors.add || k > 0};
      for (int64_t i = 0; i < blocks; ++i) {
        project_rows<>(Block(out.rows, blocks, i), part, plane, vectors, of_part, out);
      }
    }
  }
}

// The pairs of neighbours in a, then those in b, added.
inline Floats add_neighbours(Floats a, Floats b) {
#if defined(__AVX512F__)
  typedef int Lanes __attribute__((vector_size(kVectorBytes)));
  constexpr Lanes kEven = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return reinterpret_cast<Floats>(_mm512_permutex2var_ps(a, reinterpret_cast<__m512i>(kEven), b)) +
         _mm512_permutex2var_ps(a, reinterpret_cast<__m512i>(kEven + 1), b);
#else
  Floats sum;
  for (int i = 0; i < kLanes / 2; ++i) {
    sum[i] = a[2 * i] + a[2 * i + 1];
    sum[kLanes / 2 + i] = b[2 * i] + b[2 * i + 1];
  }
  return sum;
#endif
}

// totals[i] = the sum of the lanes of v[i], which is overwritten.
template <int kCount>
void sum_each(Floats* v, float* totals) {
  int count = kCount;
  for (int width = kLanes; width > 1; width /= 2) {
    for (int i = 0; i < count / 2; ++i) v[i] = add_neighbours(v[2 * i], v[2 * i + 1]);
    if (count % 2 != 0) v[count / 2] = add_neighbours(v[count - 1], v[count - 1]);
    count = (count + 1) / 2;
  }
  std::memcpy(totals, v, sizeof(float) * kCount);
}

template <int kRows, int kChannels, int kTaps>
void correlate_block(const TapPlanes& x, int64_t channel, int64_t tap,
                     const LowRows<const float>& g, int64_t row, int64_t count, float* sums) {
  Floats sum[kChannels][kTaps][kRows] = {};
  for (int64_t plane = 0; plane < x.planes; ++plane) {
    const float* source[kChannels][kTaps];
    for (int c = 0; c < kChannels; ++c) {
      for (int j = 0; j < kTaps; ++j) {
        source[c][j] =
            x.data + (channel + c) * x.channel_stride + x.offsets[plane * x.taps + tap + j];
      }
    }
    const float* rows = g.data + row * g.row_stride + plane * g.plane;
    for (int64_t i = 0; i < count; i += kLanes) {
      // The smaller side stays in registers.
      if constexpr (kRows <= kChannels * kTaps) {
        Floats low[kRows];
        for (int q = 0; q < kRows; ++q) low[q] = load_once(rows + q * g.row_stride + i);
        for (int c = 0; c < kChannels; ++c) {
          for (int j = 0; j < kTaps; ++j) {
            const Floats value = load_once(source[c][j] + i);
            for (int q = 0; q < kRows; ++q) sum[c][j][q] += value * low[q];
          }
        }
      } else {
        Floats value[kChannels][kTaps];
        for (int c = 0; c < kChannels; ++c) {
          for (int j = 0; j < kTaps; ++j) value[c][j] = load_once(source[c][j] + i);
        }
        for (int q = 0; q < kRows; ++q) {
          const Floats low = load_once(rows + q * g.row_stride + i);
          for (int c = 0; c < kChannels; ++c) {
            for (int j = 0; j < kTaps; ++j) sum[c][j][q] += value[c][j] * low;
          }
        }
      }
    }
  }
  // A copy: the sums themselves must have no address, to be in registers.
  Floats copy[kChannels][kTaps][kRows];
  for (int c = 0; c < kChannels; ++c) {
    for (int j = 0; j < kTaps; ++j) {
      for (int q = 0; q < kRows; ++q) copy[c][j][q] = sum[c][j][q];
    }
  }
  float totals[kChannels][kTaps][kRows];
  sum_each<kChannels * kTaps * kRows>(&copy[0][0][0], &totals[0][0][0]);
  for (int c = 0; c < kChannels; ++c) {
    for (int j = 0; j < kTaps; ++j) {
      float* target = sums + ((channel + c) * x.taps + tap + j) * g.rows + row;
      for (int q = 0; q < kRows; ++q) target[q] += totals[c][j][q];
    }
  }
}

template <int kRows, int kTaps>
void correlate_taps(const TapPlanes& x, int64_t tap, const LowRows<const float>& g, int64_t row,
                    int64_t count, float* sums) {
  constexpr int kChannels = kSums / (kRows * kTaps);
  int64_t c = 0;
  if constexpr (kChannels > 1) {
    for (; c + kChannels <= x.channels; c += kChannels) {
      correlate_block<kRows, kChannels, kTaps>(x, c, tap, g, row, count, sums);
    }
  }
  for (; c < x.channels; ++c) correlate_block<kRows, 1, kTaps>(x, c, tap, g, row, count, sums);
}

template <int kRows = kMaxRows>
void correlate_rows(const Block& block, const TapPlanes& x, const LowRows<const float>& g,
                    int64_t count, float* sums) {
  if constexpr (kRows > 0) {
    if (block.size != kRows) return correlate_rows<kRows - 1>(block, x, g, count, sums);
    int64_t tap = 0;
    for (; tap + 3 <= x.taps; tap += 3) {
      correlate_taps<kRows, 3>(x, tap, g, block.begin, count, sums);
    }
    for (; tap < x.taps; ++tap) correlate_taps<kRows, 1>(x, tap, g, block.begin, count, sums);
  }
}

// sums[c, tap, q] += sum_v g[q, v] x[c, v + offset of the tap], the first `count` positions of each
// plane; beyond them, up to a whole vector, g is zero.
static void correlate(const TapPlanes& x, const LowRows<const float>& g, int64_t count,
                      float* sums) {
  const int64_t blocks = (g.rows + kMaxRows - 1) / kMaxRows;
  for (int64_t i = 0; i < blocks; ++i) {
    correlate_rows<>(Block(g.rows, blocks, i), x, g, count, sums);
  }
}

}  // namespace
}  // namespace PF_ISA
}  // namespace petite_fast
