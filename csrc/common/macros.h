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

// A function of a whole thread block: on the device by every thread, on the host once, by an
// emulator that runs the threads in loops.
#if defined(__CUDACC__)
#define PF_BLOCK static __device__ __forceinline__
#else
#define PF_BLOCK static inline
#endif

// Before a loop: whether the device's compiler writes it out. An array that must stay in registers
// needs that; copies of a long body would only cost some.
#if defined(__CUDA_ARCH__)
#define PF_UNROLL _Pragma("unroll")
#define PF_NO_UNROLL _Pragma("unroll 1")
#define PF_UNROLL_4 _Pragma("unroll 4")
#else
#define PF_UNROLL
#define PF_NO_UNROLL
#define PF_UNROLL_4
#endif
