// A thread of a CUDA block as the Machine of common/conv_halo.h: matrix instructions, matrix loads
// and asynchronous copies of sm_80, which later architectures run too.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

namespace petite_fast {
namespace cuda {

class Block {
 public:
  static constexpr int kWarps = 1;
  static constexpr int kLanes = 1;
  static constexpr int kThreads = 1;

  __device__ __forceinline__ explicit Block(void* shared)
      : shared_(static_cast<uint32_t>(__cvta_generic_to_shared(shared))) {}

  __device__ __forceinline__ int warp(int) const { return static_cast<int>(threadIdx.x) / 32; }
  __device__ __forceinline__ int lane(int) const { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ int thread(int) const { return static_cast<int>(threadIdx.x); }

  // 16 bytes to shared memory, zeros where not inside. L1 keeps none of it.
  __device__ __forceinline__ void copy16(int to, const void* source, bool inside) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_ + to), "l"(source),
                 "r"(inside ? 16 : 0)
                 : "memory");
  }
  __device__ __forceinline__ void wait() const { asm volatile("cp.async.wait_all;" ::: "memory"); }
  __device__ __forceinline__ void barrier() const { __syncthreads(); }

  // Four 8 x 8 matrices, whose rows the lanes point at.
  __device__ __forceinline__ void load_matrices(const int (&from)[1], int shift,
                                                uint32_t (&out)[1][4]) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0][0]), "=r"(out[0][1]), "=r"(out[0][2]), "=r"(out[0][3])
                 : "r"(shared_ + from[0] + shift)
                 : "memory");
  }
  __device__ __forceinline__ void load16(const int (&from)[1], int shift,
                                         uint32_t (&out)[1][4]) const {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0][0]), "=r"(out[0][1]), "=r"(out[0][2]), "=r"(out[0][3])
                 : "r"(shared_ + from[0] + shift)
                 : "memory");
  }
  __device__ __forceinline__ void store4(const int (&to)[1], int shift,
                                         const uint32_t (&value)[1]) const {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared_ + to[0] + shift), "r"(value[0])
                 : "memory");
  }
  __device__ __forceinline__ void store16(void* target, const uint32_t (&value)[4]) const {
    *static_cast<uint4*>(target) = make_uint4(value[0], value[1], value[2], value[3]);
  }

  // sum [16, 8] += a [16, 16] b [16, 8]; b is one of two in `both`.
  template <typename T>
  __device__ __forceinline__ void multiply(const uint32_t (&a)[1][4], const uint32_t (&both)[1][4],
                                           int which, float (&sum)[1][4]) const {
    const uint32_t first = both[0][2 * which];
    const uint32_t second = both[0][2 * which + 1];
    if constexpr (std::is_same_v<T, BFloat16>) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
          "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(sum[0][0]), "+f"(sum[0][1]), "+f"(sum[0][2]), "+f"(sum[0][3])
          : "r"(a[0][0]), "r"(a[0][1]), "r"(a[0][2]), "r"(a[0][3]), "r"(first), "r"(second));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
          "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(sum[0][0]), "+f"(sum[0][1]), "+f"(sum[0][2]), "+f"(sum[0][3])
          : "r"(a[0][0]), "r"(a[0][1]), "r"(a[0][2]), "r"(a[0][3]), "r"(first), "r"(second));
    }
  }

  // Both rounded to nearest, the first in the lower half.
  template <typename T>
  __device__ __forceinline__ uint32_t round_pair(float low, float high) const {
    uint32_t pair;
    if constexpr (std::is_same_v<T, BFloat16>) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    } else {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
  }

 private:
  uint32_t shared_;
};

}  // namespace cuda
}  // namespace petite_fast
