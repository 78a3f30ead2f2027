// The CUDA norm_act, phase by phase, so that the host can run it: the moments of every column of a
// unit, their union per statistic, and y. See norm_act_octets.h for who does what.
#pragma once

#include "common/norm_act_octets.h"

namespace petite_fast {

// Rows whose loads are in flight together: as many as there are registers for.
constexpr int kMomentRows = 4;
template <typename T, bool kWhole>
constexpr int kApplyRows = kWhole && sizeof(T) == 2 ? 2 : 1;

// The moments of a thread's rows, per lane. Differences to the first row are added up, as Welford
// did: a large common mean costs no digits.
struct LaneMoments {
  float shift[kOctet];
  float mean[kOctet];
  float squares[kOctet];
  int count[kOctet];
};

template <typename T>
PF_HOST_DEVICE void norm_input(const NormActShape& s, const float* slope, const Octet<T>& octet,
                               float* values) {
  widen_octet(octet, values);
  if (!s.act_first) return;
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) values[i] = bend(values[i] > 0, values[i], slope[i]);
}

template <typename T, bool kWhole>
PF_HOST_DEVICE void add_moments(const NormActForward& p, const NormActGrid& g, int64_t block,
                                int thread, LaneMoments& m) {
  const OctetPlace at = place_of(g, block, thread);
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) {
    m.shift[i] = m.mean[i] = m.squares[i] = 0;
    m.count[i] = 0;
  }
  if (at.row == at.end) return;
  float slope[kOctet];
  const int first_lanes = lanes_at(g, at.octet, at.row);
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) {
    const int64_t column = i < first_lanes ? at.octet * kOctet + i : 0;
    const NormActAffine& a = p.affine;
    slope[i] = a.slopes == nullptr ? a.slope : a.slopes[channel_at(p.shape, column)];
  }
  const Octet<T> first = load_octet<kWhole, T>(p.x, element_at(g, at, at.row), first_lanes);
  norm_input(p.shape, slope, first, m.shift);
  float seen = 0;
  PF_NO_UNROLL
  for (int64_t row = at.row; row < at.end; row += kMomentRows * g.rows_per_step) {
    Octet<T> octets[kMomentRows];
    PF_UNROLL
    for (int k = 0; k < kMomentRows; ++k) {
      const int64_t here = row + k * g.rows_per_step;
      if (here >= at.end) continue;
      octets[k] = load_octet<kWhole, T>(p.x, element_at(g, at, here), lanes_at(g, at.octet, here));
    }
    PF_UNROLL
    for (int k = 0; k < kMomentRows; ++k) {
      const int64_t here = row + k * g.rows_per_step;
      if (here >= at.end) continue;
      float values[kOctet];
      norm_input(p.shape, slope, octets[k], values);
      const int lanes = kWhole ? kOctet : lanes_at(g, at.octet, here);
      seen += 1;
      const float share = 1 / seen;
      PF_UNROLL
      for (int i = 0; i < kOctet; ++i) {
        if (i >= lanes) continue;
        const float value = values[i] - m.shift[i];
        const float delta = value - m.mean[i];
        m.mean[i] += delta * share;
        m.squares[i] += delta * (value - m.mean[i]);
        m.count[i] += 1;
      }
    }
  }
}

PF_HOST_DEVICE void stage_moments(const LaneMoments& m, int thread, int threads, Moments* shared) {
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) {
    shared[i * threads + thread] =
        Moments{static_cast<double>(m.count[i]),
                static_cast<double>(m.shift[i]) + static_cast<double>(m.mean[i]),
                static_cast<double>(m.squares[i])};
  }
}

PF_HOST_DEVICE void store_moments(const NormActForward& p, const NormActGrid& g, int64_t block,
                                  int thread, int threads, const Moments* shared) {
  const OctetPlace at = place_of(g, block, thread);
  if (thread >= g.width) return;
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) {
    const int64_t column = at.octet * kOctet + i;
    if (column >= g.columns) return;
    double* partial = p.workspace + 3 * (at.unit * g.columns + column);
    partial[0] = shared[i * threads + thread].count;
    partial[1] = shared[i * threads + thread].mean;
    partial[2] = shared[i * threads + thread].squares;
  }
}

