// CUDA form of common/depthwise.h: barriers, copies in flight and launches around the phases of
// cuda/depthwise_*.h.
//
// Bound by reading the source and writing the target: 4 bytes an element in bfloat16 against 27
// multiply-adds, so that on an H200 the float units are nearly as busy as the memory.
#include "cuda/check.h"
#include "cuda/depthwise_plan.h"
#include "cuda/ops.h"

namespace petite_fast {
namespace cuda {
namespace {

// Fetches of the planes of one step, started together.
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last kPending groups of this thread have arrived.
template <int kPending>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

extern __shared__ __align__(kVectorBytes) unsigned char shared_memory[];

template <typename T, int S>
__global__ void __launch_bounds__(ConvTile<T, S>::kThreads, 512 / ConvTile<T, S>::kThreads)
    conv_kernel(const __grid_constant__ DepthwiseCudaParams p) {
  using Tile = ConvTile<T, S>;
  T* slots = reinterpret_cast<T*>(shared_memory);
  float* staged = reinterpret_cast<float*>(slots + Tile::kSlots * Tile::Source::kElements);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t tiles = channel_tiles(p.shape);
  const DepthwisePlace place = place_of(conv_extent(p.shape), p.chunk, Tile::kRows, Tile::kCols,
                                        blockIdx.x / tiles, blockIdx.x % tiles);
  stage_weights<T>(p, place.channel, thread, Tile::kThreads, staged);
  ConvThread<T, S> t;
  begin_conv(p, place, thread, t);
#pragma unroll
  for (int step = 0; step < Tile::kSlots - 1; ++step) {
    fetch_conv(p, t, step, slots + step * Tile::Source::kElements);
    commit();
  }
  const int steps = conv_steps(t);
  for (int first = 0; first < steps; first += Tile::kPeriod) {
#pragma unroll
    for (int phase = 0; phase < Tile::kPeriod; ++phase) {
      const int step = first + phase;
      if (step >= steps) break;
      wait<Tile::kSlots - 2>();
      __syncthreads();  // this step's plane is there, and the last one's is no longer read
      fetch_conv(p, t, step + Tile::kSlots - 1,
                 slots + (phase + Tile::kSlots - 1) % Tile::kSlots * Tile::Source::kElements);
      commit();
      add_conv(p, t, step, phase, staged, slots + phase % Tile::kSlots * Tile::Source::kElements);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(AdjointTile<T>::kThreads, 2)
    adjoint_kernel(const __grid_constant__ DepthwiseCudaParams p) {
  using Tile = AdjointTile<T>;
  T* slots = reinterpret_cast<T*>(shared_memory);
  float* staged = reinterpret_cast<float*>(slots + Tile::kSlots * Tile::Source::kElements);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t tiles = channel_tiles(p.shape);
  const DepthwisePlace place = place_of(adjoint_extent(p.shape), p.chunk, Tile::kRows, Tile::kCols,
                                        blockIdx.x / tiles, blockIdx.x % tiles);
  stage_weights<T>(p, place.channel, thread, Tile::kThreads, staged);
  __syncthreads();
  AdjointThread<T> t;
  begin_adjoint(p, place, thread, staged, t);
  const auto slot = [slots](int step) {
    return slots + step % Tile::kSlots * Tile::Source::kElements;
  };
  fetch_adjoint(p, t, 0, slot(0));
  fetch_adjoint(p, t, 1, slot(1));
  commit();
  for (int step = 1; step <= place.planes; ++step) {
    wait<0>();
    __syncthreads();
    fetch_adjoint(p, t, step + 1, slot(step + 1));
    commit();
    add_adjoint(p, t, step, staged, slot(step - 1), slot(step));
  }
}

template <typename T, int S>
__global__ void __launch_bounds__(GradWeightTile<T, S>::kThreads,
                                  (sizeof(T) == 2 ? 512 : 256) / GradWeightTile<T, S>::kThreads)
    grad_weight_kernel(const __grid_constant__ DepthwiseGradWeightCudaParams p) {
  using Tile = GradWeightTile<T, S>;
  T* shared = reinterpret_cast<T*>(shared_memory);
  float* sums = reinterpret_cast<float*>(shared_memory);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t tiles = channel_tiles(p.shape);
  const int64_t share = blockIdx.x / tiles, channel_tile = blockIdx.x % tiles;
  const DepthwiseExtent extent = conv_extent(p.shape);
  const int64_t items = depthwise_items(p.shape, extent, p.chunk, Tile::kRows, Tile::kCols);
  GradWeightThread<T, S> t;
  begin_grad_weight(thread, t);
  for (int64_t item = share; item < items; item += p.shares) {
    open_item(p, place_of(extent, p.chunk, Tile::kRows, Tile::kCols, item, channel_tile), t);
    __syncthreads();  // the last item's planes are no longer read
    fetch_grad_weight(p, t, 0, shared);
    commit();
    for (int step = 0; step < t.steps; ++step) {
      wait<0>();
      __syncthreads();
      fetch_grad_weight(p, t, step + 1, shared);
      commit();
      add_grad_weight(t, step, shared);
    }
  }
  __syncthreads();
  leave_sums(t, sums);
  __syncthreads();
  add_positions(p, share, channel_tile * kTileChannels, Tile::kThreads / kPairLanes, thread,
                Tile::kThreads, sums);
}

template <typename T>
__global__ void __launch_bounds__(kSumWeights* kSumSlices)
    grad_weight_sum_kernel(const __grid_constant__ DepthwiseGradWeightCudaParams p) {
  __shared__ float sums[kSumWeights * kSumSlices];
  const int thread = static_cast<int>(threadIdx.x);
  add_shares(p, blockIdx.x, thread, sums);
  __syncthreads();
  add_slices<T>(p, blockIdx.x, thread, sums);
}

template <typename Params>
void launch(void (*kernel)(Params), const Params& p, int64_t blocks, int threads, int bytes,
            cudaStream_t stream, const char* what) {
  if (blocks > INT32_MAX) throw std::runtime_error("petite_fast CUDA: the volume is too large");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(p);
  check(cudaGetLastError(), what);
}

template <typename T, int S>
void launch_conv(const DepthwiseCudaParams& p, cudaStream_t stream) {
  using Tile = ConvTile<T, S>;
  const int64_t items =
      depthwise_items(p.shape, conv_extent(p.shape), p.chunk, Tile::kRows, Tile::kCols);
  launch(conv_kernel<T, S>, p, items * channel_tiles(p.shape), Tile::kThreads, Tile::kSharedBytes,
         stream, "depthwise");
}

template <typename T, int S>
void launch_sums(const DepthwiseGradWeightCudaParams& p, cudaStream_t stream) {
  using Tile = GradWeightTile<T, S>;
  launch(grad_weight_kernel<T, S>, p, p.shares * channel_tiles(p.shape), Tile::kThreads,
         Tile::kSharedBytes, stream, "depthwise_grad_weight");
}

}  // namespace

void launch_depthwise(const DepthwiseParams& given, int device, void* stream) {
  check(cudaSetDevice(device), "cudaSetDevice");
  const DepthwisePlan plan = plan_depthwise(given);
  const DepthwiseCudaParams& p = plan.params;
  const auto queue = static_cast<cudaStream_t>(stream);
  with_element_type(p.shape.dtype, [&](auto element) {
    using T = decltype(element);
    if (plan.adjoint) {
      using Tile = AdjointTile<T>;
      const int64_t items =
          depthwise_items(p.shape, adjoint_extent(p.shape), p.chunk, Tile::kRows, Tile::kCols);
      launch(adjoint_kernel<T>, p, items * channel_tiles(p.shape), Tile::kThreads,
             Tile::kSharedBytes, queue, "depthwise adjoint");
    } else if (strided(p.shape)) {
      launch_conv<T, 2>(p, queue);
    } else {
      launch_conv<T, 1>(p, queue);
    }
  });
}

void launch_depthwise_grad_weight(const DepthwiseGradWeightCudaParams& p, int device,
                                  void* stream) {
  check(cudaSetDevice(device), "cudaSetDevice");
  const auto queue = static_cast<cudaStream_t>(stream);
  with_element_type(p.shape.dtype, [&](auto element) {
    using T = decltype(element);
    if (strided(p.shape)) {
      launch_sums<T, 2>(p, queue);
    } else {
      launch_sums<T, 1>(p, queue);
    }
    launch(grad_weight_sum_kernel<T>, p, parts(weight_count(p), kSumWeights),
           kSumWeights * kSumSlices, 0, queue, "depthwise_grad_weight");
  });
}

}  // namespace cuda
}  // namespace petite_fast
