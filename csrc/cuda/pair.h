// Two neighbouring channels at a time, between storage and float: one instruction each way on the
// device, the same rounding (to nearest, ties to even) on the host.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#include "common/macros.h"

namespace petite_fast {

struct Pair {
  float first, second;
};

// What two channels of a type are stored as: one access of the device.
template <typename T>
using PairBits = std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>;

template <typename T>
PF_HOST_DEVICE Pair widen_pair(PairBits<T> bits) {
  if constexpr (std::is_same_v<T, float>) {
    return bit_cast<Pair>(bits);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return {bit_cast<float>(bits << 16), bit_cast<float>(bits & 0xffff0000u)};
  } else {
#if defined(__CUDA_ARCH__)
    Pair wide;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(wide.first), "=f"(wide.second)
        : "r"(bits));
    return wide;
#else
    return {to_float(T{static_cast<uint16_t>(bits)}),
            to_float(T{static_cast<uint16_t>(bits >> 16)})};
#endif
  }
}

template <typename T>
PF_HOST_DEVICE PairBits<T> round_pair(Pair value) {
  if constexpr (std::is_same_v<T, float>) {
    return bit_cast<uint64_t>(value);
  } else {
#if defined(__CUDA_ARCH__)
    uint32_t bits;
    if constexpr (std::is_same_v<T, BFloat16>) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(value.second), "f"(value.first));
    } else {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(value.second), "f"(value.first));
    }
    return bits;
#else
    const uint32_t first = round_from<T>(value.first).bits;
    const uint32_t second = round_from<T>(value.second).bits;
    return first | second << 16;
#endif
  }
}

// `at` is a multiple of two elements.
template <typename T>
PF_HOST_DEVICE Pair load_pair(const T* at) {
#if defined(__CUDA_ARCH__)
  return widen_pair<T>(*reinterpret_cast<const PairBits<T>*>(at));
#else
  PairBits<T> bits;
  memcpy(&bits, at, sizeof(bits));
  return widen_pair<T>(bits);
#endif
}

template <typename T>
PF_HOST_DEVICE void store_pair(T* at, Pair value) {
  const PairBits<T> bits = round_pair<T>(value);
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<PairBits<T>*>(at) = bits;
#else
  memcpy(at, &bits, sizeof(bits));
#endif
}

// The same where pairs are not aligned, or only the first channel is there.
template <typename T>
PF_HOST_DEVICE void store_channels(T* at, Pair value, bool both) {
  const PairBits<T> bits = round_pair<T>(value);
  T channels[2];
  memcpy(channels, &bits, sizeof(bits));
  at[0] = channels[0];
  if (both) at[1] = channels[1];
}

PF_HOST_DEVICE void add_product(Pair& sum, Pair a, Pair b) {
  sum.first += a.first * b.first;
  sum.second += a.second * b.second;
}

}  // namespace petite_fast
