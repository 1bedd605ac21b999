// The copy engine and the tensor core of sm_90a as their documents describe them: boxes are written
// with the 128-byte swizzle, products read them through a descriptor, results are spread over the
// registers of 128 threads. Written from the PTX ISA, apart from the headers under test.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace carillon::test {

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// 128-byte swizzle: bits 4 to 6 of an address are combined with bits 7 to 9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Shared memory, addressed by bytes. A box of `num_dims` (64) dims by `num_rows` rows of (length,
// dims) features goes to `to`; past the edges zeros.
struct SharedBytes {
  std::vector<uint8_t> bytes;

  void copy_box(uint32_t to, const std::vector<uint16_t>& features, int64_t length, int64_t dims,
                int64_t dim, int64_t row, int num_dims, int num_rows) {
    if (to % 1024 != 0 || num_dims * 2 != 128 || num_rows > 256 || dims % 8 != 0) std::abort();
    for (int i = 0; i < num_rows; ++i) {
      for (int k = 0; k < num_dims; ++k) {
        const bool is_inside = row + i < length && dim + k < dims;
        const uint16_t value = is_inside ? features[(row + i) * dims + dim + k] : uint16_t{0};
        std::memcpy(&bytes.at(swizzled(to + i * 128 + k * 2)), &value, sizeof(value));
      }
    }
  }

  // Row `i`, dim `k` (below 16) of the operand that a descriptor names.
  float operand(uint64_t descriptor, int i, int k) const {
    const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    const bool is_swizzled_by_128 = descriptor >> 62 == 1;
    const bool has_base_offset = (descriptor >> 49 & 7) != 0;
    if (!is_swizzled_by_128 || has_base_offset) std::abort();
    const uint32_t at = start + i / 8 * stride + i % 8 * 128 + k * 2;
    uint16_t value;
    std::memcpy(&value, &bytes.at(swizzled(at)), sizeof(value));
    return from_bfloat16(value);
  }
};

// wgmma.m64n256k16: adds to each thread's 128 registers.
inline void multiply_64x256x16(const SharedBytes& shared, uint64_t rows, uint64_t columns, bool add,
                               std::vector<float>& registers) {
  std::vector<float> left(64 * 16), right(256 * 16);
  for (int i = 0; i < 64 * 16; ++i) left[i] = shared.operand(rows, i / 16, i % 16);
  for (int j = 0; j < 256 * 16; ++j) right[j] = shared.operand(columns, j / 16, j % 16);
  for (int thread = 0; thread < 128; ++thread) {
    for (int reg = 0; reg < 128; ++reg) {
      const int warp = thread / 32, lane = thread % 32;
      const int row = warp * 16 + lane / 4 + (reg % 4 < 2 ? 0 : 8);
      const int column = reg / 4 * 8 + lane % 4 * 2 + (reg & 1);
      float& sum = registers[thread * 128 + reg];
      float total = add ? sum : 0.0f;
      for (int k = 0; k < 16; ++k) total += left[row * 16 + k] * right[column * 16 + k];
      sum = total;
    }
  }
}

}  // namespace carillon::test
