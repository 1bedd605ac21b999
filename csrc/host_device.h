// What a CUDA kernel computes of its indices, as functions that the CPU tests call too
// (tests/kernels/<op>/*.cpp): what can be wrong without a GPU is found without one.
#pragma once

#ifdef __CUDACC__
#define CARILLON_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CARILLON_HOST_DEVICE inline
#endif

// Before a loop whose counter indexes an array that must stay in registers.
#ifdef __CUDA_ARCH__
#define CARILLON_UNROLL _Pragma("unroll")
#else
#define CARILLON_UNROLL
#endif
