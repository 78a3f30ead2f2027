// One vector type per accumulation type, as wide as the instruction set being compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

namespace petite_fast {
namespace PF_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

template <typename Acc>
struct VectorOf {
  typedef Acc type __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Acc));
};

template <typename Acc>
using Vector = typename VectorOf<Acc>::type;

// Consecutive elements of type T, widened; no alignment is asked for.
template <typename Acc, typename T>
static inline Vector<Acc> load_vector(const T* source) {
  Vector<Acc> result;
  if constexpr (std::is_same_v<T, Acc>) {
    std::memcpy(&result, source, sizeof(result));
  } else {
    Acc lanes[VectorOf<Acc>::kLanes];
    for (int i = 0; i < VectorOf<Acc>::kLanes; ++i) lanes[i] = widen<Acc>(source[i]);
    std::memcpy(&result, lanes, sizeof(result));
  }
  return result;
}

template <typename Acc>
static inline void store_vector(Acc* target, Vector<Acc> value) {
  std::memcpy(target, &value, sizeof(value));
}

// In registers, half by half.
static inline float sum_lanes(Vector<float> v) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
#else
  const __m128 quarter = v;
#endif
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
#else
  float sum = 0;
  for (int i = 0; i < VectorOf<float>::kLanes; ++i) sum += v[i];
  return sum;
#endif
}

}  // namespace PF_ISA
}  // namespace petite_fast
