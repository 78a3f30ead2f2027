// CPU form of common/norm_act.h where channels come before voxels: a row is the voxels of one
// channel of one sample. Compiled once per instruction set, each into its own namespace PF_ISA.
//
// Bound by memory: statistics are one reading (each tile is read twice in the first-level cache:
// its mean, then its squares), the result is one reading and one writing. The backward is the same:
// the sums of grad_n and grad_n * xhat, then grad_x.
#include <algorithm>

#include "cpu/norm_act_tile.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

constexpr int64_t kTile = 1024;
constexpr int64_t kGrain = 32768;  // elements worth waking a thread for

// Which elements a unit is, and what belongs to it.
struct Unit {
  int64_t row;
  int64_t sample;
  int64_t channel;
  int64_t statistic;
  int64_t begin;  // within the row
  int64_t end;

  Unit(const NormActShape& s, int64_t index) {
    const int64_t pieces = norm_divide_up(s.inner, kNormUnit);
    row = index / pieces;
    sample = row / s.channels;
    channel = row % s.channels;
    statistic = s.norm == Norm::kGroup ? row / (s.channels / s.groups) : channel;
    begin = index % pieces * kNormUnit;
    end = std::min(s.inner, begin + kNormUnit);
  }
};

// The rows that one statistic runs over: neighbours, or one per sample.
struct StatisticRows {
  int64_t count;
  int64_t first;
  int64_t step;

  StatisticRows(const NormActShape& s, int64_t statistic) {
    const int64_t per_group = s.norm == Norm::kGroup ? s.channels / s.groups : 0;
    count = per_group > 0 ? per_group : s.outer;
    first = per_group > 0 ? statistic * per_group : statistic;
    step = per_group > 0 ? 1 : s.channels;
  }
  int64_t row(int64_t i) const { return first + i * step; }
};

// visit(unit) for every unit, combine(statistic), write(unit) for every unit. Where the statistics
// keep all threads busy, each is done from start to end, while its rows are in the cache.
template <typename Visit, typename Combine, typename Write>
void in_phases(const NormActShape& s, int threads, const Visit& visit, const Combine& combine,
               const Write& write) {
  const int64_t pieces = norm_divide_up(s.inner, kNormUnit);
  const int64_t statistics = statistics_count(s);
  if (statistics % threads == 0 || statistics >= 8 * threads) {
    const int64_t elements = s.outer * s.channels * s.inner / statistics;
    parallel_for(statistics, kGrain / elements, threads, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const StatisticRows rows(s, k);
        for (int64_t i = 0; i < rows.count * pieces; ++i) {
          visit(rows.row(i / pieces) * pieces + i % pieces);
        }
        combine(k);
        for (int64_t i = 0; i < rows.count * pieces; ++i) {
          write(rows.row(i / pieces) * pieces + i % pieces);
        }
      }
    });
    return;
  }
  const int64_t units = s.outer * s.channels * pieces;
  const int64_t grain = kGrain / std::min(kNormUnit, s.inner);
  const auto over_units = [&](const auto& step) {
    parallel_for(units, grain, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) step(i);
    });
  };
  over_units(visit);
  for (int64_t k = 0; k < statistics; ++k) combine(k);
  over_units(write);
}

// The two doubles of a statistic, behind the sums of the units and of the rows.
double* of_statistic(const NormActShape& s, double* workspace, int64_t statistic) {
  return workspace + 2 * (s.outer * (unit_count(s) + s.channels) + statistic);
}

void unit_moments(const NormActForward& p, int64_t index) {
  const NormActShape& s = p.shape;
  const Unit unit(s, index);
  const ChannelValues channel = channel_values(p.affine, p.kept, unit.channel);
  alignas(64) float buffer[kTile];
  Moments moments{};
  for (int64_t i = unit.begin; i < unit.end; i += kTile) {
    const int64_t count = std::min(kTile, unit.end - i);
    const float* x = stage(p.x, s.dtype, unit.row * s.inner + i, count, buffer);
    if (s.act_first) {
      activate(x, count, Uniform{channel.slope}, buffer);
      x = buffer;
    }
    merge(moments, tile_moments(x, count));
  }
  p.workspace[2 * index] = moments.mean;
  p.workspace[2 * index + 1] = moments.squares;
}

void combine_moments(const NormActForward& p, int64_t statistic) {
  const NormActShape& s = p.shape;
  const int64_t pieces = norm_divide_up(s.inner, kNormUnit);
  const StatisticRows rows(s, statistic);
  Moments moments{};
  for (int64_t i = 0; i < rows.count * pieces; ++i) {
    const int64_t piece = i % pieces;
    const double* unit = p.workspace + 2 * (rows.row(i / pieces) * pieces + piece);
    const int64_t count = std::min(kNormUnit, s.inner - piece * kNormUnit);
    merge(moments, Moments{static_cast<double>(count), unit[0], unit[1]});
  }
  p.mean[statistic] = static_cast<float>(moments.mean);
  // What rounding took from the mean is given back to the bias.
  of_statistic(s, p.workspace, statistic)[0] =
      moments.mean - static_cast<double>(p.mean[statistic]);
  p.var[statistic] = static_cast<float>(moments.squares / moments.count);
}

