// How the CUDA norm_act cuts a tensor, and how a thread reads and writes its piece.
//
// A sample is rows of columns: voxels of channels. One thread owns eight neighbouring columns, an
// octet, in every rows_per_step-th row of its block's unit of rows; so what belongs to a channel
// stays in its registers, neighbouring threads touch neighbouring memory, an octet of 16-bit
// elements is one access of 16 bytes (of floats, two), and its signs are one byte. A tensor of one
// channel has rows of eight voxels, the last one shorter; all columns are then of channel 0.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#include "common/macros.h"
#include "common/norm_act.h"

namespace petite_fast {

constexpr int kOctet = 8;
constexpr int kNormThreads = 256;
constexpr int64_t kNormSteps = 8;      // a block makes at least so many, where there are as many
constexpr int64_t kNormBlocks = 2048;  // and there are about so many blocks at most

struct NormActGrid {
  int64_t sample;   // elements
  int64_t rows;     // of a sample
  int64_t columns;  // of a row
  int64_t octets;   // of a row
  int64_t width;    // octets of a row that a block has
  int64_t chunks;   // blocks that share a row
  int64_t units;    // of rows, per sample
  int64_t unit_rows;
  int64_t rows_per_step;
};

PF_HOST_DEVICE NormActGrid norm_act_grid(const NormActShape& s, int threads) {
  NormActGrid g;
  g.sample = s.channels * s.inner;
  g.columns = s.channels_last ? s.channels : kOctet;
  g.rows = norm_divide_up(g.sample, g.columns);
  g.octets = norm_divide_up(g.columns, kOctet);
  g.width = g.octets < threads ? g.octets : threads;
  g.chunks = norm_divide_up(g.octets, g.width);
  g.rows_per_step = threads / g.width;
  const int64_t steps = norm_divide_up(g.rows, g.rows_per_step);
  const int64_t enough = norm_divide_up(kNormBlocks, s.outer * g.chunks);
  const int64_t wanted = norm_divide_up(steps, kNormSteps);
  g.unit_rows = norm_divide_up(steps, wanted < enough ? wanted : enough) * g.rows_per_step;
  g.units = norm_divide_up(g.rows, g.unit_rows);
  return g;
}

PF_HOST_DEVICE int64_t block_count(const NormActShape& s, const NormActGrid& g) {
  return s.outer * g.units * g.chunks;
}

// Where a thread works: octet `octet` of the rows row, row + rows_per_step, ... before `end`.
struct OctetPlace {
  int64_t sample;
  int64_t unit;  // of the whole tensor
  int64_t octet;
  int64_t row;
  int64_t end;
};

PF_HOST_DEVICE OctetPlace place_of(const NormActGrid& g, int64_t block, int thread) {
  OctetPlace at;
  at.unit = block / g.chunks;
  at.sample = at.unit / g.units;
  at.octet = block % g.chunks * g.width + thread % g.width;
  const int64_t first = at.unit % g.units * g.unit_rows;
  at.row = first + thread / g.width;
  at.end = first + g.unit_rows < g.rows ? first + g.unit_rows : g.rows;
  const bool idle = thread >= g.width * g.rows_per_step || at.octet >= g.octets;
  if (idle || at.row > at.end) at.row = at.end;
  return at;
}

// Lanes of an octet that are there; they come first.
PF_HOST_DEVICE int lanes_at(const NormActGrid& g, int64_t octet, int64_t row) {
  const int64_t in_row = g.columns - octet * kOctet;
  const int64_t in_sample = g.sample - row * g.columns - octet * kOctet;
  const int64_t lanes = in_row < in_sample ? in_row : in_sample;
  return lanes < kOctet ? static_cast<int>(lanes) : kOctet;
}

PF_HOST_DEVICE int64_t element_at(const NormActGrid& g, const OctetPlace& at, int64_t row) {
  return at.sample * g.sample + row * g.columns + at.octet * kOctet;
}

PF_HOST_DEVICE int64_t sign_index(const NormActGrid& g, const OctetPlace& at, int64_t row) {
  return (at.sample * g.rows + row) * g.octets + at.octet;
}

PF_HOST_DEVICE int64_t channel_at(const NormActShape& s, int64_t column) {
  return s.channels_last ? column : 0;
}

// Whether every octet is whole and starts at a multiple of 16 bytes; absent tensors are null.
template <typename... Pointers>
PF_HOST_DEVICE bool all_octets_are_whole(const NormActGrid& g, Pointers... tensors) {
  const uintptr_t addresses = (reinterpret_cast<uintptr_t>(tensors) | ...);
  return addresses % 16 == 0 && g.columns % kOctet == 0 && g.sample % kOctet == 0;
}

// body(a tag with the element type, whether octets are whole as a type), chosen at run time.
template <typename T>
struct Element {
  using Type = T;
};

template <typename Body>
static inline void with_element(DType dtype, bool whole, const Body& body) {
  const auto with = [&](auto element) {
    if (whole) {
      body(element, std::true_type{});
    } else {
      body(element, std::false_type{});
    }
  };
  switch (dtype) {
    case DType::kFloat32:
      return with(Element<float>{});
    case DType::kBFloat16:
      return with(Element<BFloat16>{});
    case DType::kFloat16:
      return with(Element<Float16>{});
    case DType::kFloat64:
      return;  // refused by whoever fills the shape
  }
}

// Eight elements as they are in memory.
template <typename T>
struct alignas(16) Octet {
  T lane[kOctet];
};

#if defined(__CUDA_ARCH__)
template <typename T>
__device__ __forceinline__ void copy_whole(const void* source, void* target) {
  PF_UNROLL
  for (int i = 0; i < static_cast<int>(sizeof(Octet<T>) / 16); ++i) {
    static_cast<uint4*>(target)[i] = static_cast<const uint4*>(source)[i];
  }
}

// In PTX: left to itself the compiler splits the store of 16-bit lanes into words.
template <typename T>
__device__ __forceinline__ void store_whole(const Octet<T>& octet, void* target) {
  uint32_t word[sizeof(Octet<T>) / 4];
  PF_UNROLL
  for (int i = 0; i < static_cast<int>(sizeof(Octet<T>) / 4); ++i) {
    if constexpr (sizeof(T) == 4) {
      word[i] = bit_cast<uint32_t>(octet.lane[i]);
    } else {
      const uint32_t high = octet.lane[2 * i + 1].bits;
      word[i] = octet.lane[2 * i].bits | high << 16;
    }
  }
  PF_UNROLL
  for (int i = 0; i < static_cast<int>(sizeof(Octet<T>) / 16); ++i) {
    const size_t address = __cvta_generic_to_global(static_cast<uint4*>(target) + i);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(word[4 * i]),
                 "r"(word[4 * i + 1]), "r"(word[4 * i + 2]), "r"(word[4 * i + 3])
                 : "memory");
  }
}
#else
template <typename T>
static inline void store_whole(const Octet<T>& octet, void* target) {
  memcpy(target, &octet, sizeof(octet));
}

