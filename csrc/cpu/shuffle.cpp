// CPU form of common/shuffle.h; compiled once per instruction set, each into its own namespace
// PF_ISA. The inner loops have constant trip counts for the usual blocks, which is what the
// compiler needs to interleave whole vectors.
#include "common/shuffle.h"

#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements worth waking a thread for

template <bool kToVolume>
inline void move(float* volume, float* matrix, float bias) {
  if constexpr (kToVolume) {
    *volume = *matrix + bias;
  } else {
    *matrix = *volume;
  }
}

// One row of voxels from `width` rows of the matrix that are `stride` apart; kWidth 0: any width.
template <bool kToVolume, int kWidth>
void move_columns(float* __restrict volume, float* __restrict matrix, int64_t count, int64_t width,
                  int64_t stride, float bias) {
  if constexpr (kWidth > 0) {
    for (int64_t w = 0; w < count; ++w) {
      for (int e = 0; e < kWidth; ++e) {
        move<kToVolume>(volume + w * kWidth + e, matrix + e * stride + w, bias);
      }
    }
  } else {
    for (int64_t e = 0; e < width; ++e) {
      for (int64_t w = 0; w < count; ++w) {
        move<kToVolume>(volume + w * width + e, matrix + e * stride + w, bias);
      }
    }
  }
}

// One row of voxels as segments of `length` elements that are `stride` apart in the matrix. The
// bias, if any, has one value or, with `tiled`, as many as a segment.
template <bool kToVolume, int kLength>
void move_segments(float* __restrict volume, float* __restrict matrix, int64_t count,
                   int64_t length, int64_t stride, const float* __restrict bias, bool tiled) {
  const int64_t n = kLength > 0 ? kLength : length;
  for (int64_t w = 0; w < count; ++w, volume += n, matrix += stride) {
    if (kToVolume && bias != nullptr && tiled) {
      for (int64_t i = 0; i < n; ++i) volume[i] = matrix[i] + bias[i];
    } else {
      const float constant = kToVolume && bias != nullptr ? *bias : 0.0f;
      for (int64_t i = 0; i < n; ++i) move<kToVolume>(volume + i, matrix + i, constant);
    }
  }
}

// Rows of blocks [begin, end), numbered through all channels; channels last has them all in one.
template <bool kToVolume, int kWidth>
void move_rows(const ShuffleParams& p, int64_t begin, int64_t end) {
  const bool last = p.form == ShuffleForm::kChannelsLast;
  const int64_t lanes = last ? p.channels : 1;  // elements of a voxel that lie together
  const int64_t length = p.block[2] * lanes;    // elements of a block that lie together
  const int64_t count = p.blocks[2], pitch = p.size[2] * lanes;
  const int64_t taps = p.channels * p.block[0] * p.block[1] * p.block[2];
  int64_t channel = begin / p.rows, row = begin % p.rows;
  int64_t d = (p.first + row) / p.blocks[1], h = (p.first + row) % p.blocks[1];
  for (int64_t i = begin; i < end; ++i) {
    float* plane = p.volume + (channel * p.size[0] + d * p.block[0]) * p.size[1] * pitch;
    int64_t segment = channel * p.block[0] * p.block[1] * length;
    for (int64_t a = 0; a < p.block[0]; ++a) {
      float* volume = plane + (a * p.size[1] + h * p.block[1]) * pitch;
      for (int64_t b = 0; b < p.block[1]; ++b, volume += pitch, segment += length) {
        if (p.form == ShuffleForm::kColumns) {
          const int64_t stride = p.rows * count;
          move_columns<kToVolume, kWidth>(volume, p.matrix + segment * stride + row * count, count,
                                          length, stride, p.bias ? p.bias[channel] : 0.0f);
        } else {
          move_segments<kToVolume, kWidth>(volume, p.matrix + row * count * taps + segment, count,
                                           length, taps,
                                           p.bias ? p.bias + (last ? 0 : channel) : nullptr, last);
        }
      }
    }
    ++row;
    if (++h == p.blocks[1]) {
      h = 0;
      ++d;
    }
    if (row == p.rows) {
      row = 0;
      ++channel;
      d = p.first / p.blocks[1];
      h = p.first % p.blocks[1];
    }
  }
}

template <int kWidth>
void move_all(const ShuffleParams& p, int64_t begin, int64_t end) {
  if (p.to_volume) return move_rows<true, kWidth>(p, begin, end);
  move_rows<false, kWidth>(p, begin, end);
}

}  // namespace

void shuffle(const ShuffleParams& p, int threads) {
  const bool last = p.form == ShuffleForm::kChannelsLast;
  const int64_t count = p.rows * (last ? 1 : p.channels);
  const int64_t elements =
      p.blocks[2] * p.block[0] * p.block[1] * p.block[2] * (last ? p.channels : 1);
  const int64_t length = p.block[2] * (last ? p.channels : 1);
  parallel_for(count, kGrain / elements + 1, threads, [&p, length](int64_t begin, int64_t end) {
    switch (length) {
      case 1:
        return move_all<1>(p, begin, end);
      case 2:
        return move_all<2>(p, begin, end);
      case 3:
        return move_all<3>(p, begin, end);
      case 4:
        return move_all<4>(p, begin, end);
      case 16:
        return move_all<16>(p, begin, end);
      default:
        return move_all<0>(p, begin, end);
    }
  });
}

}  // namespace PF_ISA
}  // namespace petite_fast
