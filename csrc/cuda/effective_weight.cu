// CUDA form of common/effective_weight.h: a block makes kTileRows rows by blockDim.x columns.
//
// Bound by reading W and writing W_eff: neighbouring threads hold neighbouring columns, a thread
// has the loads of kTileRows rows in flight, V is read once per block of rows and U comes from
// shared memory.
#include "cuda/check.h"
#include "cuda/ops.h"

namespace petite_fast {
namespace cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kMinBlocks = 4;  // up to 64 registers a thread: without it the compiler spills at 40

template <typename Acc>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    effective_weight_kernel(const __grid_constant__ EffectiveWeightParams p) {
  __shared__ Acc staged[kRankChunk * kTileRows];
  const int threads = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  const EffectiveWeightTile tile = tile_of(p, blockIdx.x, threads);
  const int64_t col = tile.first_col + thread;
  const bool inside = col < p.weight.size[1];
  Acc column[kTileRows];
  if (inside) load_weight_column(p, tile.first_row, col, column);
  for (int64_t q = 0; q < rank_of(p); q += kRankChunk) {
    __syncthreads();  // the last chunk is no longer read
    stage_row_factor(p, tile.first_row, q, thread, threads, staged);
    __syncthreads();
    if (inside) add_low_rank(p, q, col, staged, column);
  }
  if (inside) store_weight_column(p, tile.first_row, col, column);
}

}  // namespace

std::string toolkit_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::string why_not(int device) {
  int driver = 0;
  cudaError_t status = cudaDriverGetVersion(&driver);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "built with CUDA " + toolkit_version() + ", the driver supports CUDA " +
           std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
  }
  status = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (status == cudaSuccess) {
    status = cudaFuncGetAttributes(&attributes, effective_weight_kernel<float>);
  }
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // a refused query must not look like a failure of the next launch
  return cudaGetErrorString(status);
}

void launch_effective_weight(const EffectiveWeightParams& p, int device, void* stream) {
  check(cudaSetDevice(device), "cudaSetDevice");
  const int64_t columns = ceil_divide(p.weight.size[1], 32) * 32;
  const int threads = columns < kMaxThreads ? static_cast<int>(columns) : kMaxThreads;
  const int64_t blocks = tile_count(p, threads);
  if (blocks > INT32_MAX) throw std::runtime_error("petite_fast CUDA: weight is too large");
  const auto queue = static_cast<cudaStream_t>(stream);
  if (accumulates_in_double(p)) {
    effective_weight_kernel<double><<<static_cast<unsigned>(blocks), threads, 0, queue>>>(p);
  } else {
    effective_weight_kernel<float><<<static_cast<unsigned>(blocks), threads, 0, queue>>>(p);
  }
  check(cudaGetLastError(), "effective_weight");
}

}  // namespace cuda
}  // namespace petite_fast