void write_unit(const NormActForward& p, int64_t index) {
  const NormActShape& s = p.shape;
  const Unit unit(s, index);
  const ChannelValues channel = channel_values(p.affine, p.kept, unit.channel);
  const Uniform mean{p.mean[unit.statistic]};
  const Uniform rstd{reciprocal_std(p.var[unit.statistic], s.eps)};
  const double rest = s.norm == Norm::kFixed ? 0 : of_statistic(s, p.workspace, unit.statistic)[0];
  const Uniform shift{-static_cast<float>(rest) * rstd.value};
  const Uniform bias{channel.bias + shift.value * channel.weight};
  const bool whole = p.xhat != nullptr && p.kept.count == 0;
  const int64_t kept_row = whole ? unit.row : unit.sample * p.kept.count + channel.slot;
  alignas(64) float x_buffer[kTile], residual_buffer[kTile], buffer[kTile];
  for (int64_t i = unit.begin; i < unit.end; i += kTile) {
    const int64_t count = std::min(kTile, unit.end - i);
    const int64_t at = unit.row * s.inner + i;
    uint8_t* signs = p.signs == nullptr ? nullptr : p.signs + unit.row * sign_row_bytes(s) + i / 8;
    const float* x = stage(p.x, s.dtype, at, count, x_buffer);
    if (s.act_first) {
      if (signs != nullptr) pack_row(x, count, signs);
      activate(x, count, Uniform{channel.slope}, x_buffer);
      x = x_buffer;
    }
    if (whole || channel.slot >= 0) {
      const int64_t kept_at = kept_row * s.inner + i;
      float* xhat = target(p.xhat, s.dtype, kept_at, buffer);
      normalise(x, nullptr, count, mean, rstd, Uniform{1}, shift, xhat);
      commit(xhat, p.xhat, s.dtype, kept_at, count);
    }
    const float* residual =
        p.residual == nullptr ? nullptr : stage(p.residual, s.dtype, at, count, residual_buffer);
    float* y = target(p.y, s.dtype, at, buffer);
    normalise(x, residual, count, mean, rstd, Uniform{channel.weight}, bias, y);
    if (!s.act_first && !is_identity(p.affine)) {
      if (signs != nullptr) pack_row(y, count, signs);
      activate(y, count, Uniform{channel.slope}, y);
    }
    commit(y, p.y, s.dtype, at, count);
  }
}

// Sums of a row, behind the sums of the units.
double* row_sums(const NormActBackward& p, int64_t row) {
  return p.workspace + 2 * (p.shape.outer * unit_count(p.shape) + row);
}

double* averages(const NormActBackward& p, int64_t statistic) {
  return of_statistic(p.shape, p.workspace, statistic);
}

