// GELU and its derivative on vectors: x Phi(x), Phi the normal distribution function.
#pragma once

#include "cpu/simd.h"

namespace petite_fast {
namespace PF_ISA {

typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));

// e^x for x <= 0: 2^n e^f with n = round(x / ln 2), |f| <= ln(2) / 2, e^f by its series to f^7
// (error 1e-9); 0 below -87, where the result would be subnormal. NaN stays NaN.
static inline Vector<float> exp_negative(Vector<float> x) {
  const IntVec small = x < -87.0f;
  const Vector<float> kept = small ? Vector<float>{} : x;
  constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector<float> shifted = kept * 1.44269504f + kRounding;
  const Vector<float> n = shifted - kRounding;
  const Vector<float> f = (kept - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Vector<float> e = f * 1.98412698e-4f + 1.38888889e-3f;
  e = e * f + 8.33333333e-3f;
  e = e * f + 4.16666667e-2f;
  e = e * f + 1.66666667e-1f;
  e = e * f + 0.5f;
  e = e * f + 1.0f;
  e = e * f + 1.0f;
  const IntVec power = (reinterpret_cast<IntVec>(shifted) << 23) + (127 << 23);
  const Vector<float> result = e * reinterpret_cast<Vector<float>>(power);
  return small ? Vector<float>{} : result;
}

struct Gelu {
  Vector<float> value, slope;
};

// Phi(-|x|) is half of erfc(z), z = |x| / sqrt(2): t exp(-z^2 + p(t)), t = 1 / (1 + z / 2), with
// the polynomial of Numerical Recipes' erfcc (relative error 1.2e-7 everywhere).
static inline Gelu gelu(Vector<float> x) {
  constexpr float kSeries[] = {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f,
                               0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
  const Vector<float> z = (x < 0.0f ? -x : x) * 0.70710678f;
  const Vector<float> t = 1.0f / (z * 0.5f + 1.0f), square = z * z;
  Vector<float> p = Vector<float>{} + 0.17087277f;
#pragma GCC unroll 9
  for (float factor : kSeries) p = p * t + factor;
  const Vector<float> tail = t * 0.5f * exp_negative(p - square);
  const Vector<float> below = x < 0.0f ? tail : 1.0f - tail;
  return {x * below, below + x * exp_negative(-square) * 0.39894228f};
}

}  // namespace PF_ISA
}  // namespace petite_fast
