// CPU form of common/effective_weight.h; compiled once per instruction set, each into its own
// namespace PF_ISA.
//
// Bound by reading W and writing W_eff. Work is cut into units of kRows rows by kTile columns: the
// tile's part of V is read from far memory once and then serves kRows rows from the first-level
// cache, and the accumulators of one row never leave it.
#include <algorithm>

#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

constexpr int64_t kRows = 8;
constexpr int64_t kTile = 1024;
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

// acc += sum over Q consecutive ranks of u[q] * V[q, :].
template <int Q, typename Acc, typename T>
void add_ranks(const Acc* u, const T* __restrict v, int64_t rank_stride, int64_t count,
               Acc* __restrict acc) {
  for (int64_t j = 0; j < count; ++j) {
    Acc sum = acc[j];
    for (int q = 0; q < Q; ++q) sum += u[q] * widen<Acc>(v[q * rank_stride + j]);
    acc[j] = sum;
  }
}

// Adds s * sum_q U[q, row] V[q, first_col...] to the accumulators of one row.
template <typename Acc, typename T>
void add_low_rank_row(const EffectiveWeightParams& p, int64_t row, int64_t first_col,
                      int64_t count, Acc* acc) {
  constexpr int kStep = 8;
  const int64_t rank = rank_of(p);
  const int64_t rank_stride = p.col_factor.stride[0];
  for (int64_t q = 0; q < rank; q += kStep) {
    const int64_t ranks = std::min<int64_t>(kStep, rank - q);
    Acc u[kStep];
    for (int64_t i = 0; i < ranks; ++i) {
      u[i] = static_cast<Acc>(p.scale) *
             load_value<Acc>(p.row_factor, offset_of(p.row_factor, q + i, row));
    }
    const T* v = pointer_at<const T>(p.col_factor, offset_of(p.col_factor, q, first_col));
    int64_t done = 0;
    for (; done + 8 <= ranks; done += 8) {
      add_ranks<8>(u + done, v + done * rank_stride, rank_stride, count, acc);
    }
    for (; done + 4 <= ranks; done += 4) {
      add_ranks<4>(u + done, v + done * rank_stride, rank_stride, count, acc);
    }
    for (; done + 2 <= ranks; done += 2) {
      add_ranks<2>(u + done, v + done * rank_stride, rank_stride, count, acc);
    }
    if (done < ranks) add_ranks<1>(u + done, v + done * rank_stride, rank_stride, count, acc);
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

template <typename Acc>
void run_unit(const EffectiveWeightParams& p, int64_t first_row, int64_t first_col) {
  const int64_t rows = std::min(kRows, p.weight.size[0] - first_row);
  const int64_t count = std::min(kTile, p.weight.size[1] - first_col);
  const bool has_gamma = p.gamma.data != nullptr;
  const bool gamma_varies = has_gamma && p.geometry.transposed;
  alignas(64) Acc acc[kTile];
  alignas(64) Acc factor[kTile];
  int64_t gathered_channel = -1;
  for (int64_t row = first_row; row < first_row + rows; ++row) {
    with_type(p.weight.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      load_tile<Acc, T>(pointer_at<const T>(p.weight, offset_of(p.weight, row, first_col)), count,
                        acc);
    });
    if (rank_of(p) > 0) {
      with_type(p.col_factor.dtype, [&](auto tag) {
        add_low_rank_row<Acc, typename decltype(tag)::type>(p, row, first_col, count, acc);
      });
    }
    const int64_t channel = output_channel(p.geometry, row, first_col);
    if (gamma_varies) {
      if (channel != gathered_channel) gather_gamma(p, row, first_col, count, factor);
      gathered_channel = channel;
      multiply_tile(factor, count, acc);
    }
    const bool row_gamma = has_gamma && !gamma_varies;
    const Acc gamma = row_gamma ? load_value<Acc>(p.gamma, channel) : Acc(1);
    with_type(p.out.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      store_tile<Acc, T>(acc, gamma, count,
                         pointer_at<T>(p.out, offset_of(p.out, row, first_col)));
    });
  }
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
