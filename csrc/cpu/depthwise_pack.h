// How depthwise kernels see a volume: a lane per channel, so that a voxel is one vector and a tap
// is a constant distance. Rows are copied into that form, widened to float, and copied back.
//
// Everything has internal linkage: the file is compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/depthwise.h"
#include "cpu/simd.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

using Floats = Vector<float>;
constexpr int kLanes = VectorOf<float>::kLanes;
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef int32_t Signed __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

inline Floats load(const float* source) { return load_vector<float>(source); }

inline Floats load(const BFloat16* source) {
  Halves bits;
  std::memcpy(&bits, source, sizeof(bits));
  return bit_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
}

inline void store(float* target, Floats value) { store_vector(target, value); }

// As to_bfloat16.
inline void store(BFloat16* target, Floats value) {
  const Words bits = bit_cast<Words>(value);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Signed magnitude = bit_cast<Signed>(bits & 0x7fffffffu);
  const Words is_nan = bit_cast<Words>(magnitude > 0x7f800000);
  const Words word = (is_nan & ((bits >> 16) | 0x40u)) | (~is_nan & rounded);
  const Halves halves = __builtin_convertvector(word, Halves);
  std::memcpy(target, &halves, sizeof(halves));
}

template <typename T>
inline Floats load_part(const T* source, int64_t count) {
  if (count >= kLanes) return load(source);
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = source[i];
  return load(lanes);
}

template <typename T>
inline void store_part(T* target, Floats value, int64_t count) {
  if (count >= kLanes) return store(target, value);
  T lanes[kLanes];
  store(lanes, value);
  for (int64_t i = 0; i < count; ++i) target[i] = lanes[i];
}

#if defined(__AVX512F__)
constexpr Signed kInterleaveLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
#elif defined(__AVX2__)
constexpr Signed kInterleaveLow = {0, 8, 1, 9, 2, 10, 3, 11};
#else
constexpr Signed kInterleaveLow = {0, 4, 1, 5};
#endif
constexpr Signed kInterleaveHigh = kInterleaveLow + kLanes / 2;

// kLanes vectors as a square matrix; log2(kLanes) perfect shuffles transpose it.
inline void transpose(Floats (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    Floats next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], kInterleaveLow);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], kInterleaveHigh);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// Channels that are handled together: up to kMostBlocks * kLanes of one sample (channels last,
// where they are neighbours in memory), or kLanes of the N * C volumes.
struct LaneGroup {
  int64_t sample;   // channels last
  int64_t channel;  // the first; not channels last: of N * C
  int64_t lanes;    // in use
  int64_t blocks() const { return (lanes + kLanes - 1) / kLanes; }
};

struct LaneGroups {
  static constexpr int64_t kMostBlocks = 4;
  int64_t lanes;  // of a group
  int64_t per_sample;
  int64_t count;
  int64_t rows;

  // Where the depth is too small to be shared by the threads, the groups are.
  LaneGroups(const DepthwiseShape& s, int64_t depth, int threads) {
    rows = s.channels_last ? s.channels : s.samples * s.channels;
    const int64_t samples = s.channels_last ? s.samples : 1;
    const int64_t all = (rows + kLanes - 1) / kLanes;
    int64_t blocks = s.channels_last ? std::min(all, kMostBlocks) : 1;
    while (blocks > 1 && samples * ((all + blocks - 1) / blocks) < threads && depth < 16) --blocks;
    lanes = blocks * kLanes;
    per_sample = (rows + lanes - 1) / lanes;
    count = per_sample * samples;
  }

  int64_t blocks() const { return lanes / kLanes; }

  LaneGroup operator[](int64_t index) const {
    const int64_t channel = index % per_sample * lanes;
    return {index / per_sample, channel, std::min<int64_t>(lanes, rows - channel)};
  }
};

// Voxels in the order of memory, as rows of `width` at a distance of `pitch` vectors.
struct Rows {
  float* at;  // the first voxel
  int64_t width;
  int64_t pitch;
  int64_t next_block;  // floats from a block of lanes to the same voxel of the next
};

class RowCursor {
 public:
  explicit RowCursor(const Rows& rows) : rows_(rows), at_(rows.at), left_(rows.width) {}

  float* next() {
    float* here = at_;
    at_ += kLanes;
    if (--left_ == 0) {
      at_ += (rows_.pitch - rows_.width) * kLanes;
      left_ = rows_.width;
    }
    return here;
  }

 private:
  const Rows& rows_;
  float* at_;
  int64_t left_;
};

// A dense volume, seen through a group of lanes.
template <typename T>
struct Volume {
  T* data;
  int64_t voxels;    // of one channel
  int64_t channels;  // distance between voxels when channels are last
  bool channels_last;

  T* of(const LaneGroup& group) const {
    return data + (channels_last ? group.sample * voxels * channels + group.channel
                                 : group.channel * voxels);
  }
};

// `count` voxels from number `first` on into `rows`; lanes that are not in use become zero.
template <typename T>
void pack(const Volume<const T>& volume, const LaneGroup& group, int64_t first, int64_t count,
          const Rows& rows) {
  RowCursor cursor(rows);
  const T* source = volume.of(group);
  if (volume.channels_last) {
    source += first * volume.channels;
    for (int64_t i = 0; i < count; ++i, source += volume.channels) {
      float* at = cursor.next();
      int64_t l = 0;
      for (; l + kLanes <= group.lanes; l += kLanes, at += rows.next_block) {
        store(at, load(source + l));
      }
      if (l < group.lanes) store(at, load_part(source + l, group.lanes - l));
    }
    return;
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t here = std::min<int64_t>(kLanes, count - i);
    const T* at = source + first + i;
    Floats tile[kLanes];
    if (here == kLanes && group.lanes == kLanes) {
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) tile[l] = load(at + l * volume.voxels);
    } else {
      for (int l = 0; l < kLanes; ++l) {
        tile[l] = l < group.lanes ? load_part(at + l * volume.voxels, here) : Floats{};
      }
    }
    transpose(tile);
    for (int64_t v = 0; v < here; ++v) store(cursor.next(), tile[v]);
  }
}