// What rounding took from a mean and is given back to xhat.
PF_HOST_DEVICE double* rest_of_mean(const NormActForward& p, const NormActGrid& g,
                                    int64_t statistic) {
  return p.workspace + 3 * p.shape.outer * g.units * g.columns + statistic;
}

// A block makes one statistic.
PF_HOST_DEVICE void gather_moments(const NormActForward& p, const NormActGrid& g, int64_t statistic,
                                   int thread, int threads, Moments* shared) {
  const NormActSet set = statistic_set(p.shape, g, statistic);
  Moments all{0, 0, 0};
  for (int64_t i = thread; i < partial_count(g, set); i += threads) {
    const double* partial = p.workspace + 3 * partial_at(g, set, i);
    merge(all, Moments{partial[0], partial[1], partial[2]});
  }
  shared[thread] = all;
}

PF_HOST_DEVICE void finish_moments(const NormActForward& p, const NormActGrid& g, int64_t statistic,
                                   int thread, const Moments* shared) {
  if (thread != 0) return;
  p.mean[statistic] = static_cast<float>(shared[0].mean);
  p.var[statistic] = static_cast<float>(shared[0].squares / shared[0].count);
  *rest_of_mean(p, g, statistic) = shared[0].mean - static_cast<double>(p.mean[statistic]);
}

// xhat = (x - mean) * rstd + shift, n = weight * xhat + bias
struct ForwardLanes {
  float mean[kOctet];
  float rstd[kOctet];
  float shift[kOctet];
  float weight[kOctet];
  float bias[kOctet];
  float slope[kOctet];
};

PF_HOST_DEVICE void forward_lanes(const NormActForward& p, const NormActGrid& g,
                                  const OctetPlace& at, ForwardLanes& c) {
  const NormActShape& s = p.shape;
  const NormActAffine& a = p.affine;
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) {
    const int64_t column = at.octet * kOctet + i;
    const int64_t channel = channel_at(s, column < g.columns ? column : 0);
    const int64_t statistic = statistic_of(s, at.sample, channel);
    c.mean[i] = p.mean[statistic];
    c.rstd[i] = reciprocal_std(p.var[statistic], s.eps);
    const double rest = s.norm == Norm::kFixed ? 0 : *rest_of_mean(p, g, statistic);
    c.shift[i] = -static_cast<float>(rest) * c.rstd[i];
    c.weight[i] = a.weight == nullptr ? 1 : a.weight[channel];
    c.bias[i] = a.bias == nullptr ? 0 : a.bias[channel];
    c.slope[i] = a.slopes == nullptr ? a.slope : a.slopes[channel];
  }
}

template <typename T, bool kWhole>
PF_HOST_DEVICE void write_octet(const NormActForward& p, const NormActGrid& g, const OctetPlace& at,
                                int64_t row, const ForwardLanes& c, const KeptLanes& kept,
                                const Octet<T>& x, const Octet<T>& residual) {
  const NormActShape& s = p.shape;
  const int lanes = kWhole ? kOctet : lanes_at(g, at.octet, row);
  const int64_t element = element_at(g, at, row);
  float values[kOctet], n[kOctet];
  widen_octet(x, values);
  if (s.act_first && p.signs != nullptr) {
    p.signs[sign_index(g, at, row)] = sign_byte_of(values, lanes);
  }
  norm_input(s, c.slope, x, values);
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) {
    values[i] = (values[i] - c.mean[i]) * c.rstd[i] + c.shift[i];
    n[i] = values[i] * c.weight[i] + c.bias[i];
  }
  if (p.xhat != nullptr && p.kept.count == 0) {
    store_octet<kWhole, T>(values, p.xhat, element, lanes);
  } else if (kept.lanes != 0) {
    T* xhat = static_cast<T*>(p.xhat) + (at.sample * g.rows + row) * p.kept.count + kept.slot;
    PF_UNROLL
    for (int i = 0; i < kOctet; ++i) {
      if (kept.lanes >> i & 1) *xhat++ = round_from<T>(values[i]);
    }
  }
  if (p.residual != nullptr) {
    widen_octet(residual, values);
    PF_UNROLL
    for (int i = 0; i < kOctet; ++i) n[i] += values[i];
  }
  if (!s.act_first) {
    if (p.signs != nullptr) p.signs[sign_index(g, at, row)] = sign_byte_of(n, lanes);
    PF_UNROLL
    for (int i = 0; i < kOctet; ++i) n[i] = bend(n[i] > 0, n[i], c.slope[i]);
  }
  store_octet<kWhole, T>(n, p.y, element, lanes);
}

