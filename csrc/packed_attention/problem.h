// What packed_attention's CPU kernels are given: pointers, strides and lengths, free of torch.
#pragma once

#include "round_up.h"

#include <algorithm>
#include <cstdint>

namespace carillon::packed_attention {

// A tensor (tokens, heads, head_dim) whose last dimension is dense. Strides count elements.
struct Rows {
  void* data;
  int64_t token_stride;
  int64_t head_stride;
};

struct Problem {
  Rows q, k, v;
  Rows out;
  float* lse;  // (num_heads, total_q)
  const int64_t* starts_q;
  const int64_t* starts_k;
  const int64_t* prefixes;  // null without a prefix mask
  int64_t num_heads, num_kv_heads, head_dim, total_q;
  bool causal;
  float scale;
  // The backward pass only. grad_lse is null where it is zero.
  Rows grad_out, grad_q, grad_k, grad_v;
  const float* grad_lse;

  int64_t num_queries(int64_t s) const { return starts_q[s + 1] - starts_q[s]; }
  int64_t num_keys(int64_t s) const { return starts_k[s + 1] - starts_k[s]; }
  int64_t group() const { return num_heads / num_kv_heads; }

  // How many keys, counted from the first, a query sees: every mask is of this kind. It never
  // falls from one query to the next.
  int64_t visible(int64_t s, int64_t query) const {
    const int64_t keys = num_keys(s);
    if (!causal) return keys;
    const int64_t prefix = prefixes == nullptr ? 0 : prefixes[s];
    return std::clamp<int64_t>(query + keys - num_queries(s) + 1, prefix, keys);
  }
};

// All queries of a sequence that read one key head (backward), or a span of them (forward).
struct Task {
  int64_t sequence;
  int64_t kv_head;
  int64_t first_query;
  int64_t num_queries;
};

// Blocks that keep a task's working set in a 1 MB L2 cache: scores of a query block in float32
// beside the packed keys and values of a key block.
inline constexpr int64_t kQueryBlock = 96;
inline constexpr int64_t kForwardKeyBlock = 640;
inline constexpr int64_t kBackwardKeyBlock = 256;
// Queries of a forward task: enough that packing the keys again for the next task costs little.
inline constexpr int64_t kForwardSpan = 768;

// Equal blocks of at most `most`, a multiple of 16 (the widest vector): no thin last block.
inline int64_t key_block(int64_t num_keys, int64_t most) {
  const int64_t blocks = std::max<int64_t>(1, (num_keys + most - 1) / most);
  return round_up((num_keys + blocks - 1) / blocks, 16);
}

// The largest block of any sequence of at most `max_keys` keys.
inline int64_t largest_key_block(int64_t max_keys, int64_t most) {
  return std::min(round_up(max_keys, 16), most);
}

// Hands out parts of one buffer, 64-byte aligned. Sizes are in floats; without a buffer it counts.
class Scratch {
 public:
  explicit Scratch(float* buffer) : buffer_(buffer) {}
  float* take(int64_t size) {
    float* part = buffer_ == nullptr ? nullptr : buffer_ + used_;
    used_ += round_up(size, 16);
    return part;
  }
  int64_t used() const { return used_; }

 private:
  float* buffer_;
  int64_t used_ = 0;
};

// The kernels of one instruction set.
struct Kernels {
  void (*forward_float)(const Problem&, const Task&, float* scratch);
  void (*forward_bfloat16)(const Problem&, const Task&, float* scratch);
  void (*backward_float)(const Problem&, const Task&, float* scratch);
  void (*backward_bfloat16)(const Problem&, const Task&, float* scratch);
  int64_t (*forward_scratch)(int64_t head_dim, int64_t max_keys);
  int64_t (*backward_scratch)(int64_t head_dim, int64_t max_queries, int64_t max_keys);
};

}  // namespace carillon::packed_attention
