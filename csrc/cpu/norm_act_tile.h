// What norm_act does to a few thousand contiguous elements that stay in the first-level cache.
//
// Everything has internal linkage: the file is compiled once per instruction set.
//
// A coefficient is one number for the tile (Uniform) or one per element (PerElement): the channels
// of a row, repeated for every row of a tile.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/norm_act.h"
#include "cpu/bits.h"
#include "cpu/simd.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

using Floats = Vector<float>;
constexpr int kLanes = VectorOf<float>::kLanes;

struct Uniform {
  float value;
  float operator[](int64_t) const { return value; }
  Floats vector(int64_t) const { return Floats{} + value; }
};

struct PerElement {
  const float* values;
  float operator[](int64_t i) const { return values[i]; }
  Floats vector(int64_t i) const { return load_vector<float>(values + i); }
};

inline Floats load_part(const float* source, int64_t count, float fill) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? source[i] : fill;
  return load_vector<float>(lanes);
}

// The elements of a tensor from `offset` on as floats: where they are, or converted into `buffer`.
inline const float* stage(const void* data, DType dtype, int64_t offset, int64_t count,
                          float* __restrict buffer) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data) + offset;
  const BFloat16* source = static_cast<const BFloat16*>(data) + offset;
  for (int64_t i = 0; i < count; ++i) buffer[i] = to_float(source[i]);
  return buffer;
}

// Where to compute elements that `commit` then stores: in place, or in `buffer`.
inline float* target(void* data, DType dtype, int64_t offset, float* buffer) {
  return dtype == DType::kFloat32 ? static_cast<float*>(data) + offset : buffer;
}

inline void commit(const float* __restrict values, void* data, DType dtype, int64_t offset,
                   int64_t count) {
  if (dtype == DType::kFloat32) {
    float* out = static_cast<float*>(data) + offset;
    if (out != values) std::memcpy(out, values, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  BFloat16* __restrict out = static_cast<BFloat16*>(data) + offset;
  for (int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(values[i]);
}

// out = act(v); out may be v.
template <typename Affine>
void activate(const float* v, int64_t count, Affine slope, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const float below = v[i] * slope[i];
    out[i] = v[i] > 0 ? v[i] : below;
  }
}

// out = ((x - mean) * rstd) * weight + bias [+ residual]
template <typename Statistic, typename Affine>
void normalise(const float* __restrict x, const float* __restrict residual, int64_t count,
               Statistic mean, Statistic rstd, Affine weight, Affine bias, float* __restrict out) {
  if (residual == nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = ((x[i] - mean[i]) * rstd[i]) * weight[i] + bias[i];
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = ((x[i] - mean[i]) * rstd[i]) * weight[i] + bias[i] + residual[i];
    }
  }
}

// v = v where the sign is set, else slope * v.
template <typename Affine>
void apply_signs(const uint8_t* bits, int64_t count, Affine slope, float* v) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats value = load_vector<float>(v + i);
    const Floats below = value * slope.vector(i);
    const Floats chosen = sign_mask(bits, i) ? value : below;
    store_vector<float>(v + i, chosen);
  }
  for (; i < count; ++i) v[i] = sign_at(bits, i) ? v[i] : v[i] * slope[i];
}

// xhat = (n - bias [- residual]) / weight
template <typename Affine>
void invert(const float* __restrict n, const float* __restrict residual, int64_t count,
            Affine inverse_weight, Affine bias, float* __restrict xhat) {
  if (residual == nullptr) {
    for (int64_t i = 0; i < count; ++i) xhat[i] = (n[i] - bias[i]) * inverse_weight[i];
  } else {
    for (int64_t i = 0; i < count; ++i) {
      xhat[i] = (n[i] - residual[i] - bias[i]) * inverse_weight[i];
    }
  }
}

