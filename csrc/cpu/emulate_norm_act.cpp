// The phases of the CUDA norm_act on the host; see emulate_effective_weight.cpp.
#include <vector>

#include "common/norm_act_backward.h"
#include "common/norm_act_forward.h"
#include "cpu/ops.h"

namespace petite_fast {
namespace {

// One phase between two barriers of a block.
template <typename Phase>
void each_thread(int threads, const Phase& phase) {
  for (int thread = 0; thread < threads; ++thread) phase(thread);
}

template <typename Value>
void fold_block(const NormActGrid& g, int threads, Value* shared) {
  for (int rows = static_cast<int>(g.rows_per_step); rows > 1; rows = (rows + 1) / 2) {
    each_thread(threads, [&](int thread) { fold_rows(g, rows, thread, threads, shared); });
  }
}

template <typename Value>
void fold_block(int threads, Value* shared) {
  for (int count = threads; count > 1; count = (count + 1) / 2) {
    each_thread(threads, [&](int thread) { fold_threads(count, thread, shared); });
  }
}

template <typename T, bool kWhole>
void run_moments(const NormActForward& p, const NormActGrid& g, int threads) {
  std::vector<Moments> shared(static_cast<size_t>(kOctet) * threads);
  for (int64_t block = 0; block < block_count(p.shape, g); ++block) {
    each_thread(threads, [&](int thread) {
      LaneMoments moments;
      add_moments<T, kWhole>(p, g, block, thread, moments);
      stage_moments(moments, thread, threads, shared.data());
    });
    fold_block(g, threads, shared.data());
    each_thread(threads,
                [&](int thread) { store_moments(p, g, block, thread, threads, shared.data()); });
  }
  for (int64_t block = 0; block < statistics_count(p.shape); ++block) {
    each_thread(threads,
                [&](int thread) { gather_moments(p, g, block, thread, threads, shared.data()); });
    fold_block(threads, shared.data());
    each_thread(threads, [&](int thread) { finish_moments(p, g, block, thread, shared.data()); });
  }
}

template <typename T, bool kWhole, bool kSums, bool kWrites>
void run_backward(const NormActBackward& p, const NormActGrid& g, int threads) {
  std::vector<NormActSums> shared(static_cast<size_t>(kOctet) * threads);
  for (int64_t block = 0; block < block_count(p.shape, g); ++block) {
    each_thread(threads, [&](int thread) {
      LaneSums sums;
      backward_pass<T, kWhole, kSums, kWrites>(p, g, block, thread, sums);
      stage_sums(sums, thread, threads, shared.data());
    });
    if (!kSums) continue;
    fold_block(g, threads, shared.data());
    each_thread(threads,
                [&](int thread) { store_sums(p, g, block, thread, threads, shared.data()); });
  }
  for (int64_t block = 0; kSums && block < totals_count(p); ++block) {
    each_thread(threads,
                [&](int thread) { gather_sums(p, g, block, thread, threads, shared.data()); });
    fold_block(threads, shared.data());
    each_thread(threads, [&](int thread) { finish_sums(p, g, block, thread, shared.data()); });
  }
}

int64_t sign_bytes(const SignRows& p) { return p.rows * norm_divide_up(p.length, kOctet); }

}  // namespace

void emulate_norm_act(const NormActForward& p, int threads) {
  const NormActGrid g = norm_act_grid(p.shape, threads);
  with_element(p.shape.dtype, octets_are_whole(p, g), [&](auto element, auto is_whole) {
    using T = typename decltype(element)::Type;
    constexpr bool kWhole = decltype(is_whole)::value;
    if (p.shape.norm != Norm::kFixed) run_moments<T, kWhole>(p, g, threads);
    for (int64_t block = 0; block < block_count(p.shape, g); ++block) {
      each_thread(threads, [&](int thread) { apply_norm_act<T, kWhole>(p, g, block, thread); });
    }
  });
}

void emulate_norm_act_backward(const NormActBackward& p, int threads) {
  const NormActGrid g = norm_act_grid(p.shape, threads);
  const BackwardPasses passes = backward_passes(p);
  with_element(p.shape.dtype, octets_are_whole(p, g), [&](auto element, auto is_whole) {
    using T = typename decltype(element)::Type;
    constexpr bool kWhole = decltype(is_whole)::value;
    if (passes.both) {
      run_backward<T, kWhole, true, true>(p, g, threads);
      return;
    }
    if (passes.sums) run_backward<T, kWhole, true, false>(p, g, threads);
    if (passes.writes) run_backward<T, kWhole, false, true>(p, g, threads);
  });
}

void emulate_pack_signs(const SignRows& p) {
  with_element(p.dtype, sign_rows_are_whole(p), [&](auto element, auto is_whole) {
    using T = typename decltype(element)::Type;
    for (int64_t i = 0; i < sign_bytes(p); ++i) pack_signs_of<T, decltype(is_whole)::value>(p, i);
  });
}

void emulate_unpack_signs(const SignRows& p) {
  const bool whole = sign_rows_are_whole(p);
  for (int64_t i = 0; i < sign_bytes(p); ++i) {
    if (whole) {
      unpack_signs_of<true>(p, i);
    } else {
      unpack_signs_of<false>(p, i);
    }
  }
}

}  // namespace petite_fast
