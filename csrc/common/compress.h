// 8-bit storage of float tensors in blocks of 256 consecutive elements, with stochastic rounding.
//
//   scale = max |x| of the block        code = floor(127 x / scale + u), u uniform on [0, 1)
//   x ~ code / 127 * scale              E[code / 127 * scale] = x
//
// The codes are integer arithmetic after one product per element, so that every backend makes the
// same bits. The random bits are a hash of (seed, index of the element); nothing is stored.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"
#include "common/random.h"

namespace petite_fast {

constexpr int kCompressBlock = kRandomBlock;
constexpr int kLevels = 127;  // codes are -kLevels..kLevels
// A code is computed with kFractionBits fraction bits; kLevels + 1 of them still fit an int32.
constexpr float kFixedPoint = static_cast<float>(kLevels) * (1 << kFractionBits);
constexpr float kLevelSize = 1.0f / kLevels;
// Blocks smaller than kSmall are lifted first (exactly): kFixedPoint / scale would overflow.
constexpr float kSmall = 0x1p-60f;
constexpr float kLift = 0x1p64f;
constexpr uint32_t kNonFinite = 0x7f800000u;
constexpr uint32_t kQuietNaN = 0x7fc00000u;

struct QuantiseParams {
  const void* values;  // `count` elements of dtype, in memory order
  DType dtype;         // not kFloat64
  int64_t count;
  int8_t* codes;  // whole blocks; zeros behind the last element
  float* scales;  // one per block
  uint32_t keys[2];
};

struct DequantiseParams {
  const int8_t* codes;
  const float* scales;
  void* values;
  DType dtype;
  int64_t count;
};

PF_HOST_DEVICE int64_t block_count(int64_t count) {
  return (count + kCompressBlock - 1) / kCompressBlock;
}

// How a block of largest magnitude `bits` (a float's bits without the sign, so that a NaN is above
// infinity and both are above all numbers) is coded.
struct BlockScale {
  float lift;    // multiplies the values first
  float factor;  // then gives fixed-point codes; 0: all codes are 0
  float stored;  // NaN for a block with an infinity or a NaN: all of it comes back as NaN
};

PF_HOST_DEVICE BlockScale block_scale(uint32_t bits) {
  if (bits >= kNonFinite) return {1.0f, 0.0f, bit_cast<float>(kQuietNaN)};
  const float largest = bit_cast<float>(bits);
  const float lift = largest < kSmall ? kLift : 1.0f;
  const float lifted = largest * lift;
  // Also 0 for a denormal where the processor takes those for zeros.
  return {lift, lifted > 0.0f ? kFixedPoint / lifted : 0.0f, largest};
}

PF_HOST_DEVICE int8_t code_of(float fixed_point, int32_t fraction) {
  const int32_t code = (static_cast<int32_t>(fixed_point) + fraction) >> kFractionBits;
  // The factor is rounded: the largest value may come out a hair beyond its own level.
  return static_cast<int8_t>(code > kLevels ? kLevels : code < -kLevels ? -kLevels : code);
}

PF_HOST_DEVICE float value_of(int8_t code, float scale) {
  return static_cast<float>(code) * kLevelSize * scale;
}

}  // namespace petite_fast
