// The phases of the depthwise CUDA kernels on the host, barrier by barrier.
#include "cpu/emulate_depthwise.h"

#include <vector>

#include "cuda/depthwise_plan.h"

namespace petite_fast {
namespace {

// All threads of a block between two barriers.
template <typename Thread, typename Phase>
void each(std::vector<Thread>& threads, const Phase& phase) {
  for (Thread& thread : threads) phase(thread);
}

template <typename T, int S>
void run_conv_block(const DepthwiseCudaParams& p, const DepthwisePlace& place) {
  using Tile = ConvTile<T, S>;
  std::vector<T> slots(Tile::kSlots * Tile::Source::kElements);
  std::vector<float> staged(kStaged);
  std::vector<ConvThread<T, S>> threads(Tile::kThreads);
  const auto slot = [&](int step) {
    return slots.data() + step % Tile::kSlots * Tile::Source::kElements;
  };
  for (int i = 0; i < Tile::kThreads; ++i) {
    stage_weights<T>(p, place.channel, i, Tile::kThreads, staged.data());
  }
  for (int i = 0; i < Tile::kThreads; ++i) begin_conv(p, place, i, threads[i]);
  for (int step = 0; step < Tile::kSlots - 1; ++step) {
    each(threads, [&](auto& t) { fetch_conv(p, t, step, slot(step)); });
  }
  for (int step = 0; step < conv_steps(threads[0]); ++step) {
    const int next = step + Tile::kSlots - 1;
    each(threads, [&](auto& t) { fetch_conv(p, t, next, slot(next)); });
    const int phase = step % Tile::kPeriod;
    each(threads, [&](auto& t) { add_conv(p, t, step, phase, staged.data(), slot(step)); });
  }
}

template <typename T>
void run_adjoint_block(const DepthwiseCudaParams& p, const DepthwisePlace& place) {
  using Tile = AdjointTile<T>;
  std::vector<T> slots(Tile::kSlots * Tile::Source::kElements);
  std::vector<float> staged(kStaged);
  std::vector<AdjointThread<T>> threads(Tile::kThreads);
  const auto slot = [&](int step) {
    return slots.data() + step % Tile::kSlots * Tile::Source::kElements;
  };
  for (int i = 0; i < Tile::kThreads; ++i) {
    stage_weights<T>(p, place.channel, i, Tile::kThreads, staged.data());
  }
  for (int i = 0; i < Tile::kThreads; ++i) begin_adjoint(p, place, i, staged.data(), threads[i]);
  each(threads, [&](auto& t) {
    fetch_adjoint(p, t, 0, slot(0));
    fetch_adjoint(p, t, 1, slot(1));
  });
  for (int step = 1; step <= place.planes; ++step) {
    each(threads, [&](auto& t) { fetch_adjoint(p, t, step + 1, slot(step + 1)); });
    each(threads,
         [&](auto& t) { add_adjoint(p, t, step, staged.data(), slot(step - 1), slot(step)); });
  }
}

template <typename T, int S>
void run_grad_weight_block(const DepthwiseGradWeightCudaParams& p, int64_t share,
                           int64_t channel_tile) {
  using Tile = GradWeightTile<T, S>;
  const DepthwiseExtent extent = conv_extent(p.shape);
  const int64_t items = depthwise_items(p.shape, extent, p.chunk, Tile::kRows, Tile::kCols);
  std::vector<T> shared(Tile::kVolumeBytes / sizeof(T));
  std::vector<float> sums(Tile::kSumBytes / sizeof(float));
  std::vector<GradWeightThread<T, S>> threads(Tile::kThreads);
  for (int i = 0; i < Tile::kThreads; ++i) begin_grad_weight(i, threads[i]);
  for (int64_t item = share; item < items; item += p.shares) {
    const DepthwisePlace place =
        place_of(extent, p.chunk, Tile::kRows, Tile::kCols, item, channel_tile);
    each(threads, [&](auto& t) {
      open_item(p, place, t);
      fetch_grad_weight(p, t, 0, shared.data());
    });
    for (int step = 0; step < place.planes; ++step) {
      each(threads, [&](auto& t) { fetch_grad_weight(p, t, step + 1, shared.data()); });
      each(threads, [&](auto& t) { add_grad_weight(t, step, shared.data()); });
    }
  }
  each(threads, [&](auto& t) { leave_sums(t, sums.data()); });
  for (int i = 0; i < Tile::kThreads; ++i) {
    add_positions(p, share, channel_tile * kTileChannels, Tile::kThreads / kPairLanes, i,
                  Tile::kThreads, sums.data());
  }
}

template <typename T>
void run_sum_block(const DepthwiseGradWeightCudaParams& p, int64_t block) {
  std::vector<float> sums(kSumWeights * kSumSlices);
  for (int i = 0; i < kSumWeights * kSumSlices; ++i) add_shares(p, block, i, sums.data());
  for (int i = 0; i < kSumWeights * kSumSlices; ++i) add_slices<T>(p, block, i, sums.data());
}

template <typename Tile, typename Run>
void each_block(const DepthwiseCudaParams& p, DepthwiseExtent extent, const Run& run) {
  const int64_t items = depthwise_items(p.shape, extent, p.chunk, Tile::kRows, Tile::kCols);
  for (int64_t tile = 0; tile < channel_tiles(p.shape); ++tile) {
    for (int64_t item = 0; item < items; ++item) {
      run(p, place_of(extent, p.chunk, Tile::kRows, Tile::kCols, item, tile));
    }
  }
}

}  // namespace

void emulate_depthwise(const DepthwiseParams& given) {
  const DepthwisePlan plan = plan_depthwise(given);
  const DepthwiseCudaParams& p = plan.params;
  with_element_type(p.shape.dtype, [&](auto element) {
    using T = decltype(element);
    if (plan.adjoint) {
      each_block<AdjointTile<T>>(p, adjoint_extent(p.shape), run_adjoint_block<T>);
    } else if (strided(p.shape)) {
      each_block<ConvTile<T, 2>>(p, conv_extent(p.shape), run_conv_block<T, 2>);
    } else {
      each_block<ConvTile<T, 1>>(p, conv_extent(p.shape), run_conv_block<T, 1>);
    }
  });
}

void emulate_depthwise_grad_weight(const DepthwiseGradWeightCudaParams& p) {
  with_element_type(p.shape.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = strided(p.shape) ? run_grad_weight_block<T, 2> : run_grad_weight_block<T, 1>;
    for (int64_t share = 0; share < p.shares; ++share) {
      for (int64_t tile = 0; tile < channel_tiles(p.shape); ++tile) run(p, share, tile);
    }
    for (int64_t block = 0; block < parts(weight_count(p), kSumWeights); ++block) {
      run_sum_block<T>(p, block);
    }
  });
}

}  // namespace petite_fast
