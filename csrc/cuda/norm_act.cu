// CUDA form of common/norm_act.h for one channel or channels last: see common/norm_act_octets.h.
//
// Bound by memory. Forward: x is read for its moments and again for y, which is written; with fixed
// statistics only the latter. Backward: grad_y and y (or xhat) are read for the sums and again for
// grad_x. All sums have one order, whatever the device.
#include "cuda/check.h"
#include "cuda/ops.h"

namespace petite_fast {
namespace cuda {
namespace {

// Up to 128 registers a thread, for eight lanes' coefficients; more where lanes are loaded singly.
template <bool kWhole>
constexpr int kMinBlocks = kWhole ? 2 : 1;

template <typename Value>
__device__ void fold_block(const NormActGrid& g, Value* shared) {
  for (int rows = static_cast<int>(g.rows_per_step); rows > 1; rows = (rows + 1) / 2) {
    __syncthreads();
    fold_rows(g, rows, static_cast<int>(threadIdx.x), kNormThreads, shared);
  }
  __syncthreads();
}

template <typename Value>
__device__ void fold_block(Value* shared) {
  for (int count = kNormThreads; count > 1; count = (count + 1) / 2) {
    __syncthreads();
    fold_threads(count, static_cast<int>(threadIdx.x), shared);
  }
  __syncthreads();
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kNormThreads, kMinBlocks<kWhole>)
    moments_kernel(const __grid_constant__ NormActForward p,
                   const __grid_constant__ NormActGrid g) {
  __shared__ Moments shared[kOctet * kNormThreads];
  const int thread = static_cast<int>(threadIdx.x);
  LaneMoments moments;
  add_moments<T, kWhole>(p, g, blockIdx.x, thread, moments);
  stage_moments(moments, thread, kNormThreads, shared);
  fold_block(g, shared);
  store_moments(p, g, blockIdx.x, thread, kNormThreads, shared);
}

__global__ void __launch_bounds__(kNormThreads)
    statistics_kernel(const __grid_constant__ NormActForward p,
                      const __grid_constant__ NormActGrid g) {
  __shared__ Moments shared[kNormThreads];
  const int thread = static_cast<int>(threadIdx.x);
  gather_moments(p, g, blockIdx.x, thread, kNormThreads, shared);
  fold_block(shared);
  finish_moments(p, g, blockIdx.x, thread, shared);
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kNormThreads, kMinBlocks<kWhole>)
    apply_kernel(const __grid_constant__ NormActForward p, const __grid_constant__ NormActGrid g) {
  apply_norm_act<T, kWhole>(p, g, blockIdx.x, static_cast<int>(threadIdx.x));
}

template <typename T, bool kWhole, bool kSums, bool kWrites>
__global__ void __launch_bounds__(kNormThreads, kMinBlocks<kWhole>)
    backward_kernel(const __grid_constant__ NormActBackward p,
                    const __grid_constant__ NormActGrid g) {
  const int thread = static_cast<int>(threadIdx.x);
  LaneSums sums;
  backward_pass<T, kWhole, kSums, kWrites>(p, g, blockIdx.x, thread, sums);
  if constexpr (kSums) {
    __shared__ NormActSums shared[kOctet * kNormThreads];
    stage_sums(sums, thread, kNormThreads, shared);
    fold_block(g, shared);
    store_sums(p, g, blockIdx.x, thread, kNormThreads, shared);
  }
}

__global__ void __launch_bounds__(kNormThreads)
    totals_kernel(const __grid_constant__ NormActBackward p,
                  const __grid_constant__ NormActGrid g) {
  __shared__ NormActSums shared[kNormThreads];
  const int thread = static_cast<int>(threadIdx.x);
  gather_sums(p, g, blockIdx.x, thread, kNormThreads, shared);
  fold_block(shared);
  finish_sums(p, g, blockIdx.x, thread, shared);
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kNormThreads) pack_kernel(const SignRows p, int64_t bytes) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kNormThreads + threadIdx.x;
  if (index < bytes) pack_signs_of<T, kWhole>(p, index);
}

template <bool kWhole>
__global__ void __launch_bounds__(kNormThreads) unpack_kernel(const SignRows p, int64_t bytes) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kNormThreads + threadIdx.x;
  if (index < bytes) unpack_signs_of<kWhole>(p, index);
}

unsigned blocks_of(int64_t blocks) {
  if (blocks > INT32_MAX) throw std::runtime_error("petite_fast CUDA: the tensor is too large");
  return static_cast<unsigned>(blocks);
}

template <bool kSums, bool kWrites>
void run_backward(const NormActBackward& p, const NormActGrid& g, bool whole, cudaStream_t queue) {
  with_element(p.shape.dtype, whole, [&](auto element, auto is_whole) {
    using T = typename decltype(element)::Type;
    backward_kernel<T, decltype(is_whole)::value, kSums, kWrites>
        <<<blocks_of(block_count(p.shape, g)), kNormThreads, 0, queue>>>(p, g);
  });
}

}  // namespace