// Adds up a unit's grad_n and grad_n * xhat, or writes its gradients, or both.
void backward_unit(const NormActBackward& p, int64_t index, bool adds, bool writes) {
  const NormActShape& s = p.shape;
  const Unit unit(s, index);
  const ChannelValues channel = channel_values(p.affine, p.kept, unit.channel);
  const bool fixed = s.norm == Norm::kFixed;
  // With the activation first, y is n and grad_y is grad_n.
  const bool bends = !s.act_first && !is_identity(p.affine);
  const Uniform slope{channel.slope};
  alignas(64) float buffers[5][kTile];
  Sums sums;
  for (int64_t i = unit.begin; i < unit.end; i += kTile) {
    const int64_t count = std::min(kTile, unit.end - i);
    const int64_t at = unit.row * s.inner + i;
    const uint8_t* signs =
        p.signs == nullptr ? nullptr : p.signs + unit.row * sign_row_bytes(s) + i / 8;
    const float* grad_n = stage(p.grad_y, s.dtype, at, count, buffers[0]);
    const float* xhat = nullptr;
    if (p.source == NormSource::kY) {
      const float* y = stage(p.y, s.dtype, at, count, buffers[1]);
      const float* residual =
          p.residual == nullptr ? nullptr : stage(p.residual, s.dtype, at, count, buffers[2]);
      const Uniform inverse_weight{channel.inverse_weight}, bias{channel.bias};
      if (bends) {
        invert_activated(grad_n, y, residual, count, slope, Uniform{channel.inverse_slope},
                         inverse_weight, bias, buffers[3], buffers[4]);
        grad_n = buffers[3];
      } else {
        invert(y, residual, count, inverse_weight, bias, buffers[4]);
      }
      xhat = buffers[4];
      if (channel.slot >= 0) {
        const int64_t kept_row = unit.sample * p.kept.count + channel.slot;
        xhat = stage(p.xhat, s.dtype, kept_row * s.inner + i, count, buffers[4]);
      }
    } else {
      if (signs != nullptr && bends) {
        std::copy_n(grad_n, count, buffers[3]);
        apply_signs(signs, count, slope, buffers[3]);
        grad_n = buffers[3];
      }
      if (p.source == NormSource::kXhat) xhat = stage(p.xhat, s.dtype, at, count, buffers[4]);
    }
    if (adds) {
      const Sums tile = sum_products(grad_n, Uniform{1}, xhat, count);
      sums.first += tile.first;
      sums.second += tile.second;
    }
    if (writes && p.grad_residual != nullptr) {
      commit(grad_n, p.grad_residual, s.dtype, at, count);
    }
    if (writes && p.grad_x != nullptr) {
      const double* average = averages(p, unit.statistic);
      const Uniform first{fixed ? 0 : static_cast<float>(average[0])};
      const Uniform second{fixed ? 0 : static_cast<float>(average[1])};
      float* grad_x = target(p.grad_x, s.dtype, at, buffers[1]);
      finish(grad_n, fixed ? nullptr : xhat, count, Uniform{channel.weight}, first, second,
             Uniform{reciprocal_std(p.var[unit.statistic], s.eps)}, grad_x);
      if (s.act_first && signs != nullptr) {
        apply_signs(signs, count, slope, grad_x);
      }
      commit(grad_x, p.grad_x, s.dtype, at, count);
    }
  }
  if (adds) {
    p.workspace[2 * index] = sums.first;
    p.workspace[2 * index + 1] = sums.second;
  }
}

void combine_sums(const NormActBackward& p, int64_t statistic) {
  const NormActShape& s = p.shape;
  const int64_t pieces = norm_divide_up(s.inner, kNormUnit);
  const StatisticRows rows(s, statistic);
  Sums total;
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t row = rows.row(i);
    Sums sums;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      sums.first += p.workspace[2 * (row * pieces + piece)];
      sums.second += p.workspace[2 * (row * pieces + piece) + 1];
    }
    row_sums(p, row)[0] = sums.first;
    row_sums(p, row)[1] = sums.second;
    const double weight = p.affine.weight == nullptr ? 1 : p.affine.weight[row % s.channels];
    total.first += weight * sums.first;
    total.second += weight * sums.second;
  }
  const double elements = static_cast<double>(rows.count * s.inner);
  averages(p, statistic)[0] = total.first / elements;
  averages(p, statistic)[1] = total.second / elements;
}

}  // namespace

void norm_act(const NormActForward& p, int threads) {
  const NormActShape& s = p.shape;
  if (s.channels_last) return norm_act_last(p, threads);
  const auto write = [&p](int64_t unit) { write_unit(p, unit); };
  if (s.norm == Norm::kFixed) {
    in_phases(s, threads, [](int64_t) {}, [](int64_t) {}, write);
    return;
  }
  in_phases(
      s, threads, [&p](int64_t unit) { unit_moments(p, unit); },
      [&p](int64_t statistic) { combine_moments(p, statistic); }, write);
}

void norm_act_backward(const NormActBackward& p, int threads) {
  const NormActShape& s = p.shape;
  if (s.channels_last) return norm_act_last_backward(p, threads);
  const bool fixed = s.norm == Norm::kFixed;
  const bool parameters = p.grad_weight != nullptr || p.grad_bias != nullptr;
  const bool adds = parameters || (p.grad_x != nullptr && !fixed);
  const bool writes = p.grad_x != nullptr || p.grad_residual != nullptr;
  // With fixed statistics grad_x waits for no sum: all is one reading.
  const auto visit = [&](int64_t unit) {
    if (adds || fixed) backward_unit(p, unit, adds, fixed && writes);
  };
  const auto combine = [&](int64_t statistic) {
    if (adds) combine_sums(p, statistic);
  };
  in_phases(s, threads, visit, combine, [&](int64_t unit) {
    if (writes && !fixed) backward_unit(p, unit, false, true);
  });
  for (int64_t c = 0; parameters && c < s.channels; ++c) {
    Sums sums;
    for (int64_t n = 0; n < s.outer; ++n) {
      sums.first += row_sums(p, n * s.channels + c)[0];
      sums.second += row_sums(p, n * s.channels + c)[1];
    }
    if (p.grad_bias != nullptr) p.grad_bias[c] = static_cast<float>(sums.first);
    if (p.grad_weight != nullptr) p.grad_weight[c] = static_cast<float>(sums.second);
  }
}

}  // namespace PF_ISA
}  // namespace petite_fast
