// The backward of norm_act where channels are last; see norm_act_last.cpp.
#include <algorithm>

#include "cpu/norm_act_last.h"
#include "cpu/ops.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

using Buffers = Tiles<5>;

void apply_sign_rows(const uint8_t* bits, int64_t rows, int64_t channels, PerElement slope,
                     float* v) {
  if (channels % 8 == 0) return apply_signs(bits, rows * channels, slope, v);
  const int64_t bytes = norm_divide_up(channels, 8);
  for (int64_t r = 0; r < rows; ++r) {
    apply_signs(bits + r * bytes, channels, slope, v + r * channels);
  }
}

const uint8_t* signs_of_row(const NormActBackward& p, int64_t row) {
  return p.signs == nullptr ? nullptr : p.signs + row * sign_row_bytes(p.shape);
}

// The gradient of the activation's input (of the norm's output, with the activation first) and
// xhat, or null where nothing needs it, of a few rows.
struct Recovered {
  const float* grad_n;
  const float* xhat;
};

Recovered recover_rows(const NormActBackward& p, const Coefficients& c, int64_t row, int64_t rows,
                       Buffers& b) {
  const NormActShape& s = p.shape;
  const int64_t count = rows * s.channels, at = row * s.channels;
  // With the activation first, y is n and grad_y is grad_n.
  const bool bends = !s.act_first && !is_identity(p.affine);
  const float* grad_y = stage(p.grad_y, s.dtype, at, count, b[0]);
  if (p.source == NormSource::kY) {
    const float* y = stage(p.y, s.dtype, at, count, b[1]);
    const float* residual =
        p.residual == nullptr ? nullptr : stage(p.residual, s.dtype, at, count, b[2]);
    const PerElement inverse_weight = c.inverse_weight, bias = c.bias;
    if (bends) {
      invert_activated(grad_y, y, residual, count, PerElement(c.slope), PerElement(c.inverse_slope),
                       inverse_weight, bias, b[3], b[4]);
    } else {
      invert(y, residual, count, inverse_weight, bias, b[4]);
    }
    if (p.kept.count > 0) {
      const int64_t kept = p.kept.count;
      const float* xhat = stage(p.xhat, s.dtype, row * kept, rows * kept, b[1]);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < kept; ++j) b[4][r * s.channels + p.kept.index[j]] = *xhat++;
      }
    }
    return Recovered{bends ? b[3] : grad_y, b[4]};
  }
  const float* xhat = nullptr;
  if (p.source == NormSource::kXhat) xhat = stage(p.xhat, s.dtype, at, count, b[4]);
  if (p.signs == nullptr || !bends) return Recovered{grad_y, xhat};
  std::copy_n(grad_y, count, b[3]);
  apply_sign_rows(signs_of_row(p, row), rows, s.channels, c.slope, b[3]);
  return Recovered{b[3], xhat};
}

template <typename Statistic>
void write_rows(const NormActBackward& p, const Coefficients& c, int64_t row, int64_t rows,
                Recovered values, Statistic first, Statistic second, Statistic rstd,
                float* buffer) {
  const NormActShape& s = p.shape;
  const int64_t count = rows * s.channels, at = row * s.channels;
  if (p.grad_residual != nullptr) commit(values.grad_n, p.grad_residual, s.dtype, at, count);
  if (p.grad_x == nullptr) return;
  float* grad_x = target(p.grad_x, s.dtype, at, buffer);
  const float* xhat = s.norm == Norm::kFixed ? nullptr : values.xhat;
  finish(values.grad_n, xhat, count, PerElement(c.weight), first, second, rstd, grad_x);
  if (s.act_first && p.signs != nullptr) {
    apply_sign_rows(signs_of_row(p, row), rows, s.channels, c.slope, grad_x);
  }
  commit(grad_x, p.grad_x, s.dtype, at, count);
}

