// How threads share rows, on the CPU too: a power of two of lanes walks a row vector by vector,
// and a block takes as many rows at once as it has such lanes. Blocks past those of the tokens
// write the padding.
#pragma once

#include "host_device.h"

#include <cstdint>

namespace carillon::moe_routing {

inline constexpr int kRowThreads = 256;

// Lanes a row of so many vectors: as many as vectors, up to a power of two and the block.
CARILLON_HOST_DEVICE int lanes_of_row(int64_t num_vectors) {
  int lanes = 1;
  while (lanes < kRowThreads && lanes < num_vectors) lanes *= 2;
  return lanes;
}

CARILLON_HOST_DEVICE int64_t blocks_of_rows(int64_t num_rows, int lanes) {
  const int at_once = kRowThreads / lanes;
  return (num_rows + at_once - 1) / at_once;
}

// The row of a thread of the block, which may be past the last.
CARILLON_HOST_DEVICE int64_t row_of_thread(int64_t block, int thread, int lanes) {
  return block * (kRowThreads / lanes) + thread / lanes;
}

// The row that a map names, or -1: outside 0..num_rows-1 counts as none, whatever the map holds.
CARILLON_HOST_DEVICE int64_t row_or_none(int32_t row, int64_t num_rows) {
  return row >= 0 && row < num_rows ? row : -1;
}

// Whether a row is padding: no slot is named.
CARILLON_HOST_DEVICE bool is_padding(int32_t slot) { return slot < 0; }

// Values a vector of 16 bytes, or 1 where rows or pointers are not multiples of it.
CARILLON_HOST_DEVICE int values_of_vector(int64_t width, int64_t value_bytes, uintptr_t pointers) {
  const int64_t whole = 16 / value_bytes;
  return width % whole == 0 && pointers % 16 == 0 ? static_cast<int>(whole) : 1;
}

}  // namespace carillon::moe_routing