template <typename T>
static inline void copy_whole(const void* source, void* target) {
  memcpy(target, source, sizeof(Octet<T>));
}
#endif

// kWhole: see all_octets_are_whole; else the lanes that are there, one by one.
template <bool kWhole, typename T>
PF_HOST_DEVICE Octet<T> load_octet(const void* data, int64_t element, int lanes) {
  Octet<T> octet{};
  const T* source = static_cast<const T*>(data) + element;
  if constexpr (kWhole) {
    copy_whole<T>(source, &octet);
  } else {
    PF_UNROLL
    for (int i = 0; i < kOctet; ++i) {
      if (i < lanes) octet.lane[i] = source[i];
    }
  }
  return octet;
}

template <bool kWhole, typename T>
PF_HOST_DEVICE void store_octet(const float* values, void* data, int64_t element, int lanes) {
  T* target = static_cast<T*>(data) + element;
  Octet<T> octet;
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) octet.lane[i] = round_from<T>(values[i]);
  if constexpr (kWhole) {
    store_whole(octet, target);
  } else {
    PF_UNROLL
    for (int i = 0; i < kOctet; ++i) {
      if (i < lanes) target[i] = octet.lane[i];
    }
  }
}

template <typename T>
PF_HOST_DEVICE void widen_octet(const Octet<T>& octet, float* values) {
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) values[i] = widen<float>(octet.lane[i]);
}