// Sums over rows of grad_n and grad_n * xhat, one per channel: of some rows in float, of a unit in
// double. Without totals nothing is summed.
class ColumnSums {
 public:
  ColumnSums(const NormActShape& s, double* totals)
      : shape_(s), totals_(totals), folded_(folded_rows(s) * s.channels) {
    if (totals_ == nullptr) return;
    std::fill_n(totals_, 2 * s.channels, 0.0);
    clear();
  }

  void add(Recovered values, int64_t rows) {
    if (totals_ == nullptr) return;
    const int64_t elements = rows * shape_.channels;
    for (int64_t at = 0; at < elements; at += folded_) {
      const int64_t count = std::min(folded_, elements - at);
      const float* __restrict grad_n = values.grad_n + at;
      if (values.xhat == nullptr) {
        for (int64_t i = 0; i < count; ++i) first_[i] += grad_n[i];
        continue;
      }
      const float* __restrict xhat = values.xhat + at;
      for (int64_t i = 0; i < count; ++i) {
        first_[i] += grad_n[i];
        second_[i] += grad_n[i] * xhat[i];
      }
    }
    pending_ += rows;
    if (pending_ >= kPending) flush();
  }

  void flush() {
    if (totals_ == nullptr) return;
    fold(shape_, first_);
    fold(shape_, second_);
    for (int64_t i = 0; i < shape_.channels; ++i) {
      totals_[i] += static_cast<double>(first_[i]);
      totals_[shape_.channels + i] += static_cast<double>(second_[i]);
    }
    clear();
  }

 private:
  static constexpr int64_t kPending = 64;  // rows

  void clear() {
    std::fill_n(first_, folded_, 0.0f);
    std::fill_n(second_, folded_, 0.0f);
    pending_ = 0;
  }

  const NormActShape& shape_;
  double* totals_;
  int64_t folded_;
  int64_t pending_ = 0;
  alignas(64) float first_[kRoom];
  alignas(64) float second_[kRoom];
};

void layer_unit(const NormActBackward& p, const Coefficients& c, bool adds, int64_t index) {
  const NormActShape& s = p.shape;
  const UnitRows unit(s, index);
  const float share = 1 / static_cast<float>(s.channels);
  Buffers buffers(s);
  ColumnSums columns(s, adds ? p.workspace + index * 2 * s.channels : nullptr);
  for (int64_t row = unit.begin; row < unit.end; ++row) {
    const Recovered values = recover_rows(p, c, row, 1, buffers);
    columns.add(values, 1);
    Sums sums;
    if (p.grad_x != nullptr) {
      sums = sum_products(values.grad_n, PerElement(c.weight), values.xhat, s.channels);
    }
    write_rows(p, c, row, 1, values, Uniform{static_cast<float>(sums.first) * share},
               Uniform{static_cast<float>(sums.second) * share},
               Uniform{reciprocal_std(p.var[row], s.eps)}, buffers[1]);
  }
  columns.flush();
}

// Sums of a column of a sample, behind the sums of the units.
double* column_sums(const NormActBackward& p, int64_t column) {
  return p.workspace + 2 * (p.shape.outer * unit_count(p.shape) * p.shape.channels + column);
}

void combine_columns(const NormActBackward& p) {
  const NormActShape& s = p.shape;
  const int64_t units = unit_count(s);
  for (int64_t k = 0; k < s.outer * s.channels; ++k) {
    Sums sums;
    for (int64_t u = 0; u < units; ++u) {
      const int64_t index = k / s.channels * units + u;
      const double* unit = p.workspace + index * 2 * s.channels + k % s.channels;
      sums.first += unit[0];
      sums.second += unit[s.channels];
    }
    column_sums(p, k)[0] = sums.first;
    column_sums(p, k)[1] = sums.second;
  }
}

// What belongs to the columns of the sample that a thread is at.
struct ColumnStatistics {
  Coefficients coefficients;
  Tiles<3> memory;
  Repeated rstd{memory[0]}, first{memory[1]}, second{memory[2]};
  int64_t sample = -1;

