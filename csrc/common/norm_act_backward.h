// The backward of the CUDA norm_act, phase by phase: the sums of grad_n and of grad_n * xhat over
// every column of a unit, their union per statistic and per parameter, and the gradients.
#pragma once

#include "common/norm_act_octets.h"

namespace petite_fast {

struct NormActSums {
  double first;   // of grad_n
  double second;  // of grad_n * xhat
};

PF_HOST_DEVICE void merge(NormActSums& all, const NormActSums& other) {
  all.first += other.first;
  all.second += other.second;
}

// xhat = (n - bias) * scale, and with the factor rstd
//     grad_x = weight * grad_n - first - second * xhat;
// first and second are the means of weight * grad_n and weight * grad_n * xhat. Who only writes
// grad_x has second in scale already.
struct BackwardLanes {
  float slope[kOctet];
  float inverse_slope[kOctet];
  float bias[kOctet];
  float scale[kOctet];
  float weight[kOctet];
  float first[kOctet];
};

PF_HOST_DEVICE double* averages(const NormActBackward& p, const NormActGrid& g, int64_t statistic) {
  return p.workspace + 3 * p.shape.outer * g.units * g.columns + 2 * statistic;
}

template <bool kSums, bool kWrites>
PF_HOST_DEVICE void backward_lanes(const NormActBackward& p, const NormActGrid& g,
                                   const OctetPlace& at, BackwardLanes& c) {
  const NormActShape& s = p.shape;
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) {
    const int64_t column = at.octet * kOctet + i;
    const int64_t channel = channel_at(s, column < g.columns ? column : 0);
    const ChannelValues v = channel_values(p.affine, p.kept, channel);
    const bool from_y = p.source == NormSource::kY && v.slot < 0;
    c.slope[i] = v.slope;
    c.inverse_slope[i] = v.inverse_slope;
    c.bias[i] = from_y ? v.bias : 0;
    c.scale[i] = from_y ? v.inverse_weight : 1;
    if constexpr (kWrites) {
      const int64_t statistic = statistic_of(s, at.sample, channel);
      const float rstd = reciprocal_std(p.var[statistic], s.eps);
      c.weight[i] = v.weight * rstd;
      c.first[i] = 0;
      if (kSums || s.norm == Norm::kFixed) continue;
      c.first[i] = static_cast<float>(averages(p, g, statistic)[0]) * rstd;
      c.scale[i] *= static_cast<float>(averages(p, g, statistic)[1]) * rstd;
    }
  }
}

// What a thread reads of a row.
template <typename T>
struct BackwardOctets {
  Octet<T> grad_y;
  Octet<T> kept;  // y or xhat
  int signs;
};

template <typename T, bool kWhole>
PF_HOST_DEVICE void load_backward(const NormActBackward& p, const NormActGrid& g,
                                  const OctetPlace& at, int64_t row, BackwardOctets<T>& o) {
  const int64_t element = element_at(g, at, row);
  const int lanes = kWhole ? kOctet : lanes_at(g, at.octet, row);
  o.grad_y = load_octet<kWhole, T>(p.grad_y, element, lanes);
  if (p.source != NormSource::kNone) {
    const void* kept = p.source == NormSource::kY ? p.y : p.xhat;
    o.kept = load_octet<kWhole, T>(kept, element, lanes);
  }
  if (p.signs != nullptr) o.signs = p.signs[sign_index(g, at, row)];
}

