// Marks functions that run on the host and, under nvcc, on the device too.
//
// They are `static`: a host file compiled for AVX-512 must never lend its copy of an inline function
// to a file that runs on a machine without it, and internal linkage is what rules that out.
#pragma once

#if defined(__CUDACC__)
#define TQ_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define TQ_HOST_DEVICE static inline
#endif
