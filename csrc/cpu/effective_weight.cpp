// CPU form of common/effective_weight.h; compiled once per instruction set, each into its own
// namespace PF_ISA.
//
// Meant to be bound by reading W and writing W_eff. Work is cut into units of kRows rows by kTile
// columns, small enough that the unit's accumulators and its part of V stay in the first-level
// cache; the low-rank sum is a small matrix product on registers.
#include <algorithm>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

constexpr int64_t kRows = 4;
constexpr int64_t kTile = 512;
constexpr int kRankBlock = 32;
constexpr int64_t kGrain = 32768;  // elements worth waking a thread for

template <typename T>
struct TypeTag {
  using type = T;
};

template <typename Function>
void with_type(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(TypeTag<float>{});
    case DType::kFloat64:
      return function(TypeTag<double>{});
    case DType::kBFloat16:
      return function(TypeTag<BFloat16>{});
    case DType::kFloat16:
      return function(TypeTag<Float16>{});
  }
}

template <typename Acc, typename T>
void load_tile(const T* __restrict source, int64_t count, Acc* __restrict acc) {
  for (int64_t j = 0; j < count; ++j) acc[j] = widen<Acc>(source[j]);
}

template <typename Acc, typename T>
void store_tile(const Acc* __restrict acc, Acc gamma, int64_t count, T* __restrict target) {
  for (int64_t j = 0; j < count; ++j) target[j] = round_from<T>(gamma * acc[j]);
}

template <typename Acc>
void multiply_tile(const Acc* __restrict factor, int64_t count, Acc* __restrict acc) {
  for (int64_t j = 0; j < count; ++j) acc[j] *= factor[j];
}

// acc[i, j] += sum_q u[q, i] V[q, j] for kRows rows and the columns from `j` on, kVectors vectors
// at a time; returns the first column that is left.
template <int kVectors, typename Acc, typename T>
int64_t add_ranks(const Acc (*u)[kRows], const T* v, int64_t rank_stride, int ranks, int64_t j,
                  int64_t count, Acc (*acc)[kTile], const char* nw, const char* no, int64_t rb) {
  constexpr int kLanes = VectorOf<Acc>::kLanes;
  for (; j + kVectors * kLanes <= count; j += kVectors * kLanes) {
    Vector<Acc> sum[kRows][kVectors];
    for (int i = 0; i < kRows; ++i) {
      for (int c = 0; c < kVectors; ++c) {
        __builtin_prefetch(nw + i * rb + (j + c * kLanes) * 4, 0);
        __builtin_prefetch(no + i * rb + (j + c * kLanes) * 4, 1);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int c = 0; c < kVectors; ++c) sum[i][c] = load_vector<Acc>(acc[i] + j + c * kLanes);
    }
    for (int q = 0; q < ranks; ++q) {
      for (int c = 0; c < kVectors; ++c) {
        const Vector<Acc> value = load_vector<Acc>(v + q * rank_stride + j + c * kLanes);
        for (int i = 0; i < kRows; ++i) sum[i][c] += u[q][i] * value;
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int c = 0; c < kVectors; ++c) store_vector<Acc>(acc[i] + j + c * kLanes, sum[i][c]);
    }
  }
  return j;
}

// Adds s * sum_q U[q, first_row + i] V[q, first_col + j] to acc[i, j].
template <typename Acc, typename T>
void add_low_rank_unit(const EffectiveWeightParams& p, int64_t first_row, int64_t rows,
                       int64_t first_col, int64_t count, Acc (*acc)[kTile]) {
  constexpr int kWide = kRegisters / 8;  // kRows * kWide accumulators fill half the registers
  const int64_t rank_stride = p.col_factor.stride[0];
  for (int64_t first_q = 0; first_q < rank_of(p); first_q += kRankBlock) {
    const int ranks = static_cast<int>(std::min<int64_t>(kRankBlock, rank_of(p) - first_q));
    Acc u[kRankBlock][kRows];
    for (int q = 0; q < ranks; ++q) {
      for (int64_t i = 0; i < kRows; ++i) {
        const int64_t row = first_row + std::min(i, rows - 1);
        u[q][i] = static_cast<Acc>(p.scale) *
                  load_value<Acc>(p.row_factor, offset_of(p.row_factor, first_q + q, row));
      }
    }
    const T* v = pointer_at<const T>(p.col_factor, offset_of(p.col_factor, first_q, first_col));
    const char* nw = (const char*)p.weight.data + 4*offset_of(p.weight, first_row, first_col+512);
    const char* no = (const char*)p.out.data + 4*offset_of(p.out, first_row, first_col+512);
    int64_t rb = p.weight.stride[0]*4;
    int64_t j = add_ranks<kWide>(u, v, rank_stride, ranks, 0, count, acc, nw,no,rb);
    j = add_ranks<1>(u, v, rank_stride, ranks, j, count, acc, nw,no,rb);
    for (; j < count; ++j) {
      for (int q = 0; q < ranks; ++q) {
        const Acc value = widen<Acc>(v[q * rank_stride + j]);
        for (int i = 0; i < kRows; ++i) acc[i][j] += u[q][i] * value;
      }
    }
  }
}