// grad_n, and xhat as BackwardLanes says; xhat is 0 where there is no source.
template <typename T, bool kWhole>
PF_HOST_DEVICE void recover(const NormActBackward& p, const NormActGrid& g, const OctetPlace& at,
                            int64_t row, const BackwardLanes& c, const KeptLanes& kept,
                            const BackwardOctets<T>& o, float* grad_n, float* xhat) {
  // With the activation first, y is n and grad_y is grad_n.
  const bool bends = !p.shape.act_first && !is_identity(p.affine);
  const bool from_y = p.source == NormSource::kY;
  float shift[kOctet];
  widen_octet(o.grad_y, grad_n);
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) xhat[i] = shift[i] = 0;
  if (p.source != NormSource::kNone) widen_octet(o.kept, xhat);
  if (p.residual != nullptr) {  // rare: its registers are not set aside for more rows
    const int lanes = kWhole ? kOctet : lanes_at(g, at.octet, row);
    widen_octet(load_octet<kWhole, T>(p.residual, element_at(g, at, row), lanes), shift);
  }
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) {
    const bool above = xhat[i] > 0;
    const bool positive = p.signs == nullptr ? above || !from_y : (o.signs >> i & 1) != 0;
    if (bends) grad_n[i] = bend(positive, grad_n[i], c.slope[i]);
    if (bends && from_y) xhat[i] = bend(above, xhat[i], c.inverse_slope[i]);
    xhat[i] = (xhat[i] - shift[i] - c.bias[i]) * c.scale[i];
  }
  if (kept.lanes == 0) return;
  const T* beside =
      static_cast<const T*>(p.xhat) + (at.sample * g.rows + row) * p.kept.count + kept.slot;
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) {
    if (kept.lanes >> i & 1) xhat[i] = widen<float>(*beside++) * c.scale[i];
  }
}

template <typename T, bool kWhole, bool kSums>
PF_HOST_DEVICE void write_gradients(const NormActBackward& p, const NormActGrid& g,
                                    const OctetPlace& at, int64_t row, const BackwardLanes& c,
                                    int signs, const float* grad_n, const float* xhat) {
  const int64_t element = element_at(g, at, row);
  const int lanes = kWhole ? kOctet : lanes_at(g, at.octet, row);
  if (p.grad_residual != nullptr) {
    store_octet<kWhole, T>(grad_n, p.grad_residual, element, lanes);
  }
  if (p.grad_x == nullptr) return;
  // Fixed statistics have no gradient: xhat, which may be infinite or unknown, is not asked for.
  const bool fixed = kSums || p.shape.norm == Norm::kFixed;
  float grad_x[kOctet];
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) {
    const float upstream = grad_n[i] * c.weight[i];
    grad_x[i] = fixed ? upstream : upstream - c.first[i] - xhat[i];
    if (p.shape.act_first && p.signs != nullptr) {
      grad_x[i] = bend((signs >> i & 1) != 0, grad_x[i], c.slope[i]);
    }
  }
  store_octet<kWhole, T>(grad_x, p.grad_x, element, lanes);
}

// A thread's sums, per lane.
struct LaneSums {
  float first[kOctet];
  float second[kOctet];
};

// kSums and kWrites: sums, gradients, or, with fixed statistics, both in one reading.
template <typename T, bool kWhole, bool kSums, bool kWrites>
PF_HOST_DEVICE void backward_pass(const NormActBackward& p, const NormActGrid& g, int64_t block,
                                  int thread, LaneSums& sums) {
  const OctetPlace at = place_of(g, block, thread);
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) sums.first[i] = sums.second[i] = 0;
  if (at.row == at.end) return;
  // Rows whose loads are in flight together: as many as there are registers for.
  constexpr int kRows = kWhole && sizeof(T) == 2 && !(kSums && kWrites) ? 2 : 1;
  BackwardLanes c;
  backward_lanes<kSums, kWrites>(p, g, at, c);
  const KeptLanes kept = kept_lanes(p.kept, at);
  PF_NO_UNROLL
  for (int64_t row = at.row; row < at.end; row += kRows * g.rows_per_step) {
    BackwardOctets<T> octets[kRows];
    PF_UNROLL
    for (int k = 0; k < kRows; ++k) {
      const int64_t here = row + k * g.rows_per_step;
      if (here < at.end) load_backward<T, kWhole>(p, g, at, here, octets[k]);
    }
    PF_UNROLL
    for (int k = 0; k < kRows; ++k) {
      const int64_t here = row + k * g.rows_per_step;
      if (here >= at.end) continue;
      float grad_n[kOctet], xhat[kOctet];
      recover<T, kWhole>(p, g, at, here, c, kept, octets[k], grad_n, xhat);
      if constexpr (kSums) {
        const int lanes = kWhole ? kOctet : lanes_at(g, at.octet, here);
        PF_UNROLL
        for (int i = 0; i < kOctet; ++i) {
          if (i >= lanes) continue;
          sums.first[i] += grad_n[i];
          sums.second[i] += grad_n[i] * xhat[i];
        }
      }
      if constexpr (kWrites) {
        write_gradients<T, kWhole, kSums>(p, g, at, here, c, octets[k].signs, grad_n, xhat);
      }
    }
  }
}

