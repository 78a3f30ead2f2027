// W_eff = gamma * (W + s * B.A), the weight of a frozen convolution with its adapters folded in.
//
// Both convolution forms are one matrix problem,
//     out[row, col] = gamma[channel(row, col)] * (W[row, col] + s * sum_q U[q, row] V[q, col]),
// with (U, V) = (B, A) for a convolution (rows O, columns C/g * k) and (A, B) for a transposed one
// (rows C, columns O/g * k). Accumulation is in float, in double when any operand is double; the
// result is rounded once.
#pragma once

#include <cstdint>

#include "common/conv_geometry.h"
#include "common/dtype.h"
#include "common/macros.h"
#include "common/tensor_view.h"

namespace petite_fast {

struct EffectiveWeightParams {
  ConvGeometry geometry;
  TensorView weight;      // (rows, cols), contiguous
  TensorView row_factor;  // U (rank, rows); null data: no low-rank term
  TensorView col_factor;  // V (rank, cols), contiguous columns
  TensorView gamma;       // (out_channels); null data: ones
  TensorView out;         // (rows, cols), contiguous
  double scale;
};

PF_HOST_DEVICE int64_t rank_of(const EffectiveWeightParams& p) {
  return p.row_factor.data == nullptr ? 0 : p.row_factor.size[0];
}

PF_HOST_DEVICE bool accumulates_in_double(const EffectiveWeightParams& p) {
  const bool factors = p.row_factor.data != nullptr && (p.row_factor.dtype == DType::kFloat64 ||
                                                        p.col_factor.dtype == DType::kFloat64);
  const bool gamma = p.gamma.data != nullptr && p.gamma.dtype == DType::kFloat64;
  return p.weight.dtype == DType::kFloat64 || p.out.dtype == DType::kFloat64 || factors || gamma;
}

// One element of a small operand (a factor or gamma) as the accumulation type.
template <typename Acc>
PF_HOST_DEVICE Acc load_value(const TensorView& view, int64_t offset) {
  switch (view.dtype) {
    case DType::kFloat32:
      return widen<Acc>(*pointer_at<const float>(view, offset));
    case DType::kFloat64:
      return widen<Acc>(*pointer_at<const double>(view, offset));
    case DType::kBFloat16:
      return widen<Acc>(*pointer_at<const BFloat16>(view, offset));
    case DType::kFloat16:
      return widen<Acc>(*pointer_at<const Float16>(view, offset));
  }
  return Acc(0);
}

// The rest is one thread block of the CUDA kernel, phase by phase, so that the host can run it:
// a block owns kTileRows rows and one column per thread; U is staged for the block in chunks of
// kRankChunk, V is read once per column and used for all its rows.
constexpr int kTileRows = 8;
constexpr int kRankChunk = 32;

struct EffectiveWeightTile {
  int64_t first_row;
  int64_t first_col;
};

PF_HOST_DEVICE int64_t ceil_divide(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

PF_HOST_DEVICE int64_t tile_count(const EffectiveWeightParams& p, int threads) {
  return ceil_divide(p.weight.size[0], kTileRows) * ceil_divide(p.weight.size[1], threads);
}

// Columns vary fastest, so neighbouring blocks share their rows of U and stream through W.
PF_HOST_DEVICE EffectiveWeightTile tile_of(const EffectiveWeightParams& p, int64_t block,
                                           int threads) {
  const int64_t per_row = ceil_divide(p.weight.size[1], threads);
  return EffectiveWeightTile{block / per_row * kTileRows, block % per_row * threads};
}

template <typename Acc>
PF_HOST_DEVICE void stage_row_factor(const EffectiveWeightParams& p, int64_t first_row,
                                     int64_t first_q, int thread, int threads, Acc* staged) {
  for (int i = thread; i < kRankChunk * kTileRows; i += threads) {
    const int64_t q = first_q + i / kTileRows;
    const int64_t row = first_row + i % kTileRows;
    const bool inside = q < rank_of(p) && row < p.weight.size[0];
    staged[i] = inside ? static_cast<Acc>(p.scale) *
                             load_value<Acc>(p.row_factor, offset_of(p.row_factor, q, row))
                       : Acc(0);
  }
}

// The element type is chosen once per column, not per element, so that the loads of a column are
// in flight together.
template <typename Acc, typename T>
PF_HOST_DEVICE void load_typed_column(const EffectiveWeightParams& p, int64_t first_row,
                                      int64_t col, Acc* column) {
  for (int i = 0; i < kTileRows; ++i) {
    const int64_t row = first_row + i;
    const bool inside = row < p.weight.size[0];
    column[i] =
        inside ? widen<Acc>(*pointer_at<const T>(p.weight, offset_of(p.weight, row, col))) : Acc(0);
  }
}

template <typename Acc>
PF_HOST_DEVICE void load_weight_column(const EffectiveWeightParams& p, int64_t first_row,
                                       int64_t col, Acc* column) {
  switch (p.weight.dtype) {
    case DType::kFloat32:
      return load_typed_column<Acc, float>(p, first_row, col, column);
    case DType::kFloat64:
      return load_typed_column<Acc, double>(p, first_row, col, column);
    case DType::kBFloat16:
      return load_typed_column<Acc, BFloat16>(p, first_row, col, column);
    case DType::kFloat16:
      return load_typed_column<Acc, Float16>(p, first_row, col, column);
  }
}

template <typename Acc>
PF_HOST_DEVICE void add_low_rank(const EffectiveWeightParams& p, int64_t first_q, int64_t col,
                                 const Acc* staged, Acc* column) {
  const int64_t left = rank_of(p) - first_q;
  const int count = left < kRankChunk ? static_cast<int>(left) : kRankChunk;
  for (int q = 0; q < count; ++q) {
    const Acc v = load_value<Acc>(p.col_factor, offset_of(p.col_factor, first_q + q, col));
    for (int i = 0; i < kTileRows; ++i) column[i] += staged[q * kTileRows + i] * v;
  }
}

template <typename Acc, typename T>
PF_HOST_DEVICE void store_typed_column(const EffectiveWeightParams& p, int64_t first_row,
                                       int64_t col, const Acc* column) {
  for (int i = 0; i < kTileRows; ++i) {
    const int64_t row = first_row + i;
    if (row >= p.weight.size[0]) return;
    const Acc gamma = p.gamma.data == nullptr
                          ? Acc(1)
                          : load_value<Acc>(p.gamma, output_channel(p.geometry, row, col));
    *pointer_at<T>(p.out, offset_of(p.out, row, col)) = round_from<T>(gamma * column[i]);
  }
}

template <typename Acc>
PF_HOST_DEVICE void store_weight_column(const EffectiveWeightParams& p, int64_t first_row,
                                        int64_t col, const Acc* column) {
  switch (p.out.dtype) {
    case DType::kFloat32:
      return store_typed_column<Acc, float>(p, first_row, col, column);
    case DType::kFloat64:
      return store_typed_column<Acc, double>(p, first_row, col, column);
    case DType::kBFloat16:
      return store_typed_column<Acc, BFloat16>(p, first_row, col, column);
    case DType::kFloat16:
      return store_typed_column<Acc, Float16>(p, first_row, col, column);
  }
}

}  // namespace petite_fast
