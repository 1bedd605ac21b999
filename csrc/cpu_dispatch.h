// Run-time choice of the CPU instruction set.
//
// A function marked CARILLON_CPU_CLONES is compiled several times and the loader picks the widest
// version that the processor has (an ifunc), so that one module runs on any x86-64 machine.
// Mark the innermost loop's function only: what it calls must be inlined into it to profit.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define CARILLON_CPU_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // GCC 12 is the first to dispatch on the architecture levels
#define CARILLON_CPU_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define CARILLON_CPU_CLONES
#endif

// For what a clone calls: inlined, so that it is compiled for the clone's instruction set.
#if defined(__GNUC__)
#define CARILLON_INLINE __attribute__((always_inline)) inline
#else
#define CARILLON_INLINE inline
#endif