PF_HOST_DEVICE void stage_sums(const LaneSums& sums, int thread, int threads, NormActSums* shared) {
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) {
    shared[i * threads + thread] =
        NormActSums{static_cast<double>(sums.first[i]), static_cast<double>(sums.second[i])};
  }
}

PF_HOST_DEVICE void store_sums(const NormActBackward& p, const NormActGrid& g, int64_t block,
                               int thread, int threads, const NormActSums* shared) {
  const OctetPlace at = place_of(g, block, thread);
  if (thread >= g.width) return;
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) {
    const int64_t column = at.octet * kOctet + i;
    if (column >= g.columns) return;
    double* partial = p.workspace + 2 * (at.unit * g.columns + column);
    partial[0] = shared[i * threads + thread].first;
    partial[1] = shared[i * threads + thread].second;
  }
}

PF_HOST_DEVICE bool octets_are_whole(const NormActBackward& p, const NormActGrid& g) {
  const void* xhat = p.kept.count == 0 ? p.xhat : nullptr;
  return all_octets_are_whole(g, p.grad_y, p.y, xhat, p.residual, p.grad_x, p.grad_residual);
}

// Which readings of the tensors there are.
struct BackwardPasses {
  bool sums;
  bool writes;
  bool both;  // in one
};

PF_HOST_DEVICE BackwardPasses backward_passes(const NormActBackward& p) {
  const bool fixed = p.shape.norm == Norm::kFixed;
  const bool parameters = p.grad_weight != nullptr || p.grad_bias != nullptr;
  const bool sums = parameters || (p.grad_x != nullptr && !fixed);
  const bool writes = p.grad_x != nullptr || p.grad_residual != nullptr;
  // The gradient of the residual alone waits for no sum either.
  const bool waits = p.grad_x != nullptr && !fixed;
  return BackwardPasses{sums, writes, sums && writes && !waits};
}

// A block makes one statistic's averages (those come first), or one channel's gradients.
PF_HOST_DEVICE int64_t averages_count(const NormActBackward& p) {
  const bool needed = p.grad_x != nullptr && p.shape.norm != Norm::kFixed;
  return needed ? statistics_count(p.shape) : 0;
}

PF_HOST_DEVICE int64_t totals_count(const NormActBackward& p) {
  const bool parameters = p.grad_weight != nullptr || p.grad_bias != nullptr;
  return averages_count(p) + (parameters ? p.shape.channels : 0);
}

PF_HOST_DEVICE void gather_sums(const NormActBackward& p, const NormActGrid& g, int64_t block,
                                int thread, int threads, NormActSums* shared) {
  const NormActShape& s = p.shape;
  const int64_t statistics = averages_count(p);
  const bool averaged = block < statistics;
  const NormActSet set =
      averaged ? statistic_set(s, g, block) : channel_set(s, g, block - statistics);
  NormActSums all{0, 0};
  for (int64_t i = thread; i < partial_count(g, set); i += threads) {
    const double* partial = p.workspace + 2 * partial_at(g, set, i);
    const int64_t channel = channel_at(s, set.first_column + i % set.columns);
    const bool weighted = averaged && p.affine.weight != nullptr;
    const double weight = weighted ? static_cast<double>(p.affine.weight[channel]) : 1;
    merge(all, NormActSums{weight * partial[0], weight * partial[1]});
  }
  shared[thread] = all;
}

PF_HOST_DEVICE void finish_sums(const NormActBackward& p, const NormActGrid& g, int64_t block,
                                int thread, const NormActSums* shared) {
  if (thread != 0) return;
  const NormActShape& s = p.shape;
  const int64_t statistics = averages_count(p);
  if (block < statistics) {
    const int64_t count =
        s.norm == Norm::kGroup ? s.inner * (s.channels / s.groups) : s.inner * s.outer;
    averages(p, g, block)[0] = shared[0].first / static_cast<double>(count);
    averages(p, g, block)[1] = shared[0].second / static_cast<double>(count);
    return;
  }
  const int64_t channel = block - statistics;
  if (p.grad_bias != nullptr) p.grad_bias[channel] = static_cast<float>(shared[0].first);
  if (p.grad_weight != nullptr) p.grad_weight[channel] = static_cast<float>(shared[0].second);
}

}  // namespace petite_fast
