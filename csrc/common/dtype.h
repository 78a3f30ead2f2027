// Element types and the conversions between them. Every narrowing rounds to nearest, ties to even,
// and rounds once.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/macros.h"

namespace petite_fast {

// The codes are part of the Python interface (petite_fast/backends/native.py).
enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
constexpr int kDTypeCount = 4;

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
PF_HOST_DEVICE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

PF_HOST_DEVICE float to_float(BFloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

PF_HOST_DEVICE float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)  // one instruction that gives the same, subnormals included
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  constexpr uint32_t kInfinity = 0x7c00u << 13;
  constexpr uint32_t kSmallestNormal = 0x0400u << 13;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t rebiased = magnitude + ((127u - 15u) << 23);
  // A subnormal is read as 2^-14 * (1 + m) - 2^-14: no float subnormal appears on the way, so the
  // result does not depend on the flush-to-zero mode.
  const float shifted = bit_cast<float>(rebiased + (1u << 23)) - bit_cast<float>(113u << 23);
  const uint32_t finite = magnitude < kSmallestNormal ? bit_cast<uint32_t>(shifted) : rebiased;
  const uint32_t bits = magnitude >= kInfinity ? (magnitude | 0x7f800000u) : finite;
  return bit_cast<float>(bits | sign);
#endif
}

PF_HOST_DEVICE BFloat16 to_bfloat16(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return BFloat16{result};
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BFloat16{static_cast<uint16_t>(is_nan ? ((bits >> 16) | 0x40u) : rounded)};
#endif
}

PF_HOST_DEVICE Float16 to_float16(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return Float16{result};
#else
  constexpr uint32_t kInfinity = 255u << 23;
  constexpr uint32_t kOverflow = (127u + 16u) << 23;        // 65536
  constexpr uint32_t kSmallestNormal = (127u - 14u) << 23;  // 2^-14
  constexpr uint32_t kHalf = 126u << 23;                    // 0.5: its last bit weighs 2^-24
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  // Below 2^-14 the float addition itself rounds to the subnormal step 2^-24.
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + bit_cast<float>(kHalf)) - kHalf;
  const uint32_t normal =
      (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < kSmallestNormal ? subnormal : normal;
  const uint32_t special = magnitude > kInfinity ? 0x7e00u : 0x7c00u;
  const uint32_t result = magnitude >= kOverflow ? special : finite;
  return Float16{static_cast<uint16_t>(result | sign)};
#endif
}

// Rounds to the nearest-odd float: a second rounding, to a type at least two bits narrower, then
// gives what one direct rounding of `value` would have given.
PF_HOST_DEVICE float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  const double back = static_cast<double>(nearest);
  if (back == value || value != value) return nearest;
  uint32_t bits = bit_cast<uint32_t>(nearest);
  const bool too_far = (back < 0 ? -back : back) > (value < 0 ? -value : value);
  bits = too_far ? bits - 1 : bits;
  return bit_cast<float>(bits | 1u);
}

template <typename T>
PF_HOST_DEVICE T round_from(float value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bfloat16(value);
  } else if constexpr (std::is_same_v<T, Float16>) {
    return to_float16(value);
  } else {
    return static_cast<T>(value);
  }
}

template <typename T>
PF_HOST_DEVICE T round_from(double value) {
  if constexpr (std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>) {
    return round_from<T>(round_to_odd(value));
  } else {
    return static_cast<T>(value);
  }
}

template <typename Acc, typename T>
PF_HOST_DEVICE Acc widen(T value) {
  if constexpr (std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>) {
    return static_cast<Acc>(to_float(value));
  } else {
    return static_cast<Acc>(value);
  }
}

}  // namespace petite_fast
