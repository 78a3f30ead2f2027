// A CUDA thread block on the host, as the Machine of common/conv_halo.h: what a warp does is done
// for its 32 lanes at once, and what all threads do is done in loops.
//
// It also checks what a GPU would not: shared memory is read only after a wait and a barrier have
// made it everybody's, and written only after a barrier has ended its reads; addresses are aligned;
// and it counts the clocks that shared memory takes, 128 bytes each.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "common/dtype.h"

namespace petite_fast {

struct BlockCounts {
  int64_t shared_clocks = 0;  // of loads
  int64_t conflicts = 0;      // clocks of loads and stores beyond one for every 128 bytes
  int64_t products = 0;       // matrix instructions of 16 x 8 x 16
};

template <int warps>
class EmulatedBlock {
 public:
  static constexpr int kWarps = warps;
  static constexpr int kLanes = 32;
  static constexpr int kThreads = warps * kLanes;

  EmulatedBlock(int bytes, BlockCounts& counts)
      : shared_(static_cast<size_t>(bytes), 0xff),  // not a number, in every type
        pieces_(static_cast<size_t>(bytes / 16)),
        counts_(counts) {}

  int warp(int own) const { return own; }
  int lane(int own) const { return own; }
  int thread(int own) const { return own; }

  void copy16(int to, const void* source, bool inside) {
    require_aligned(to, source);
    start_write(to);
    Copy copy{to, {}};
    if (inside) std::memcpy(copy.values, source, 16);
    copies_.push_back(copy);
  }
  // Copies arrive as late as they may.
  void wait() {
    for (const Copy& copy : copies_) {
      std::memcpy(&shared_[static_cast<size_t>(copy.to)], copy.values, 16);
      piece(copy.to).written = epoch_;
    }
    copies_.clear();
  }
  void barrier() { ++epoch_; }

  void load_matrices(const int (&from)[32], int shift, uint32_t (&out)[32][4]) {
    uint32_t rows[32][4];
    load16(from, shift, rows);
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        out[lane][matrix] = rows[8 * matrix + lane / 4][lane % 4];
      }
    }
  }
  void load16(const int (&from)[32], int shift, uint32_t (&out)[32][4]) {
    for (int first = 0; first < 32; first += 8) {
      int uses[8] = {};
      for (int lane = first; lane < first + 8; ++lane) {
        const int place = from[lane] + shift;
        require_aligned(place, nullptr);
        if (piece(place).written >= epoch_) throw std::logic_error("shared: read before a barrier");
        piece(place).read = epoch_;
        std::memcpy(out[lane], &shared_[static_cast<size_t>(place)], 16);
        ++uses[place / 16 % 8];
      }
      ++counts_.shared_clocks;
      count_conflicts(uses);
    }
  }
  void store4(const int (&to)[32], int shift, const uint32_t (&value)[32]) {
    int uses[32] = {};
    for (int lane = 0; lane < 32; ++lane) {
      const int place = to[lane] + shift;
      start_write(place / 16 * 16);
      piece(place).written = epoch_;
      std::memcpy(&shared_[static_cast<size_t>(place)], &value[lane], 4);
      ++uses[place / 4 % 32];
    }
    count_conflicts(uses);
  }
  void store16(void* target, const uint32_t (&value)[4]) {
    require_aligned(0, target);
    std::memcpy(target, value, 16);
  }

  template <typename T>
  void multiply(const uint32_t (&a)[32][4], const uint32_t (&both)[32][4], int which,
                float (&sum)[32][4]) {
    float left[16][16];
    float right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4;
      const int pair = lane % 4 * 2;
      for (int i = 0; i < 2; ++i) {
        left[group][pair + i] = half_of<T>(a[lane][0], i);
        left[group + 8][pair + i] = half_of<T>(a[lane][1], i);
        left[group][pair + 8 + i] = half_of<T>(a[lane][2], i);
        left[group + 8][pair + 8 + i] = half_of<T>(a[lane][3], i);
        right[pair + i][group] = half_of<T>(both[lane][2 * which], i);
        right[pair + 8 + i][group] = half_of<T>(both[lane][2 * which + 1], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        for (int k = 0; k < 16; ++k) {
          sum[lane][i] += left[lane / 4 + i / 2 * 8][k] * right[k][lane % 4 * 2 + i % 2];
        }
      }
    }
    ++counts_.products;
  }
  template <typename T>
  uint32_t round_pair(float low, float high) const {
    return round_from<T>(low).bits | static_cast<uint32_t>(round_from<T>(high).bits) << 16;
  }

 private:
  static constexpr int kNever = INT32_MAX;
  struct Piece {  // the epochs, between two barriers, in which 16 bytes were last used
    int written = kNever;
    int read = -1;
  };
  struct Copy {
    int to;
    uint32_t values[4];
  };

  template <typename T>
  static float half_of(uint32_t pair, int which) {
    return to_float(T{static_cast<uint16_t>(pair >> (16 * which))});
  }
  static void require_aligned(int offset, const void* address) {
    if (offset % 16 != 0 || reinterpret_cast<uintptr_t>(address) % 16 != 0) {
      throw std::logic_error("not a multiple of 16 bytes");
    }
  }
  template <int banks>
  void count_conflicts(const int (&uses)[banks]) {
    int most = 0;
    for (int count : uses) most = count > most ? count : most;
    counts_.conflicts += most - 1;
  }
  Piece& piece(int offset) { return pieces_.at(static_cast<size_t>(offset / 16)); }
  void start_write(int offset) {
    if (piece(offset).read >= epoch_) throw std::logic_error("shared: written while being read");
    piece(offset).written = kNever;
  }

  std::vector<unsigned char> shared_;
  std::vector<Piece> pieces_;
  std::vector<Copy> copies_;
  BlockCounts& counts_;
  int epoch_ = 0;
};

}  // namespace petite_fast
