// Random bits as a hash of (seed, index of the element): nothing is stored, any order, any number
// of threads, and the same bits on every backend.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace petite_fast {

constexpr int kRandomBlock = 256;  // elements that share two keys
constexpr int kFractionBits = 23;
constexpr uint32_t kGolden = 0x9e3779b9u;

// A bijection of 32 bits in which every input bit flips every output bit about half the time
// (lowbias32, from Wellons' hash-prospector).
PF_HOST_DEVICE uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  return h ^ (h >> 16);
}

PF_HOST_DEVICE uint32_t absorb(uint32_t h, uint32_t word) { return mix((h ^ word) + kGolden); }

// A key of the seed, made a key of the block.
PF_HOST_DEVICE uint32_t block_key(uint32_t key, int64_t block) {
  const auto index = static_cast<uint64_t>(block);
  return absorb(absorb(key, static_cast<uint32_t>(index)), static_cast<uint32_t>(index >> 32));
}

// kFractionBits random bits of one element of the block whose keys are given: `mix`, keyed twice.
PF_HOST_DEVICE int32_t random_fraction(uint32_t first, uint32_t second, uint32_t lane) {
  uint32_t h = first + lane * kGolden;
  h = ((h ^ (h >> 16)) * 0x7feb352du) ^ second;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  return static_cast<int32_t>((h ^ (h >> 16)) >> (32 - kFractionBits));
}

}  // namespace petite_fast