void launch_norm_act(const NormActForward& p, int device, void* stream) {
  check(cudaSetDevice(device), "cudaSetDevice");
  const NormActGrid g = norm_act_grid(p.shape, kNormThreads);
  const bool whole = octets_are_whole(p, g);
  const auto queue = static_cast<cudaStream_t>(stream);
  const unsigned blocks = blocks_of(block_count(p.shape, g));
  if (p.shape.norm != Norm::kFixed) {
    with_element(p.shape.dtype, whole, [&](auto element, auto is_whole) {
      using T = typename decltype(element)::Type;
      moments_kernel<T, decltype(is_whole)::value><<<blocks, kNormThreads, 0, queue>>>(p, g);
    });
    const unsigned statistics = blocks_of(statistics_count(p.shape));
    statistics_kernel<<<statistics, kNormThreads, 0, queue>>>(p, g);
  }
  with_element(p.shape.dtype, whole, [&](auto element, auto is_whole) {
    using T = typename decltype(element)::Type;
    apply_kernel<T, decltype(is_whole)::value><<<blocks, kNormThreads, 0, queue>>>(p, g);
  });
  check(cudaGetLastError(), "norm_act");
}

void launch_norm_act_backward(const NormActBackward& p, int device, void* stream) {
  check(cudaSetDevice(device), "cudaSetDevice");
  const NormActGrid g = norm_act_grid(p.shape, kNormThreads);
  const bool whole = octets_are_whole(p, g);
  const auto queue = static_cast<cudaStream_t>(stream);
  const BackwardPasses passes = backward_passes(p);
  if (passes.both) {
    run_backward<true, true>(p, g, whole, queue);
  } else if (passes.sums) {
    run_backward<true, false>(p, g, whole, queue);
  }
  if (passes.sums) {
    const unsigned totals = blocks_of(totals_count(p));
    totals_kernel<<<totals, kNormThreads, 0, queue>>>(p, g);
  }
  if (passes.writes && !passes.both) run_backward<false, true>(p, g, whole, queue);
  check(cudaGetLastError(), "norm_act_backward");
}

void launch_pack_signs(const SignRows& p, int device, void* stream) {
  check(cudaSetDevice(device), "cudaSetDevice");
  const int64_t bytes = p.rows * norm_divide_up(p.length, kOctet);
  const unsigned blocks = blocks_of(norm_divide_up(bytes, kNormThreads));
  const auto queue = static_cast<cudaStream_t>(stream);
  with_element(p.dtype, sign_rows_are_whole(p), [&](auto element, auto is_whole) {
    using T = typename decltype(element)::Type;
    pack_kernel<T, decltype(is_whole)::value><<<blocks, kNormThreads, 0, queue>>>(p, bytes);
  });
  check(cudaGetLastError(), "pack_signs");
}

void launch_unpack_signs(const SignRows& p, int device, void* stream) {
  check(cudaSetDevice(device), "cudaSetDevice");
  const int64_t bytes = p.rows * norm_divide_up(p.length, kOctet);
  const unsigned blocks = blocks_of(norm_divide_up(bytes, kNormThreads));
  const auto queue = static_cast<cudaStream_t>(stream);
  if (sign_rows_are_whole(p)) {
    unpack_kernel<true><<<blocks, kNormThreads, 0, queue>>>(p, bytes);
  } else {
    unpack_kernel<false><<<blocks, kNormThreads, 0, queue>>>(p, bytes);
  }
  check(cudaGetLastError(), "unpack_signs");
}

}  // namespace cuda
}  // namespace petite_fast
