// Marks for functions that the host and the device share.
#pragma once

// Internal linkage on purpose: the same header is compiled once per CPU instruction set, and a
// linker that merged an AVX-512 copy of an inline function into the baseline code would crash
// machines without AVX-512.
#if defined(__CUDACC__)
#define PF_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define PF_HOST_DEVICE static inline
#endif

// Before a loop over an array that must stay in registers on the device.
#if defined(__CUDA_ARCH__)
#define PF_UNROLL _Pragma("unroll")
#define PF_KEEP_LOOP _Pragma("unroll 1")  // copies of a long body would only cost registers
#else
#define PF_UNROLL
#define PF_KEEP_LOOP
#endif
