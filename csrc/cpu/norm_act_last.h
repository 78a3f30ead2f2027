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

inline int64_t tile_rows(const NormActShape& s) {
  return s.norm == Norm::kLayer ? 1 : std::max<int64_t>(1, kTile / s.channels);
}

// Few channels are added up several rows at a time: longer loops, shorter sums.
constexpr int64_t kFold = 128;

inline int64_t folded_rows(const NormActShape& s) {
  return std::max<int64_t>(1, kFold / s.channels);
}

// Adds the rows to the first one.
inline void fold(const NormActShape& s, float* sums) {
  for (int64_t r = 1; r < folded_rows(s); ++r) {
    for (int64_t i = 0; i < s.channels; ++i) sums[i] += sums[r * s.channels + i];
  }
}

// kCount tiles side by side. They are no further apart than they must be: at a fixed distance of a
// whole number of pages they would fight for the same lines of the first-level cache.
template <int kCount>
class Tiles {
 public:
  explicit Tiles(const NormActShape& s) : length_(tile_rows(s) * s.channels) {}
  Tiles(const Tiles&) = delete;

  float* operator[](int i) { return memory_ + i * (length_ + 2 * kLanes) / kLanes * kLanes; }

 private:
  int64_t length_;
  alignas(64) float memory_[kCount * (kRoom + kLanes)];
};

// One number per channel, repeated, with a vector's length of zeros behind the last.
struct Repeated {
  float* values;
  operator PerElement() const { return PerElement{values}; }

  template <typename Value>
  void fill(const NormActShape& s, const Value& value) {
    const int64_t channels = s.channels, rows = tile_rows(s);
    for (int64_t c = 0; c < channels; ++c) values[c] = value(c);
    for (int64_t r = 1; r < rows; ++r) std::copy_n(values, channels, values + r * channels);
    std::fill_n(values + rows * channels, kLanes, 0.0f);
  }
};

struct Coefficients {
  Tiles<5> memory;
  Repeated weight{memory[0]}, inverse_weight{memory[1]}, bias{memory[2]};
  Repeated slope{memory[3]}, inverse_slope{memory[4]};

  Coefficients(const NormActShape& s, const NormActAffine& a, const KeptChannels& kept)
      : memory(s) {
    const auto fill = [&](Repeated& target, float ChannelValues::* member) {
      target.fill(s, [&](int64_t c) { return channel_values(a, kept, c).*member; });
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

}  // namespace
}  // namespace PF_ISA
}  // namespace petite_fast
