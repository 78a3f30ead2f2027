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

// The product keeps kRows x kWide vectors of sums in registers, about half of them.
constexpr int kRows = kRegisters / 4;
constexpr int kWide = 2;
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
void store_tile(const Acc* __restrict acc, int64_t count, T* __restrict target) {
  for (int64_t j = 0; j < count; ++j) target[j] = round_from<T>(acc[j]);
}

template <typename Acc>
void multiply_tile(const Acc* __restrict factor, int64_t count, Acc* __restrict acc) {
  for (int64_t j = 0; j < count; ++j) acc[j] *= factor[j];
}

// Rows of a matrix in memory.
template <typename T>
struct Rows {
  T* first;
  int64_t stride;
  T* at(int64_t row, int64_t col) const { return first + row * stride + col; }
};

// s * U for one unit of rows and one block of ranks, and gamma of these rows.
template <typename Acc>
struct RowFactors {
  Acc u[kRankBlock][kRows];
  Acc gamma[kRows];
  int ranks;
};

// target = gamma * (base + sum_q u[q] V[q]) for kRowCount rows from `row` on and the columns from
// `j` on, kVectors vectors at a time; returns the first column that is left.
template <int kRowCount, int kVectors, typename Acc, typename T>
int64_t multiply_add(const RowFactors<Acc>& f, int row, Rows<const Acc> base, Rows<const T> v,
                     Rows<Acc> target, int64_t j, int64_t count) {
  constexpr int kLanes = VectorOf<Acc>::kLanes;
  for (; j + kVectors * kLanes <= count; j += kVectors * kLanes) {
    Vector<Acc> sum[kRowCount][kVectors];
    for (int i = 0; i < kRowCount; ++i) {
      for (int c = 0; c < kVectors; ++c) {
        sum[i][c] = load_vector<Acc>(base.at(row + i, j + c * kLanes));
      }
    }
    for (int q = 0; q < f.ranks; ++q) {
      for (int c = 0; c < kVectors; ++c) {
        const Vector<Acc> value = load_vector<Acc>(v.at(q, j + c * kLanes));
        for (int i = 0; i < kRowCount; ++i) sum[i][c] += f.u[q][row + i] * value;
      }
    }
    for (int i = 0; i < kRowCount; ++i) {
      for (int c = 0; c < kVectors; ++c) {
        store_vector<Acc>(target.at(row + i, j + c * kLanes), f.gamma[row + i] * sum[i][c]);
      }
    }
  }
  return j;
}

