// Where a Hopper tensor core's operands and results lie, and the ring of buffers before it.
//
// Source: PTX ISA 8.x, "Asynchronous Warpgroup Level Matrix Instructions": the register fragment of
// D (figure of wgmma m64nNk16), the matrix descriptor, and the 128-byte swizzle.
#pragma once

#include "host_device.h"

#include <cstdint>

namespace carillon::hopper {

constexpr int kGroupThreads = 128;  // four warps multiply together
constexpr int kGroupRows = 64;      // rows of one product
constexpr int kInstructionDims = 16;
constexpr int kSwizzleBytes = 128;  // a row of an operand in shared memory: 64 bfloat16
constexpr int kPatternRows = 8;     // after so many rows the swizzle repeats

// The accumulator `reg` of a thread holds this row and column of the product.
CARILLON_HOST_DEVICE constexpr int row_of(int thread, int reg) {
  return thread / 32 * 16 + thread % 32 / 4 + reg / 2 % 2 * 8;
}

CARILLON_HOST_DEVICE constexpr int column_of(int thread, int reg) {
  return reg / 4 * 8 + thread % 4 * 2 + reg % 2;
}

// Descriptor of an operand whose rows are 128 bytes of the summed dimension, swizzled, as a tensor
// map with CU_TENSOR_MAP_SWIZZLE_128B writes them. `address` is in shared memory and a multiple of
// 1024, plus 32 bytes for each product of 16 dims inside a row. The leading offset is not used.
CARILLON_HOST_DEVICE constexpr uint64_t operand_descriptor(uint32_t address) {
  constexpr uint64_t stride = kPatternRows * kSwizzleBytes;
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{1} << 16 | (stride >> 4) << 32 |
         uint64_t{1} << 62;
}

// A position in a ring of buffers; `phase` flips each time around. A consumer waits for a buffer's
// full barrier with this phase, a producer for its empty barrier with the other, which a barrier
// that nobody has used yet lets pass.
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;

  CARILLON_HOST_DEVICE void advance(int num_stages) {
    if (++stage == num_stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace carillon::hopper