// The way back.
template <typename T>
void unpack(const Rows& rows, int64_t first, int64_t count, const Volume<T>& volume,
            const LaneGroup& group) {
  RowCursor cursor(rows);
  T* target = volume.of(group);
  if (volume.channels_last) {
    target += first * volume.channels;
    for (int64_t i = 0; i < count; ++i, target += volume.channels) {
      const float* at = cursor.next();
      int64_t l = 0;
      for (; l + kLanes <= group.lanes; l += kLanes, at += rows.next_block) {
        store(target + l, load(at));
      }
      if (l < group.lanes) store_part(target + l, load(at), group.lanes - l);
    }
    return;
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t here = std::min<int64_t>(kLanes, count - i);
    T* at = target + first + i;
    Floats tile[kLanes] = {};
    for (int64_t v = 0; v < here; ++v) tile[v] = load(cursor.next());
    transpose(tile);
    if (here == kLanes && group.lanes == kLanes) {
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) store(at + l * volume.voxels, tile[l]);
    } else {
      for (int64_t l = 0; l < group.lanes; ++l) store_part(at + l * volume.voxels, tile[l], here);
    }
  }
}

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Zeroed floats on a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(new float[floats + kLine]) {
    std::memset(memory_, 0, (floats + kLine) * sizeof(float));
    const auto address = reinterpret_cast<uintptr_t>(memory_);
    at_ = memory_ + (round_up(address, 64) - address) / sizeof(float);
  }
  ~Scratch() { delete[] memory_; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* at() const { return at_; }

 private:
  static constexpr int64_t kLine = 16;
  float* memory_;
  float* at_;
};

// Three planes of the source that slide along the depth, of every block of lanes: plane i lies in
// slot i % 3.
struct Ring {
  float* at;
  int64_t pitch;  // vectors in a row
  int64_t rows;   // in a plane: the band that the unit needs
  int64_t low;    // zero vectors in front of each row
  int64_t first;  // the row of the volume that row 0 holds

  static constexpr int64_t kSlots = 3;
  float* row(int64_t plane, int64_t row) const {
    return at + ((plane % kSlots * rows + row - first) * pitch) * kLanes;
  }
  int64_t floats() const { return kSlots * rows * pitch * kLanes; }
};

// Independent pieces of work: a group of lanes, a range of target planes, a band of target rows.
struct Unit {
  LaneGroup group;
  int64_t depth[2];
  int64_t height[2];
};

struct Units {
  static constexpr int64_t kRingFloats = 128 * 1024;  // half of the second-level cache
  static constexpr int64_t kFewestPlanes = 4;         // a range reads up to two planes more
  int64_t depth, height;
  LaneGroups groups;
  int64_t chunks, bands, count;

  // `row_floats`: of a row in the ring.
  Units(const DepthwiseShape& s, bool adjoint, int64_t row_floats, int threads)
      : depth(target_size(s.axis[0], adjoint)),
        height(target_size(s.axis[1], adjoint)),
        groups(s, depth, threads) {
    const int64_t plane = groups.blocks() * row_floats * source_size(s.axis[1], adjoint);
    bands = std::min((Ring::kSlots * plane + kRingFloats - 1) / kRingFloats, height);
    chunks = 1;
    // Even shares: a multiple of the threads, or many.
    const int64_t units = groups.count * bands;
    while ((chunks + 1) * kFewestPlanes <= depth && units * chunks < 4 * threads &&
           units * chunks % threads != 0) {
      ++chunks;
    }
    count = units * chunks;
  }

  Unit operator[](int64_t index) const {
    const int64_t band = index % bands, chunk = index / bands % chunks;
    return {groups[index / (bands * chunks)],
            {depth * chunk / chunks, depth * (chunk + 1) / chunks},
            {height * band / bands, height * (band + 1) / bands}};
  }

  int64_t most_source_rows(const DepthwiseAxis& h, bool adjoint) const {
    const int64_t rows = (height + bands - 1) / bands;
    const int64_t reach = adjoint ? (rows - 1 + kDepthwiseSide - 1) / h.stride + 1
                                  : (rows - 1) * h.stride + kDepthwiseSide;
    return std::min(reach, source_size(h, adjoint));
  }
};

// Threads that are worth waking for so many targets.
inline int useful_threads(const DepthwiseShape& s, bool adjoint, int threads) {
  constexpr int64_t kGrain = 16 * 1024;
  int64_t targets = s.samples * s.channels;
  for (const DepthwiseAxis& a : s.axis) targets *= target_size(a, adjoint);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, targets / kGrain)));
}

// Rows of one plane handled between two visits to the volume: a few tiles, which stay in the
// first-level cache.
constexpr int64_t kMostRows = 8;
inline int64_t rows_at_once(int64_t width) {
  return std::max<int64_t>(8, std::min<int64_t>(kMostRows, 64 / width));
}

}  // namespace
}  // namespace PF_ISA
}  // namespace petite_fast
