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

// Phi(-|x|) = e^(-x^2 / 2) t q(t) / 2 with t = 1 / (1 + 0.4 z), z = |x| / sqrt(2): q is the minimax
// polynomial, in relative error, of erfc(z) e^(z^2) / t on t = 0.08 to 1 (5e-9, a tenth of a
// rounding). The exponential is the density's too.
static inline Gelu gelu(Vector<float> x) {
  constexpr float kSeries[] = {0.13350333f,   -0.219031531f, 0.115323226f, -0.0281660003f,
                               0.0736914844f, 0.122642257f,  0.170917316f, 0.20772566f,
                               0.225667681f,  0.225676075f};
  const Vector<float> size = x < 0.0f ? -x : x;
  const Vector<float> t = 1.0f / (size * (0.4f * 0.70710678f) + 1.0f);
  const Vector<float> e = exp_negative(x * x * -0.5f);
  Vector<float> q = Vector<float>{} - 0.0279495041f;
#pragma GCC unroll 10
  for (float factor : kSeries) q = q * t + factor;
  const Vector<float> half = t * q * 0.5f, tail = half * e;
  const Vector<float> slope = (half - size * 0.39894228f) * e;  // of -|x|; that of |x| is 1 less it
  return {x * (x < 0.0f ? tail : 1.0f - tail), x < 0.0f ? slope : 1.0f - slope};
}

}  // namespace PF_ISA
}  // namespace petite_fast
