// Signs as bits on the CPU: bit i of byte j says whether element 8 j + i is positive.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace petite_fast {
namespace PF_ISA {

// The signs of eight elements.
static inline uint8_t sign_byte(const float* v) {
#if defined(__AVX2__)
  return static_cast<uint8_t>(
      _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(v), _mm256_setzero_ps(), _CMP_GT_OQ)));
#elif defined(__SSE2__)
  const int low = _mm_movemask_ps(_mm_cmpgt_ps(_mm_loadu_ps(v), _mm_setzero_ps()));
  const int high = _mm_movemask_ps(_mm_cmpgt_ps(_mm_loadu_ps(v + 4), _mm_setzero_ps()));
  return static_cast<uint8_t>(low | (high << 4));
#else
  int byte = 0;
  for (int i = 0; i < 8; ++i) byte |= (v[i] > 0) << i;
  return static_cast<uint8_t>(byte);
#endif
}

// `count` signs into whole bytes; the last one is filled with zeros.
static inline void pack_row(const float* v, int64_t count, uint8_t* bits) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) bits[i / 8] = sign_byte(v + i);
  if (i == count) return;
  float rest[8] = {};
  std::memcpy(rest, v + i, static_cast<size_t>(count - i) * sizeof(float));
  bits[i / 8] = sign_byte(rest);
}

// Where bit i is set: all ones, as a comparison of floats gives; `first` is a multiple of the
// lanes.
static inline auto sign_mask(const uint8_t* bits, int64_t first) {
  constexpr int kLanes = VectorOf<float>::kLanes;
  typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
  int32_t word = bits[first / 8];
  if constexpr (kLanes == 16) word |= bits[first / 8 + 1] << 8;
  if constexpr (kLanes == 4) word >>= first % 8;
  Ints each;
  for (int i = 0; i < kLanes; ++i) each[i] = 1 << i;
  return (each & word) != 0;
}

static inline bool sign_at(const uint8_t* bits, int64_t i) { return (bits[i / 8] >> (i % 8)) & 1; }

}  // namespace PF_ISA
}  // namespace petite_fast