  ColumnStatistics(const NormActShape& s, const NormActAffine& a, const KeptChannels& kept)
      : coefficients(s, a, kept), memory(s) {}
};

void enter_sample(const NormActBackward& p, ColumnStatistics& c, int64_t sample) {
  const NormActShape& s = p.shape;
  const bool fixed = s.norm == Norm::kFixed;
  const int64_t at = fixed ? 0 : sample * s.channels;
  const auto average = [&](int64_t i, int which) {
    if (fixed) return 0.0f;
    const double sum = column_sums(p, at + i)[which] / static_cast<double>(s.inner);
    return c.coefficients.weight.values[i] * static_cast<float>(sum);
  };
  c.sample = sample;
  c.first.fill(s, [&](int64_t i) { return average(i, 0); });
  c.second.fill(s, [&](int64_t i) { return average(i, 1); });
  c.rstd.fill(s, [&](int64_t i) { return reciprocal_std(p.var[at + i], s.eps); });
}

void column_unit(const NormActBackward& p, ColumnStatistics& c, bool adds, bool writes,
                 int64_t index) {
  const NormActShape& s = p.shape;
  const UnitRows unit(s, index);
  if (writes && c.sample != unit.sample) enter_sample(p, c, unit.sample);
  Buffers buffers(s);
  ColumnSums columns(s, adds ? p.workspace + index * 2 * s.channels : nullptr);
  for (int64_t row = unit.begin; row < unit.end; row += tile_rows(s)) {
    const int64_t rows = std::min(tile_rows(s), unit.end - row);
    const Recovered values = recover_rows(p, c.coefficients, row, rows, buffers);
    columns.add(values, rows);
    if (!writes) continue;
    write_rows(p, c.coefficients, row, rows, values, PerElement(c.first), PerElement(c.second),
               PerElement(c.rstd), buffers[1]);
  }
  columns.flush();
}

}  // namespace

void norm_act_last_backward(const NormActBackward& p, int threads) {
  const NormActShape& s = p.shape;
  const bool layer = s.norm == Norm::kLayer, fixed = s.norm == Norm::kFixed;
  const bool parameters = p.grad_weight != nullptr || p.grad_bias != nullptr;
  const bool adds = parameters || (p.grad_x != nullptr && !fixed);
  const bool writes = p.grad_x != nullptr || p.grad_residual != nullptr;
  const auto make_state = [&p] { return ColumnStatistics(p.shape, p.affine, p.kept); };
  if (layer) {
    over_units(
        s, threads, [&p] { return Coefficients(p.shape, p.affine, p.kept); },
        [&](const Coefficients& c, int64_t unit) { layer_unit(p, c, parameters, unit); });
  } else if (adds || fixed) {
    // With fixed statistics grad_x waits for no sum: all is one reading.
    over_units(s, threads, make_state, [&](ColumnStatistics& c, int64_t unit) {
      column_unit(p, c, adds, fixed && writes, unit);
    });
  }
  if (parameters || (adds && !layer)) combine_columns(p);
  if (writes && !fixed && !layer) {
    over_units(s, threads, make_state,
               [&](ColumnStatistics& c, int64_t unit) { column_unit(p, c, false, true, unit); });
  }
  for (int64_t c = 0; parameters && c < s.channels; ++c) {
    Sums sums;
    for (int64_t n = 0; n < s.outer; ++n) {
      sums.first += column_sums(p, n * s.channels + c)[0];
      sums.second += column_sums(p, n * s.channels + c)[1];
    }
    if (p.grad_bias != nullptr) p.grad_bias[c] = static_cast<float>(sums.first);
    if (p.grad_weight != nullptr) p.grad_weight[c] = static_cast<float>(sums.second);
  }
}

}  // namespace PF_ISA
}  // namespace petite_fast
