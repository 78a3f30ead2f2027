// What the forward and the backward of norm_act share where channels are last.
//
// A tile is as many rows as make some 2000 elements; what belongs to a channel is repeated for
// every row of the tile, so that the loops of norm_act_tile.h run over the tile as over one long
// row.
#pragma once

#include <algorithm>

#include "cpu/norm_act_tile.h"
#include "cpu/parallel.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

constexpr int64_t kTile = 2048;
constexpr int64_t kRoom = kNormMaxChannels + kLanes;

// One number per channel, repeated, with a vector's length of zeros behind the last.
struct Repeated {
  alignas(64) float values[kRoom];
  operator PerElement() const { return PerElement{values}; }

  template <typename Value>
  void fill(int64_t channels, int64_t rows, const Value& value) {
    for (int64_t c = 0; c < channels; ++c) values[c] = value(c);
    for (int64_t r = 1; r < rows; ++r) std::copy_n(values, channels, values + r * channels);
    std::fill_n(values + rows * channels, kLanes, 0.0f);
  }
};

inline int64_t tile_rows(const NormActShape& s) {
  return s.norm == Norm::kLayer ? 1 : std::max<int64_t>(1, kTile / s.channels);
}

struct Coefficients {
  Repeated weight, inverse_weight, bias, slope, inverse_slope;

  Coefficients(const NormActShape& s, const NormActAffine& a, const KeptChannels& kept) {
    const auto fill = [&](Repeated& target, float ChannelValues::* member) {
      target.fill(s.channels, tile_rows(s),
                  [&](int64_t c) { return ChannelValues(a, kept, c).*member; });
    };
    fill(weight, &ChannelValues::weight);
    fill(inverse_weight, &ChannelValues::inverse_weight);
    fill(bias, &ChannelValues::bias);
    fill(slope, &ChannelValues::slope);
    fill(inverse_slope, &ChannelValues::inverse_slope);
  }
};

// Rows [begin, end) of the whole tensor that a unit is.
struct UnitRows {
  int64_t sample;
  int64_t begin;
  int64_t end;

  UnitRows(const NormActShape& s, int64_t index) {
    const int64_t units = unit_count(s);
    sample = index / units;
    const int64_t first = index % units * last_unit_rows(s);
    begin = sample * s.inner + first;
    end = sample * s.inner + std::min(s.inner, first + last_unit_rows(s));
  }
};

// body(state, unit) for every unit; each thread makes a state of its own.
template <typename MakeState, typename Body>
void over_units(const NormActShape& s, int threads, const MakeState& make_state, const Body& body) {
  const int64_t units = s.outer * unit_count(s);
  parallel_for(units, 1, threads, [&](int64_t begin, int64_t end) {
    auto state = make_state();
    for (int64_t i = begin; i < end; ++i) body(state, i);
  });
}

// What belongs to the columns of the sample that a thread is at.
struct ColumnStatistics {
  Coefficients coefficients;
  Repeated mean, rstd, first, second;
  int64_t sample = -1;

  ColumnStatistics(const NormActShape& s, const NormActAffine& a, const KeptChannels& kept)
      : coefficients(s, a, kept) {}
};

}  // namespace
}  // namespace PF_ISA
}  // namespace petite_fast