// The same for `rows` rows and all `count` columns.
template <typename Acc, typename T>
void multiply_add_unit(const RowFactors<Acc>& f, int rows, Rows<const Acc> base, Rows<const T> v,
                       Rows<Acc> target, int64_t count) {
  constexpr int kLanes = VectorOf<Acc>::kLanes;
  const auto run_from = [&](int64_t j) {
    if (rows == kRows) {
      j = multiply_add<kRows, kWide>(f, 0, base, v, target, j, count);
      return multiply_add<kRows, 1>(f, 0, base, v, target, j, count);
    }
    int64_t end = j;
    for (int i = 0; i < rows; ++i) end = multiply_add<1, 1>(f, i, base, v, target, j, count);
    return end;
  };
  const int64_t done = run_from(0);
  const int64_t left = count - done;
  if (left == 0) return;
  // A vector must not reach past its matrix. The last one overlaps the one before, whose columns
  // come out the same again unless they are updated in place; then the rest goes through copies.
  if (count >= kLanes && base.first != target.first) {
    run_from(count - kLanes);
    return;
  }
  T v_copy[kRankBlock][kLanes] = {};
  Acc copy[kRows][kLanes] = {};
  for (int q = 0; q < f.ranks; ++q) std::copy_n(v.at(q, done), left, v_copy[q]);
  for (int i = 0; i < rows; ++i) std::copy_n(base.at(i, done), left, copy[i]);
  multiply_add<kRows, 1>(f, 0, Rows<const Acc>{copy[0], kLanes}, Rows<const T>{v_copy[0], kLanes},
                         Rows<Acc>{copy[0], kLanes}, 0, kLanes);
  for (int i = 0; i < rows; ++i) std::copy_n(copy[i], left, target.at(i, done));
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

template <typename Acc>
constexpr DType dtype_of_accumulator() {
  return std::is_same_v<Acc, double> ? DType::kFloat64 : DType::kFloat32;
}

// One unit with V of type T. W is read and W_eff written in place where they have the accumulation
// type, else through `acc`, which stays in the first-level cache.
template <typename Acc, typename T>
void run_unit(const EffectiveWeightParams& p, int64_t first_row, int64_t first_col) {
  constexpr DType kAcc = dtype_of_accumulator<Acc>();
  const int rows = static_cast<int>(std::min<int64_t>(kRows, p.weight.size[0] - first_row));
  const int64_t count = std::min(kTile, p.weight.size[1] - first_col);
  const bool gamma_varies = p.gamma.data != nullptr && p.geometry.transposed;
  const int64_t weight_offset = offset_of(p.weight, first_row, first_col);
  const int64_t out_offset = offset_of(p.out, first_row, first_col);
  alignas(64) Acc acc[kRows][kTile];
  const Rows<Acc> buffer{acc[0], kTile};

  Rows<const Acc> base{acc[0], kTile};
  if (p.weight.dtype == kAcc) {
    base = {pointer_at<const Acc>(p.weight, weight_offset), p.weight.stride[0]};
  } else {
    with_type(p.weight.dtype, [&](auto tag) {
      using W = typename decltype(tag)::type;
      const Rows<const W> source{pointer_at<const W>(p.weight, weight_offset), p.weight.stride[0]};
      for (int i = 0; i < rows; ++i) load_tile<Acc, W>(source.at(i, 0), count, acc[i]);
    });
  }
  const bool in_place = p.out.dtype == kAcc && !gamma_varies;
  const Rows<Acc> target =
      in_place ? Rows<Acc>{pointer_at<Acc>(p.out, out_offset), p.out.stride[0]} : buffer;

  RowFactors<Acc> f;
  std::fill_n(f.u[0], kRankBlock * kRows, Acc(0));
  std::fill_n(f.gamma, kRows, Acc(1));
  const int64_t rank = rank_of(p);
  int64_t q = 0;
  do {
    f.ranks = static_cast<int>(std::min<int64_t>(kRankBlock, rank - q));
    for (int k = 0; k < f.ranks; ++k) {
      for (int i = 0; i < rows; ++i) {
        const int64_t offset = offset_of(p.row_factor, q + k, first_row + i);
        f.u[k][i] = static_cast<Acc>(p.scale) * load_value<Acc>(p.row_factor, offset);
      }
    }
    const bool last = q + f.ranks == rank;
    if (last && p.gamma.data != nullptr && !gamma_varies) {
      for (int i = 0; i < rows; ++i) f.gamma[i] = load_value<Acc>(p.gamma, first_row + i);
    }
    const int64_t v_offset = offset_of(p.col_factor, q, first_col);
    const Rows<const T> v{pointer_at<const T>(p.col_factor, v_offset), p.col_factor.stride[0]};
    multiply_add_unit(f, rows, base, v, target, count);
    base = {target.first, target.stride};
    q += f.ranks;
  } while (q < rank);

  if (in_place) return;
  if (gamma_varies) {
    alignas(64) Acc factor[kTile];
    for (int i = 0; i < rows; ++i) {
      gather_gamma(p, first_row + i, first_col, count, factor);
      multiply_tile(factor, count, acc[i]);
    }
  }
  with_type(p.out.dtype, [&](auto tag) {
    using Out = typename decltype(tag)::type;
    const Rows<Out> out{pointer_at<Out>(p.out, out_offset), p.out.stride[0]};
    for (int i = 0; i < rows; ++i) store_tile<Acc, Out>(acc[i], count, out.at(i, 0));
  });
}

template <typename Acc>
void run_units(const EffectiveWeightParams& p, int64_t begin, int64_t end) {
  const int64_t tiles = ceil_divide(p.weight.size[1], kTile);
  with_type(p.col_factor.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t i = begin; i < end; ++i) {
      run_unit<Acc, T>(p, i / tiles * kRows, i % tiles * kTile);
    }
  });
}

}  // namespace

void effective_weight(const EffectiveWeightParams& p, int threads) {
  const int64_t units = ceil_divide(p.weight.size[0], kRows) * ceil_divide(p.weight.size[1], kTile);
  const int64_t unit = kRows * std::min(kTile, p.weight.size[1]);
  const auto body = [&p](int64_t begin, int64_t end) {
    if (accumulates_in_double(p)) {
      run_units<double>(p, begin, end);
    } else {
      run_units<float>(p, begin, end);
    }
  };
  parallel_for(units, kGrain / unit, threads, body);
}

}  // namespace PF_ISA
}  // namespace petite_fast
