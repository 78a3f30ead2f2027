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