// gamma of the columns [first_col, first_col + count) of a row, where it varies along them.
template <typename Acc>
void gather_gamma(const EffectiveWeightParams& p, int64_t row, int64_t first_col, int64_t count,
                  Acc* factor) {
  const int64_t volume = kernel_volume(p.geometry);
  int64_t position = first_col % volume;
  int64_t channel = output_channel(p.geometry, row, first_col);
  Acc value = load_value<Acc>(p.gamma, channel);
  for (int64_t j = 0; j < count; ++j, ++position) {
    if (position == volume) {
      position = 0;
      value = load_value<Acc>(p.gamma, ++channel);
    }
    factor[j] = value;
  }
}

// out = gamma * acc, rounded once.
template <typename Acc>
void store_row(const EffectiveWeightParams& p, int64_t row, int64_t first_col, int64_t count,
               Acc* acc) {
  Acc gamma = Acc(1);
  if (p.gamma.data != nullptr && p.geometry.transposed) {
    alignas(64) Acc factor[kTile];
    gather_gamma(p, row, first_col, count, factor);
    multiply_tile(factor, count, acc);
  } else if (p.gamma.data != nullptr) {
    gamma = load_value<Acc>(p.gamma, row);
  }
  with_type(p.out.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    store_tile<Acc, T>(acc, gamma, count, pointer_at<T>(p.out, offset_of(p.out, row, first_col)));
  });
}

template <typename Acc>
void run_unit(const EffectiveWeightParams& p, int64_t first_row, int64_t first_col) {
  const int64_t rows = std::min(kRows, p.weight.size[0] - first_row);
  const int64_t count = std::min(kTile, p.weight.size[1] - first_col);
  alignas(64) Acc acc[kRows][kTile];
  with_type(p.weight.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t offset = offset_of(p.weight, first_row + i, first_col);
      load_tile<Acc, T>(pointer_at<const T>(p.weight, offset), count, acc[i]);
    }
  });
  if (rank_of(p) > 0) {
    // The product always covers kRows rows; rows that do not exist are not stored.
    for (int64_t i = rows; i < kRows; ++i) std::fill_n(acc[i], count, Acc(0));
    with_type(p.col_factor.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      add_low_rank_unit<Acc, T>(p, first_row, rows, first_col, count, acc);
    });
  }
  for (int64_t i = 0; i < rows; ++i) store_row(p, first_row + i, first_col, count, acc[i]);
}

}  // namespace

void effective_weight(const EffectiveWeightParams& p, int threads) {
  const int64_t row_blocks = ceil_divide(p.weight.size[0], kRows);
  const int64_t tiles = ceil_divide(p.weight.size[1], kTile);
  const int64_t unit = kRows * std::min(kTile, p.weight.size[1]);
  const bool in_double = accumulates_in_double(p);
  const auto body = [&p, tiles, in_double](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first_row = i / tiles * kRows;
      const int64_t first_col = i % tiles * kTile;
      if (in_double) {
        run_unit<double>(p, first_row, first_col);
      } else {
        run_unit<float>(p, first_row, first_col);
      }
    }
  };
  parallel_for(row_blocks * tiles, unit > 0 ? kGrain / unit : 1, threads, body);
}

}  // namespace PF_ISA
}  // namespace petite_fast
