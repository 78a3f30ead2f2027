// CUDA form of common/conv_halo.h.
#include "common/conv_halo.h"
#include "cuda/block.h"
#include "cuda/check.h"
#include "cuda/ops.h"

namespace petite_fast {
namespace cuda {
namespace {

// Blocks of a multiprocessor: while one waits for its input, the others multiply. The sums take
// 2 registers a column, so they leave room for so many.
constexpr int resident(int columns) { return columns > 32 ? 2 : columns > 16 ? 3 : 4; }

// Of shared memory a multiprocessor of sm_90 and sm_100 has 228 KB, 1 KB of it kept for each block;
// a block of sm_80 may have 163 KB.
template <typename Kind>
constexpr bool fits_shared_memory() {
  return (Kind::kSharedBytes + 1024) * resident(Kind::kColumns) <= 228 * 1024 &&
         Kind::kSharedBytes <= 163 * 1024;
}

template <typename Kind>
__global__ void __launch_bounds__(kConvHaloThreads, resident(Kind::kColumns))
    conv_halo_kernel(const __grid_constant__ ConvHaloParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  Block machine(shared);
  conv_halo_block<Kind>(p, blockIdx.x, machine);
}

}  // namespace

void launch_conv_halo(const ConvHaloParams& p, int device, void* stream) {
  check(cudaSetDevice(device), "cudaSetDevice");
  const int64_t blocks = conv_halo_blocks(p);
  if (blocks > INT32_MAX) throw std::runtime_error("petite_fast CUDA: y is too large");
  visit_conv_halo(p, [&](auto kind) {
    using Kind = decltype(kind);
    static_assert(fits_shared_memory<Kind>(), "too much shared memory");
    const auto kernel = conv_halo_kernel<Kind>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               Kind::kSharedBytes),
          "conv_halo: shared memory");
    kernel<<<static_cast<unsigned>(blocks), kConvHaloThreads, Kind::kSharedBytes,
             static_cast<cudaStream_t>(stream)>>>(p);
  });
  check(cudaGetLastError(), "conv_halo");
}

}  // namespace cuda
}  // namespace petite_fast
