// Rows of tokens: what the loops of row_loops.h are given, and writes past the caches.
#pragma once

#include "cpu_dispatch.h"

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace carillon::moe_routing {

inline constexpr int64_t kLineBytes = 64;

inline void prefetch(const char* address) { __builtin_prefetch(address, 0, 2); }

// Whether a result is written past the caches: where it is larger than they are a plain store
// would first read the line it overwrites. Rows are then whole lines.
inline bool writes_past_caches(const void* target, int64_t row_bytes, size_t total_bytes) {
  constexpr size_t kStreamBytes = size_t{8} << 20;
#ifdef __SSE2__
  return total_bytes >= kStreamBytes && row_bytes % kLineBytes == 0 &&
         reinterpret_cast<uintptr_t>(target) % kLineBytes == 0;
#else
  static_cast<void>(target), static_cast<void>(row_bytes), static_cast<void>(total_bytes);
  return false;
#endif
}

// Writes bytes past the caches where `streams`: then they are whole lines and `to` is aligned.
CARILLON_INLINE void write_bytes(const void* from, void* to, int64_t size, bool streams) {
#ifdef __SSE2__
  if (streams) {
    const auto* source = static_cast<const __m128i*>(from);
    auto* target = static_cast<__m128i*>(to);
    for (int64_t i = 0; i < size / 16; i += 4) {
      const __m128i a = _mm_loadu_si128(source + i), b = _mm_loadu_si128(source + i + 1);
      const __m128i c = _mm_loadu_si128(source + i + 2), d = _mm_loadu_si128(source + i + 3);
      _mm_stream_si128(target + i, a);
      _mm_stream_si128(target + i + 1, b);
      _mm_stream_si128(target + i + 2, c);
      _mm_stream_si128(target + i + 3, d);
    }
    return;
  }
#endif
  static_cast<void>(streams);
  std::memcpy(to, from, static_cast<size_t>(size));
}

// Makes this thread's writes past the caches visible before others are told of them.
inline void finish_writes(bool streams) {
#ifdef __SSE2__
  if (streams) _mm_sfence();
#endif
  static_cast<void>(streams);
}

// The rows that a token takes, with their factors, and those of the next token to prefetch.
struct RowsOfToken {
  const char* const* rows;
  const float* factors;
  int64_t count;
  const char* const* next;
  int64_t num_next;
  int64_t width;
  bool streams;
};

// What one row of unpermute's gradient is made from; `next` is the row to prefetch.
struct ScaledRow {
  const void* grad;
  const void* row;
  const char* next;
  void* out;
  int64_t width;
  float factor;
  bool streams;
};

// One element type's loops.
struct RowLoops {
  void (*sum_rows)(const RowsOfToken& token, void* out);
  float (*scale_and_dot)(const ScaledRow& of);
};

struct RowTable {
  RowLoops float32;
  RowLoops bfloat16;
};

}  // namespace carillon::moe_routing
