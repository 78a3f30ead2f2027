// CPU form of common/norm_act.h where channels are last: a layer norm (statistics per row), and the
// instance and fixed-statistics norms of channels-last volumes (statistics per column). Compiled
// once per instruction set, each into its own namespace PF_ISA.
#include "cpu/norm_act_last.h"

#include <algorithm>

#include "cpu/ops.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

void pack_rows(const float* v, int64_t rows, int64_t channels, uint8_t* bits) {
  if (channels % 8 == 0) return pack_row(v, rows * channels, bits);
  const int64_t bytes = norm_divide_up(channels, 8);
  for (int64_t r = 0; r < rows; ++r) pack_row(v + r * channels, channels, bits + r * bytes);
}

// The input of the norm: x, or act(x) in `buffer`.
const float* norm_input(const NormActForward& p, const Coefficients& c, int64_t row, int64_t rows,
                        uint8_t* signs, float* buffer) {
  const NormActShape& s = p.shape;
  const int64_t count = rows * s.channels;
  const float* x = stage(p.x, s.dtype, row * s.channels, count, buffer);
  if (!s.act_first) return x;
  if (signs != nullptr) pack_rows(x, rows, s.channels, signs);
  activate(x, count, PerElement(c.slope), buffer);
  return buffer;
}

uint8_t* signs_of_row(const NormActForward& p, int64_t row) {
  return p.signs == nullptr ? nullptr : p.signs + row * sign_row_bytes(p.shape);
}

template <typename Statistic>
void write_rows(const NormActForward& p, const Coefficients& c, int64_t row, int64_t rows,
                const float* x, Statistic mean, Statistic rstd, Statistic shift, PerElement bias,
                Tiles<2>& b) {
  const NormActShape& s = p.shape;
  const int64_t count = rows * s.channels, at = row * s.channels;
  float *buffer = b[0], *residual_buffer = b[1];
  if (p.xhat != nullptr && p.kept.count == 0) {
    float* xhat = target(p.xhat, s.dtype, at, buffer);
    for (int64_t i = 0; i < count; ++i) xhat[i] = (x[i] - mean[i]) * rstd[i] + shift[i];
    commit(xhat, p.xhat, s.dtype, at, count);
  } else if (p.xhat != nullptr) {
    float* xhat = buffer;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < p.kept.count; ++j) {
        const int64_t i = r * s.channels + p.kept.index[j];
        *xhat++ = (x[i] - mean[i]) * rstd[i] + shift[i];
      }
    }
    commit(buffer, p.xhat, s.dtype, row * p.kept.count, rows * p.kept.count);
  }
  const float* residual =
      p.residual == nullptr ? nullptr : stage(p.residual, s.dtype, at, count, residual_buffer);
  float* y = target(p.y, s.dtype, at, buffer);
  normalise(x, residual, count, mean, rstd, PerElement(c.weight), bias, y);
  if (!s.act_first && !is_identity(p.affine)) {
    if (p.signs != nullptr) pack_rows(y, rows, s.channels, signs_of_row(p, row));
    activate(y, count, PerElement(c.slope), y);
  }
  commit(y, p.y, s.dtype, at, count);
}

void layer_unit(const NormActForward& p, const Coefficients& c, int64_t index) {
  const NormActShape& s = p.shape;
  const UnitRows unit(s, index);
  Tiles<1> x_tile(s);
  Tiles<2> tiles(s);
  for (int64_t row = unit.begin; row < unit.end; ++row) {
    const float* x = norm_input(p, c, row, 1, signs_of_row(p, row), x_tile[0]);
    const Moments moments = tile_moments(x, s.channels);
    const float mean = static_cast<float>(moments.mean);
    const float var = static_cast<float>(moments.squares / moments.count);
    p.mean[row] = mean;
    p.var[row] = var;
    write_rows(p, c, row, 1, x, Uniform{mean}, Uniform{reciprocal_std(var, s.eps)}, Uniform{0},
               c.bias, tiles);
  }
}

// Mean and squares of every column of a unit, tile by tile, into its part of the workspace.
void column_moments(const NormActForward& p, const Coefficients& c, int64_t index) {
  const NormActShape& s = p.shape;
  const UnitRows unit(s, index);
  double* __restrict mean = p.workspace + index * 2 * s.channels;
  double* __restrict squares = mean + s.channels;
  std::fill_n(mean, 2 * s.channels, 0.0);
  alignas(64) float buffer[kRoom];
  alignas(64) float centre[kRoom], sums[kRoom], differences[kRoom];
  const int64_t folded = folded_rows(s) * s.channels;
  double seen = 0;
  for (int64_t row = unit.begin; row < unit.end; row += tile_rows(s)) {
    const int64_t rows = std::min(tile_rows(s), unit.end - row);
    const float* x = norm_input(p, c, row, rows, nullptr, buffer);
    std::fill_n(centre, folded, 0.0f);
    std::fill_n(sums, folded, 0.0f);
    std::fill_n(differences, folded, 0.0f);
    const int64_t elements = rows * s.channels;
    for (int64_t at = 0; at < elements; at += folded) {
      const int64_t count = std::min(folded, elements - at);
      for (int64_t i = 0; i < count; ++i) centre[i] += x[at + i];
    }
    fold(s, centre);
    for (int64_t i = 0; i < s.channels; ++i) centre[i] /= static_cast<float>(rows);
    for (int64_t i = s.channels; i < folded; ++i) centre[i] = centre[i - s.channels];
    for (int64_t at = 0; at < elements; at += folded) {
      const int64_t count = std::min(folded, elements - at);
      for (int64_t i = 0; i < count; ++i) {
        const float difference = x[at + i] - centre[i];
        sums[i] += difference;
        differences[i] += difference * difference;
      }
    }
    fold(s, sums);
    fold(s, differences);
    // As tile_moments and merge, one column per lane.
    const double added = static_cast<double>(rows), total = seen + added;
    for (int64_t i = 0; i < s.channels; ++i) {
      const double sum = static_cast<double>(sums[i]);
      const double delta = static_cast<double>(centre[i]) + sum / added - mean[i];
      mean[i] += delta * (added / total);
      squares[i] += static_cast<double>(differences[i]) - sum * sum / added +
                    delta * delta * (seen * added / total);
    }
    seen = total;
  }
}

