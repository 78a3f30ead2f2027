#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace petite_fast {
namespace cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("petite_fast CUDA: ") + what + ": " +
                           cudaGetErrorString(status));
}

}  // namespace cuda
}  // namespace petite_fast
