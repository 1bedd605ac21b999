// The inner loops over rows: plain loops that are compiled for several instruction sets, and the
// writer that goes past the caches.
#pragma once

#include "bfloat16_bits.h"
#include "cpu_dispatch.h"

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace carillon::moe_routing {

inline constexpr int64_t kLineBytes = 64;

inline void prefetch(const char* address) { __builtin_prefetch(address, 0, 2); }

// Writes whole rows, past the caches where the result is larger than they are: a plain store would
// first read the line it overwrites.
class RowWriter {
 public:
  RowWriter(const void* target, int64_t row_bytes, size_t total_bytes)
      : row_bytes_(row_bytes),
        streams_(total_bytes >= kStreamBytes && row_bytes % kLineBytes == 0 &&
                 reinterpret_cast<uintptr_t>(target) % kLineBytes == 0) {}

  void write(const void* from, void* to) const {
#ifdef __SSE2__
    if (streams_) {
      const auto* source = static_cast<const __m128i*>(from);
      auto* target = static_cast<__m128i*>(to);
      for (int64_t i = 0; i < row_bytes_ / 16; i += 4) {
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
    std::memcpy(to, from, static_cast<size_t>(row_bytes_));
  }

  // Makes this thread's writes visible before others are told of them.
  void finish() const {
#ifdef __SSE2__
    if (streams_) _mm_sfence();
#endif
  }

 private:
  static constexpr size_t kStreamBytes = size_t{8} << 20;
  int64_t row_bytes_;
  bool streams_;
};

// The rows that a token takes, with their factors, and those of the next token to prefetch.
struct RowsOfToken {
  const char* const* rows;
  const float* factors;
  int64_t count;
  const char* const* next;
  int64_t num_next;
  int64_t width;
};

template <int kRows, typename T>
CARILLON_INLINE void add_rows(const RowsOfToken& token, int64_t first,
                                                    int64_t begin, int64_t count, float* sums) {
  const T* rows[kRows];
  float factors[kRows];
  for (int i = 0; i < kRows; ++i) {
    rows[i] = reinterpret_cast<const T*>(token.rows[first + i]) + begin;
    factors[i] = token.factors[first + i];
  }
#pragma GCC ivdep
  for (int64_t d = 0; d < count; ++d) {
    float sum = sums[d];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sum += factors[i] * load_as_float(rows[i][d]);
    sums[d] = sum;
  }
}

// Slots are added in their order, a block of columns at a time so that the sums stay in L1.
template <typename T>
CARILLON_INLINE void sum_rows(const RowsOfToken& token, void* target) {
  constexpr int64_t kBlock = 1024;
  alignas(kLineBytes) float sums[kBlock];
  T* __restrict out = static_cast<T*>(target);
  for (int64_t begin = 0; begin < token.width; begin += kBlock) {
    const int64_t count = token.width - begin < kBlock ? token.width - begin : kBlock;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    for (int64_t j = 0; j < token.num_next; ++j) {
      const char* next = token.next[j] + begin * static_cast<int64_t>(sizeof(T));
      for (int64_t b = 0; b < bytes; b += kLineBytes) prefetch(next + b);
    }
    for (int64_t d = 0; d < count; ++d) sums[d] = 0;
    int64_t i = 0;
    for (; i + 8 <= token.count; i += 8) add_rows<8, T>(token, i, begin, count, sums);
    if (i + 4 <= token.count) add_rows<4, T>(token, i, begin, count, sums), i += 4;
    if (i + 2 <= token.count) add_rows<2, T>(token, i, begin, count, sums), i += 2;
    if (i < token.count) add_rows<1, T>(token, i, begin, count, sums);
    for (int64_t d = 0; d < count; ++d) store_from_float(sums[d], out[begin + d]);
  }
}

CARILLON_CPU_CLONES
static void sum_rows_float(const RowsOfToken& token, void* out) { sum_rows<float>(token, out); }

CARILLON_CPU_CLONES
static void sum_rows_bfloat16(const RowsOfToken& token, void* out) {
  sum_rows<uint16_t>(token, out);
}

// out = factor * grad, and returns the dot product of grad and row; prefetches another row.
template <typename T>
CARILLON_INLINE float scale_and_dot(const float* __restrict grad,
                                                          const void* row_bytes, float factor,
                                                          int64_t width, const char* next,
                                                          void* target) {
  constexpr int64_t kLanes = 32;
  const T* __restrict row = static_cast<const T*>(row_bytes);
  T* __restrict out = static_cast<T*>(target);
  const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
  for (int64_t b = 0; b < bytes; b += kLineBytes) prefetch(next + b);
  float lanes[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      lanes[l] += grad[d + l] * load_as_float(row[d + l]);
      store_from_float(factor * grad[d + l], out[d + l]);
    }
  }
  float sum = 0;
  for (; d < width; ++d) {
    sum += grad[d] * load_as_float(row[d]);
    store_from_float(factor * grad[d], out[d]);
  }
  for (const float lane : lanes) sum += lane;
  return sum;
}

CARILLON_CPU_CLONES
static float scale_and_dot_float(const float* grad, const void* row, float factor, int64_t width,
                                 const char* next, void* out) {
  return scale_and_dot<float>(grad, row, factor, width, next, out);
}

CARILLON_CPU_CLONES
static float scale_and_dot_bfloat16(const float* grad, const void* row, float factor,
                                    int64_t width, const char* next, void* out) {
  return scale_and_dot<uint16_t>(grad, row, factor, width, next, out);
}

inline void load_row(const char* row, bool bfloat16, int64_t width, float* out) {
  if (!bfloat16) {
    std::memcpy(out, row, static_cast<size_t>(width) * sizeof(float));
    return;
  }
  const auto* bits = reinterpret_cast<const uint16_t*>(row);
  for (int64_t d = 0; d < width; ++d) out[d] = load_as_float(bits[d]);
}

}  // namespace carillon::moe_routing
