// Dropout whose mask is a hash of the seed, made again wherever it is wanted.
//
//   y = x / (1 - p) where u >= p, else 0        u uniform on [0, 1)
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"
#include "common/random.h"

namespace petite_fast {

struct DropoutParams {
  const void* x;  // `count` elements of dtype, in memory order
  void* y;        // may be x
  DType dtype;    // not kFloat64
  int64_t count;
  int32_t threshold;  // p in units of 2^-kFractionBits
  float scale;        // 1 / (1 - p)
  uint32_t keys[2];
};

PF_HOST_DEVICE float dropped(float x, int32_t fraction, int32_t threshold, float scale) {
  return fraction >= threshold ? x * scale : 0.0f;
}

}  // namespace petite_fast
