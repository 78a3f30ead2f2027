// The CUDA kernel's phases on the host: what a machine without a GPU can check of its indexing and
// arithmetic.
#include <vector>

#include "cpu/ops.h"

namespace petite_fast {
namespace {

template <typename Acc>
void run_block(const EffectiveWeightParams& p, int64_t block, int threads) {
  const EffectiveWeightTile tile = tile_of(p, block, threads);
  std::vector<Acc> columns(static_cast<size_t>(threads) * kTileRows);
  std::vector<Acc> staged(kRankChunk * kTileRows);
  const auto for_each_column = [&](const auto& phase) {
    for (int thread = 0; thread < threads; ++thread) {
      const int64_t col = tile.first_col + thread;
      if (col < p.weight.size[1]) phase(col, &columns[static_cast<size_t>(thread) * kTileRows]);
    }
  };
  for_each_column(
      [&](int64_t col, Acc* column) { load_weight_column(p, tile.first_row, col, column); });
  for (int64_t q = 0; q < rank_of(p); q += kRankChunk) {
    for (int thread = 0; thread < threads; ++thread) {
      stage_row_factor(p, tile.first_row, q, thread, threads, staged.data());
    }
    for_each_column(
        [&](int64_t col, Acc* column) { add_low_rank(p, q, col, staged.data(), column); });
  }
  for_each_column(
      [&](int64_t col, Acc* column) { store_weight_column(p, tile.first_row, col, column); });
}

}  // namespace

void emulate_effective_weight(const EffectiveWeightParams& p, int threads) {
  for (int64_t block = 0; block < tile_count(p, threads); ++block) {
    if (accumulates_in_double(p)) {
      run_block<double>(p, block, threads);
    } else {
      run_block<float>(p, block, threads);
    }
  }
}

}  // namespace petite_fast
