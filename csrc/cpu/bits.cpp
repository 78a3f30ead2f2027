// Packs the signs of rows into bits and unpacks them; compiled once per instruction set.
#include <algorithm>

#include "cpu/norm_act_tile.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace petite_fast {
namespace PF_ISA {
namespace {

constexpr int64_t kTile = 4096;
constexpr int64_t kGrain = 65536;  // elements worth waking a thread for

// body(row, first, count) for pieces of rows that start on a whole byte.
template <typename Body>
void over_pieces(const SignRows& p, int threads, const Body& body) {
  const int64_t pieces = norm_divide_up(p.length, kTile);
  const int64_t grain = kGrain / std::min(kTile, p.length);
  parallel_for(p.rows * pieces, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kTile;
      body(i / pieces, first, std::min(kTile, p.length - first));
    }
  });
}

}  // namespace

void pack_signs(const SignRows& p, int threads) {
  over_pieces(p, threads, [&p](int64_t row, int64_t first, int64_t count) {
    alignas(64) float buffer[kTile];
    const float* values = stage(p.values, p.dtype, row * p.length + first, count, buffer);
    pack_row(values, count, p.bits + row * norm_divide_up(p.length, 8) + first / 8);
  });
}

void unpack_signs(const SignRows& p, int threads) {
  over_pieces(p, threads, [&p](int64_t row, int64_t first, int64_t count) {
    const uint8_t* bits = p.bits + row * norm_divide_up(p.length, 8) + first / 8;
    uint8_t* positive = p.positive + row * p.length + first;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      for (int j = 0; j < 8; ++j) positive[i + j] = (bits[i / 8] >> j) & 1;
    }
    for (; i < count; ++i) positive[i] = sign_at(bits, i);
  });
}

}  // namespace PF_ISA
}  // namespace petite_fast