template <typename T, bool kWhole>
PF_HOST_DEVICE void apply_norm_act(const NormActForward& p, const NormActGrid& g, int64_t block,
                                   int thread) {
  const OctetPlace at = place_of(g, block, thread);
  if (at.row == at.end) return;
  constexpr int kRows = kApplyRows<T, kWhole>;
  ForwardLanes c;
  forward_lanes(p, g, at, c);
  const KeptLanes kept = kept_lanes(p.kept, at);
  PF_NO_UNROLL
  for (int64_t row = at.row; row < at.end; row += kRows * g.rows_per_step) {
    Octet<T> x[kRows], residual[kRows];
    PF_UNROLL
    for (int k = 0; k < kRows; ++k) {
      const int64_t here = row + k * g.rows_per_step;
      if (here >= at.end) continue;
      const int lanes = lanes_at(g, at.octet, here);
      x[k] = load_octet<kWhole, T>(p.x, element_at(g, at, here), lanes);
      if (p.residual == nullptr) continue;
      residual[k] = load_octet<kWhole, T>(p.residual, element_at(g, at, here), lanes);
    }
    PF_UNROLL
    for (int k = 0; k < kRows; ++k) {
      const int64_t here = row + k * g.rows_per_step;
      if (here < at.end) write_octet<T, kWhole>(p, g, at, here, c, kept, x[k], residual[k]);
    }
  }
}

PF_HOST_DEVICE bool octets_are_whole(const NormActForward& p, const NormActGrid& g) {
  const void* xhat = p.kept.count == 0 ? p.xhat : nullptr;
  return all_octets_are_whole(g, p.x, p.residual, p.y, xhat);
}

// Eight signs: byte `index` of the rows' bits.
struct SignPlace {
  int64_t element;
  int lanes;
};

PF_HOST_DEVICE SignPlace sign_place(const SignRows& p, int64_t index) {
  const int64_t bytes = norm_divide_up(p.length, kOctet);
  const int64_t first = index % bytes * kOctet;
  const int64_t left = p.length - first;
  return SignPlace{index / bytes * p.length + first,
                   left < kOctet ? static_cast<int>(left) : kOctet};
}

template <typename T, bool kWhole>
PF_HOST_DEVICE void pack_signs_of(const SignRows& p, int64_t index) {
  const SignPlace at = sign_place(p, index);
  float values[kOctet];
  widen_octet(load_octet<kWhole, T>(p.values, at.element, at.lanes), values);
  p.bits[index] = sign_byte_of(values, at.lanes);
}

template <bool kWhole>
PF_HOST_DEVICE void unpack_signs_of(const SignRows& p, int64_t index) {
  const SignPlace at = sign_place(p, index);
  const uint64_t bits = p.bits[index];
  uint64_t bytes = 0;
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) bytes |= (bits >> i & 1) << (8 * i);
  if constexpr (kWhole) {
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<uint64_t*>(p.positive + at.element) = bytes;
#else
    memcpy(p.positive + at.element, &bytes, sizeof(bytes));
#endif
  } else {
    for (int i = 0; i < at.lanes; ++i) {
      p.positive[at.element + i] = static_cast<uint8_t>(bytes >> (8 * i) & 1);
    }
  }
}

// As all_octets_are_whole, of values or of bytes.
PF_HOST_DEVICE bool sign_rows_are_whole(const SignRows& p) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p.values);
  return p.length % kOctet == 0 && address % 16 == 0;
}

}  // namespace petite_fast