// What rounding took from the mean of a column of a sample and is given back to the bias; behind
// the moments of the units.
double* rest_of_mean(const NormActForward& p, int64_t column) {
  return p.workspace + 2 * p.shape.outer * unit_count(p.shape) * p.shape.channels + column;
}

void combine_columns(const NormActForward& p) {
  const NormActShape& s = p.shape;
  const int64_t units = unit_count(s);
  for (int64_t k = 0; k < s.outer * s.channels; ++k) {
    Moments moments{};
    for (int64_t u = 0; u < units; ++u) {
      const int64_t index = k / s.channels * units + u;
      const UnitRows unit(s, index);
      const double* mean = p.workspace + index * 2 * s.channels + k % s.channels;
      merge(moments,
            Moments{static_cast<double>(unit.end - unit.begin), mean[0], mean[s.channels]});
    }
    p.mean[k] = static_cast<float>(moments.mean);
    *rest_of_mean(p, k) = moments.mean - static_cast<double>(p.mean[k]);
    p.var[k] = static_cast<float>(moments.squares / moments.count);
  }
}

// What belongs to the columns of the sample that a thread is at.
struct ColumnStatistics {
  Coefficients coefficients;
  Tiles<4> memory;
  Repeated mean{memory[0]}, rstd{memory[1]}, shift{memory[2]}, bias{memory[3]};
  int64_t sample = -1;

  ColumnStatistics(const NormActShape& s, const NormActAffine& a, const KeptChannels& kept)
      : coefficients(s, a, kept), memory(s) {}
};

void enter_sample(const NormActForward& p, ColumnStatistics& c, int64_t sample) {
  const NormActShape& s = p.shape;
  const bool fixed = s.norm == Norm::kFixed;
  const int64_t at = fixed ? 0 : sample * s.channels;
  const auto shift = [&](int64_t i) {
    return fixed ? 0 : -static_cast<float>(*rest_of_mean(p, at + i)) * c.rstd.values[i];
  };
  c.sample = sample;
  c.mean.fill(s, [&](int64_t i) { return p.mean[at + i]; });
  c.rstd.fill(s, [&](int64_t i) { return reciprocal_std(p.var[at + i], s.eps); });
  c.shift.fill(s, shift);
  c.bias.fill(s, [&](int64_t i) {
    return c.coefficients.bias.values[i] + shift(i) * c.coefficients.weight.values[i];
  });
}

void column_unit(const NormActForward& p, ColumnStatistics& c, int64_t index) {
  const NormActShape& s = p.shape;
  const UnitRows unit(s, index);
  if (c.sample != unit.sample) enter_sample(p, c, unit.sample);
  Tiles<1> x_tile(s);
  Tiles<2> tiles(s);
  for (int64_t row = unit.begin; row < unit.end; row += tile_rows(s)) {
    const int64_t rows = std::min(tile_rows(s), unit.end - row);
    const float* x = norm_input(p, c.coefficients, row, rows, signs_of_row(p, row), x_tile[0]);
    write_rows(p, c.coefficients, row, rows, x, PerElement(c.mean), PerElement(c.rstd),
               PerElement(c.shift), c.bias, tiles);
  }
}

}  // namespace

void norm_act_last(const NormActForward& p, int threads) {
  const NormActShape& s = p.shape;
  const auto coefficients = [&p] { return Coefficients(p.shape, p.affine, p.kept); };
  if (s.norm == Norm::kLayer) {
    over_units(s, threads, coefficients,
               [&p](const Coefficients& c, int64_t unit) { layer_unit(p, c, unit); });
    return;
  }
  if (s.norm != Norm::kFixed) {
    over_units(s, threads, coefficients,
               [&p](const Coefficients& c, int64_t unit) { column_moments(p, c, unit); });
    combine_columns(p);
  }
  over_units(
      s, threads, [&p] { return ColumnStatistics(p.shape, p.affine, p.kept); },
      [&p](ColumnStatistics& c, int64_t unit) { column_unit(p, c, unit); });
}

}  // namespace PF_ISA
}  // namespace petite_fast
