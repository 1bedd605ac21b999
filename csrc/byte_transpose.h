// Transposes bytes, 16 by 16 in registers.
#pragma once

#include <cstdint>
#include <cstring>

namespace carillon {

using Bytes16 = uint8_t __attribute__((vector_size(16)));

// The first, or the second, halves of a and b with their bytes alternating.
inline Bytes16 interleave_low(Bytes16 a, Bytes16 b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
  return __builtin_shuffle(a, b,
                           Bytes16{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
#endif
}

inline Bytes16 interleave_high(Bytes16 a, Bytes16 b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
#else
  return __builtin_shuffle(a, b,
                           Bytes16{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#endif
}

// target[j][i] = source[i][j] for i, j < 16; the strides are in bytes.
// Interleaving row i with row i + 8 is a perfect shuffle of the 256 bytes: four of them transpose.
inline void transpose_16x16(const uint8_t* source, int64_t source_stride, uint8_t* target,
                            int64_t target_stride) {
  Bytes16 rows[16];
  for (int i = 0; i < 16; ++i) std::memcpy(&rows[i], source + i * source_stride, 16);
  for (int step = 0; step < 4; ++step) {
    Bytes16 next[16];
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + 8]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + 8]);
    }
    std::memcpy(rows, next, sizeof(rows));
  }
  for (int i = 0; i < 16; ++i) std::memcpy(target + i * target_stride, &rows[i], 16);
}

}  // namespace carillon
