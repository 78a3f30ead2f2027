// One vector type per accumulation type, as wide as the instruction set being compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

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

}  // namespace PF_ISA
}  // namespace petite_fast