// The same for y = act(n), and grad_n from grad_y.
template <typename Affine>
void invert_activated(const float* __restrict grad_y, const float* __restrict y,
                      const float* __restrict residual, int64_t count, Affine slope,
                      Affine inverse_slope, Affine inverse_weight, Affine bias,
                      float* __restrict grad_n, float* __restrict xhat) {
  const auto step = [&](int64_t i, float shift) {
    const float below = slope[i] * grad_y[i];
    const float n = y[i] * inverse_slope[i];
    grad_n[i] = y[i] > 0 ? grad_y[i] : below;
    xhat[i] = ((y[i] > 0 ? y[i] : n) - shift) * inverse_weight[i];
  };
  if (residual == nullptr) {
    for (int64_t i = 0; i < count; ++i) step(i, bias[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) step(i, residual[i] + bias[i]);
  }
}

// out = (grad_n * weight - first - xhat * second) * rstd
template <typename Statistic, typename Affine>
void finish(const float* __restrict grad_n, const float* __restrict xhat, int64_t count,
            Affine weight, Statistic first, Statistic second, Statistic rstd,
            float* __restrict out) {
  if (xhat == nullptr) {
    for (int64_t i = 0; i < count; ++i) out[i] = grad_n[i] * weight[i] * rstd[i];
  } else {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = (grad_n[i] * weight[i] - first[i] - xhat[i] * second[i]) * rstd[i];
    }
  }
}

// Sums run in four vectors, which hides the latency of an addition.
constexpr int kWays = 4;

inline float sum(const float* v, int64_t count) {
  Floats sums[kWays] = {};
  int64_t i = 0;
  for (; i + kWays * kLanes <= count; i += kWays * kLanes) {
    for (int k = 0; k < kWays; ++k) sums[k] += load_vector<float>(v + i + k * kLanes);
  }
  for (; i + kLanes <= count; i += kLanes) sums[0] += load_vector<float>(v + i);
  if (i < count) sums[1] += load_part(v + i, count - i, 0);
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

struct Sums {
  double first = 0;   // of a * weight
  double second = 0;  // of a * weight * b
};

// b may be null: then only the first sum. A weight per element has a vector's length of zeros
// behind its last one.
template <typename Affine>
Sums sum_products(const float* a, Affine weight, const float* b, int64_t count) {
  Floats plain{}, product{}, plain_odd{}, product_odd{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Floats even = load_vector<float>(a + i) * weight.vector(i);
    const Floats odd = load_vector<float>(a + i + kLanes) * weight.vector(i + kLanes);
    plain += even;
    plain_odd += odd;
    if (b == nullptr) continue;
    product += even * load_vector<float>(b + i);
    product_odd += odd * load_vector<float>(b + i + kLanes);
  }
  for (; i < count; i += kLanes) {
    const Floats part = load_part(a + i, count - i, 0) * weight.vector(i);
    plain += part;
    if (b != nullptr) product += part * load_part(b + i, count - i, 0);
  }
  return Sums{sum_lanes(plain + plain_odd), sum_lanes(product + product_odd)};
}

// Sums of v - centre and of its square.
inline Sums sums_about(const float* v, int64_t count, float centre) {
  Floats sums[kWays / 2] = {}, squares[kWays / 2] = {};
  const auto add = [&](int way, Floats values) {
    values -= centre;
    sums[way] += values;
    squares[way] += values * values;
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    add(0, load_vector<float>(v + i));
    add(1, load_vector<float>(v + i + kLanes));
  }
  for (; i < count; i += kLanes) add(0, load_part(v + i, count - i, centre));
  return Sums{sum_lanes(sums[0] + sums[1]), sum_lanes(squares[0] + squares[1])};
}

// Two passes over a tile; the second corrects the mean of the first, whose sum was rounded.
inline Moments tile_moments(const float* v, int64_t count) {
  constexpr int64_t kPiece = 1024;  // elements added up in float
  const double n = static_cast<double>(count);
  const float centre = sum(v, count) / static_cast<float>(count);
  Sums total;
  for (int64_t i = 0; i < count; i += kPiece) {
    const Sums sums = sums_about(v + i, count - i < kPiece ? count - i : kPiece, centre);
    total.first += sums.first;
    total.second += sums.second;
  }
  return Moments{n, static_cast<double>(centre) + total.first / n,
                 total.second - total.first * total.first / n};
}

}  // namespace
}  // namespace PF_ISA
}  // namespace petite_fast