// Bit i says whether lane i is there and positive.
PF_HOST_DEVICE uint8_t sign_byte_of(const float* values, int lanes) {
  int byte = 0;
  PF_UNROLL
  for (int i = 0; i < kOctet; ++i) byte |= (i < lanes && values[i] > 0) << i;
  return static_cast<uint8_t>(byte);
}

PF_HOST_DEVICE float bend(bool positive, float value, float slope) {
  const float below = value * slope;
  return positive ? value : below;
}

// The channels of the octet whose xhat is kept beside y: those whose bit is set in `lanes`, one
// after the other from `slot` on.
struct KeptLanes {
  int64_t slot;
  int lanes;
};

PF_HOST_DEVICE KeptLanes kept_lanes(const KeptChannels& kept, const OctetPlace& at) {
  const int64_t first = at.octet * kOctet;
  KeptLanes k{kept_before(kept, first), 0};
  for (int64_t i = k.slot; i < kept.count && kept.index[i] < first + kOctet; ++i) {
    k.lanes |= 1 << (kept.index[i] - first);
  }
  return k;
}

// The columns and samples that one statistic, or one gradient of a parameter, runs over.
struct NormActSet {
  int64_t first_sample;
  int64_t samples;
  int64_t first_column;
  int64_t columns;
};

PF_HOST_DEVICE NormActSet channel_set(const NormActShape& s, const NormActGrid& g,
                                      int64_t channel) {
  const int64_t columns = g.columns / s.channels;
  return NormActSet{0, s.outer, channel * columns, columns};
}

PF_HOST_DEVICE NormActSet statistic_set(const NormActShape& s, const NormActGrid& g,
                                        int64_t statistic) {
  if (s.norm != Norm::kGroup) return channel_set(s, g, statistic);
  const int64_t columns = g.columns / s.groups;
  return NormActSet{statistic / s.groups, 1, statistic % s.groups * columns, columns};
}

PF_HOST_DEVICE int64_t statistic_of(const NormActShape& s, int64_t sample, int64_t channel) {
  return s.norm == Norm::kGroup ? sample * s.groups + channel / (s.channels / s.groups) : channel;
}

// A column of one unit of a set: its index in the tensor's [units, columns].
PF_HOST_DEVICE int64_t partial_count(const NormActGrid& g, const NormActSet& set) {
  return set.samples * g.units * set.columns;
}

PF_HOST_DEVICE int64_t partial_at(const NormActGrid& g, const NormActSet& set, int64_t i) {
  const int64_t unit = set.first_sample * g.units + i / set.columns;
  return unit * g.columns + set.first_column + i % set.columns;
}

// Doubles that a call works on: three per column of a unit, and two per statistic.
PF_HOST_DEVICE int64_t norm_act_cuda_workspace(const NormActShape& s, const NormActGrid& g) {
  return 3 * s.outer * g.units * g.columns + 2 * statistics_count(s);
}

// Folds the threads of a block that share a column onto the first of them, between barriers: values
// are [kOctet][threads]; of `rows` rows of threads the second half is added to the first.
template <typename Value>
PF_HOST_DEVICE void fold_rows(const NormActGrid& g, int rows, int thread, int threads,
                              Value* shared) {
  const int width = static_cast<int>(g.width);
  const int half = (rows + 1) / 2;
  const int pairs = (rows - half) * width;
  for (int i = thread; i < pairs * kOctet; i += threads) {
    Value* mine = shared + i / pairs * threads + i % pairs;
    merge(mine[0], mine[half * width]);
  }
}

// The same for one value per thread.
template <typename Value>
PF_HOST_DEVICE void fold_threads(int count, int thread, Value* shared) {
  const int half = (count + 1) / 2;
  if (thread < count - half) merge(shared[thread], shared[thread + half]);
}

}  // namespace petite_fast
