// What the threads of a warpgroup do together with an accumulator tile of 64 rows by 256 columns.
//
// `Threads` is the warpgroup as one of its threads sees it: `thread` (0 to 127), `exchange(value,
// mask)` with the lane of its warp whose number differs in that bit, `wait()` for all of them,
// `any(flag)` which waits too, and `shared()`, kSharedValues floats. On a GPU it is a warpgroup
// (cuda_kernel.h), in the CPU tests 128 threads.
#pragma once

#include "cuda_arithmetic.h"
#include "cuda_schedule.h"

namespace carillon::contrastive {

constexpr int kWarps = hopper::kGroupThreads / 32;
constexpr int kSharedValues = (kWarps + 1) * kTileColumns;
constexpr int kChunkColumns = 64;                    // folded at once
constexpr int kChunks = kTileColumns / kChunkColumns;
constexpr int kChunkValues = kChunkColumns / 4;      // of a thread

// Over the four lanes that share a row; each gets the result.
template <class Threads, class Combine>
CARILLON_HOST_DEVICE float over_quad(Threads& threads, float value, Combine combine) {
  value = combine(value, threads.exchange(value, 1));
  return combine(value, threads.exchange(value, 2));
}

template <class Threads, class Combine>
CARILLON_HOST_DEVICE float over_warp(Threads& threads, float value, Combine combine) {
  CARILLON_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) value = combine(value, threads.exchange(value, mask));
  return value;
}

// Register of a chunk's value: octet `value / 2` of the chunk, columns 0 and 1 of the thread's
// pair; the row below it is two registers on.
CARILLON_HOST_DEVICE constexpr int chunk_register(int chunk, int value) {
  return (chunk * kChunkColumns / 8 + value / 2) * 4 + value % 2;
}

// One step of the next function: lanes that differ in bit `2 * kHalf` share what they keep.
template <int kHalf, class Threads, class Combine>
CARILLON_HOST_DEVICE void fold_half(Threads& threads, float (&values)[kChunkValues],
                                    Combine combine) {
  const bool upper = (threads.thread & (2 * kHalf)) != 0;
  CARILLON_UNROLL
  for (int i = 0; i < kHalf; ++i) {
    const float sent = upper ? values[i] : values[i + kHalf];
    const float kept = upper ? values[i + kHalf] : values[i];
    values[i] = combine(kept, threads.exchange(sent, 2 * kHalf));
  }
}

// Combines a chunk's values over the eight lanes that hold the same columns. Lanes halve what they
// keep: of 16 values a lane sends 8, then 4, then 2, so 14 exchanges in place of 48. A lane ends
// with columns 2 * lane and 2 * lane + 1 of the chunk, in values[0] and values[1].
template <class Threads, class Combine>
CARILLON_HOST_DEVICE void fold_chunk(Threads& threads, float (&values)[kChunkValues],
                                     Combine combine) {
  fold_half<8>(threads, values, combine);
  fold_half<4>(threads, values, combine);
  fold_half<2>(threads, values, combine);
}

// Writes a folded chunk where `gather` finds it.
template <class Threads>
CARILLON_HOST_DEVICE void put_chunk(Threads& threads, int chunk,
                                    const float (&values)[kChunkValues]) {
  float* to = threads.shared() + threads.thread / 32 * kTileColumns + chunk * kChunkColumns +
              threads.thread % 32 * 2;
  to[0] = values[0];
  to[1] = values[1];
}

// The column `which` (0 or 1) of the two that a thread answers for: 2 * thread + which.
template <class Threads, class Combine>
CARILLON_HOST_DEVICE float gather(Threads& threads, int which, Combine combine) {
  const float* from = threads.shared() + threads.thread * 2 + which;
  float value = from[0];
  CARILLON_UNROLL
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, from[warp * kTileColumns]);
  return value;
}

// Words `low` and `high` of two lanes: the upper lane gives its low one for the other's high one.
template <class Threads>
CARILLON_HOST_DEVICE void swap_words(Threads& threads, int mask, uint32_t& low, uint32_t& high) {
  const bool upper = (threads.thread & mask) != 0;
  const uint32_t got = threads.exchange(upper ? low : high, mask);
  low = upper ? got : low;
  high = upper ? high : got;
}

// Four words of each of a quad's four lanes, transposed: lane i ends with word i of each lane, in
// the lanes' order.
template <class Threads>
CARILLON_HOST_DEVICE void transpose_quad(Threads& threads, uint32_t (&words)[4]) {
  swap_words(threads, 1, words[0], words[1]);
  swap_words(threads, 1, words[2], words[3]);
  swap_words(threads, 2, words[0], words[2]);
  swap_words(threads, 2, words[1], words[3]);
}

}  // namespace carillon::contrastive
