// moe_topk and its gradient on CUDA: a group of 8 to 32 lanes holds a token's scores in registers.
// Sums over tokens are added in a fixed order: a group's tokens, a block's groups, the blocks.
#include "cuda.h"
#include "topk_lane.h"

#include <cuda_bf16.h>

#include <cmath>

namespace carillon::moe_routing {
namespace {

constexpr int kThreads = 128;
constexpr int kTokens = 8;  // of a group, one after another
constexpr int kWarp = 32;
constexpr float kSmallestSum = 1e-20f;

__device__ float to_float(float value) { return value; }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ void store(float value, float& to) { to = value; }
__device__ void store(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }

// Reductions over the lanes of one group; every lane gets the result.
template <int kLanes>
struct Group {
  unsigned mask;

  __device__ Group() {
    const unsigned all = kLanes == kWarp ? ~0u : (1u << (kLanes % kWarp)) - 1;
    mask = all << (threadIdx.x % kWarp / kLanes * kLanes);
  }
  __device__ float sum(float value) const {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      value += __shfl_xor_sync(mask, value, step, kLanes);
    }
    return value;
  }
  __device__ float largest(float value) const {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      value = fmaxf(value, __shfl_xor_sync(mask, value, step, kLanes));
    }
    return value;
  }
  __device__ int64_t largest(int64_t value) const {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      const long long other = __shfl_xor_sync(mask, static_cast<long long>(value), step, kLanes);
      value = value < other ? other : value;
    }
    return value;
  }
  __device__ float from(float value, int lane) const {
    return __shfl_sync(mask, value, lane, kLanes);
  }
};

// A lane's logits, softmax and scores of one token; zero, and -inf, past the last expert.
template <typename Element, int kLanes, int kValues>
struct Scores {
  float logits[kValues], softmax[kValues], scores[kValues];
  float log_sum_exp;

  __device__ Scores(const Route& of, const Group<kLanes>& group, int64_t token, int lane) {
    const Element* row = static_cast<const Element*>(of.logits) + token * of.num_experts;
    float largest = -INFINITY;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const int expert = TopkLane<kLanes, kValues>::expert(lane, v);
      logits[v] = expert < of.num_experts ? to_float(row[expert]) : -INFINITY;
      largest = fmaxf(largest, logits[v]);
    }
    largest = group.largest(largest);
    float total = 0;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const bool is_expert = TopkLane<kLanes, kValues>::expert(lane, v) < of.num_experts;
      softmax[v] = is_expert ? expf(logits[v] - largest) : 0.0f;
      total += softmax[v];
    }
    total = group.sum(total);
    log_sum_exp = largest + logf(total);
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const bool is_expert = TopkLane<kLanes, kValues>::expert(lane, v) < of.num_experts;
      softmax[v] /= total;
      scores[v] = softmax[v];
      if (of.sigmoid) {
        const float small = expf(-fabsf(logits[v]));
        scores[v] = is_expert ? (logits[v] < 0 ? small : 1.0f) / (1.0f + small) : 0.0f;
      }
    }
  }
};

// Tokens first to last - 1 of this thread's group.
template <int kLanes>
struct TokensOfGroup {
  int64_t first, last;

  __device__ explicit TokensOfGroup(int64_t num_tokens) {
    first = (int64_t{blockIdx.x} * (kThreads / kLanes) + threadIdx.x / kLanes) * kTokens;
    last = first + kTokens < num_tokens ? first + kTokens : num_tokens;
  }
};

template <typename Element, int kLanes, int kValues>
__global__ void __launch_bounds__(kThreads)
    route_tokens(Route of, const float* __restrict__ bias, RouteOutputs to) {
  using Lane = TopkLane<kLanes, kValues>;
  const Group<kLanes> group;
  const int lane = threadIdx.x % kLanes;
  const TokensOfGroup<kLanes> tokens(of.num_tokens);
  float sums[kValues] = {}, squares = 0;
  int32_t counts[kValues] = {};
  for (int64_t token = tokens.first; token < tokens.last; ++token) {
    const Scores<Element, kLanes, kValues> of_token(of, group, token, lane);
    Lane chooser;
    float score_sum = 0;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const int expert = Lane::expert(lane, v);
      const bool is_expert = expert < of.num_experts;
      const float score = of_token.scores[v];
      const float by = bias != nullptr && is_expert ? score + bias[expert] : of_token.logits[v];
      chooser.set(v, is_expert, by);
      score_sum += score;
    }
    float chosen_sum = 0;
    for (int j = 0; j < of.k; ++j) {
      const int32_t chosen = expert_of(group.largest(chooser.best(lane)));
      chooser.take(lane, chosen, j);
      float score = 0;
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        if (chooser.ranks[v] == j) score = of_token.scores[v];
      }
      chosen_sum += group.from(score, chosen % kLanes);
    }
    const float factor = of.renormalize ? of.scale / (chosen_sum + kSmallestSum) : of.scale;
    const float share = of.sigmoid ? 1.0f / (group.sum(score_sum) + kSmallestSum) : 1.0f;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      sums[v] += of_token.scores[v] * share;
      if (chooser.ranks[v] < 0) continue;
      ++counts[v];
      const int64_t slot = token * of.k + chooser.ranks[v];
      to.weights[slot] = of_token.scores[v] * factor;
      to.indices[slot] = Lane::expert(lane, v);
    }
    squares += of_token.log_sum_exp * of_token.log_sum_exp;
  }

  __shared__ float block_sums[kLanes * kValues], block_squares;
  __shared__ int32_t block_counts[kLanes * kValues];
  for (int turn = 0; turn < kThreads / kLanes; ++turn) {
    if (static_cast<int>(threadIdx.x) / kLanes == turn) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        const int expert = Lane::expert(lane, v);
        block_sums[expert] = sums[v] + (turn == 0 ? 0.0f : block_sums[expert]);
        block_counts[expert] = counts[v] + (turn == 0 ? 0 : block_counts[expert]);
      }
      if (lane == 0) block_squares = squares + (turn == 0 ? 0.0f : block_squares);
    }
    __syncthreads();
  }
  const int64_t part = blockIdx.x;
  for (int e = threadIdx.x; e < of.num_experts; e += kThreads) {
    to.part_sums[part * (of.num_experts + 1) + e] = block_sums[e];
    to.part_counts[part * of.num_experts + e] = block_counts[e];
  }
  if (threadIdx.x == 0) {
    to.part_sums[part * (of.num_experts + 1) + of.num_experts] = block_squares;
  }
}

// Adds the blocks' parts: a thread every 32nd of a column, then 32 threads' sums in order.
__global__ void __launch_bounds__(kWarp* kWarp)
    add_parts(RouteOutputs to, int64_t num_parts, int64_t num_tokens, int32_t num_experts) {
  const int column = blockIdx.x * kWarp + threadIdx.x;
  double sum = 0;
  int32_t count = 0;
  for (int64_t part = threadIdx.y; part < num_parts; part += kWarp) {
    if (column <= num_experts) sum += to.part_sums[part * (num_experts + 1) + column];
    if (column < num_experts) count += to.part_counts[part * num_experts + column];
  }
  __shared__ double sums[kWarp][kWarp + 1];
  __shared__ int32_t counts[kWarp][kWarp + 1];
  sums[threadIdx.y][threadIdx.x] = sum;
  counts[threadIdx.y][threadIdx.x] = count;
  __syncthreads();
  if (threadIdx.y != 0 || column > num_experts) return;
  for (int row = 1; row < kWarp; ++row) {
    sum += sums[row][threadIdx.x];
    count += counts[row][threadIdx.x];
  }
  const auto mean = static_cast<float>(sum / static_cast<double>(num_tokens > 0 ? num_tokens : 1));
  if (column == num_experts) {
    *to.z_loss = mean;
  } else {
    to.means[column] = mean;
    to.counts[column] = count;
  }
}

template <typename Element, int kLanes, int kValues>
__global__ void __launch_bounds__(kThreads)
    route_gradients(Route of, RouteGradients grads, Element* __restrict__ grad_logits) {
  using Lane = TopkLane<kLanes, kValues>;
  const Group<kLanes> group;
  const int lane = threadIdx.x % kLanes;
  const TokensOfGroup<kLanes> tokens(of.num_tokens);
  const float inverse_tokens = 1.0f / static_cast<float>(of.num_tokens);
  for (int64_t token = tokens.first; token < tokens.last; ++token) {
    const Scores<Element, kLanes, kValues> of_token(of, group, token, lane);
    float by_score[kValues], score_sum = 0, weighted_means = 0;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const int expert = Lane::expert(lane, v);
      by_score[v] = expert < of.num_experts ? grads.means[expert] * inverse_tokens : 0.0f;
      score_sum += of_token.scores[v];
      weighted_means += by_score[v] * of_token.scores[v];
    }
    if (of.sigmoid) {
      const float inverse = 1.0f / (group.sum(score_sum) + kSmallestSum);
      const float mean = group.sum(weighted_means) * inverse;
#pragma unroll
      for (int v = 0; v < kValues; ++v) by_score[v] = (by_score[v] - mean) * inverse;
    }
    // An index that is no expert is no lane's.
    float total = 0, weighted = 0;
    for (int j = 0; of.renormalize && j < of.k; ++j) {
      const int32_t chosen = grads.indices[token * of.k + j];
      const float grad = grads.weights[token * of.k + j];
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        if (Lane::expert(lane, v) != chosen) continue;
        total += of_token.scores[v];
        weighted += of_token.scores[v] * grad;
      }
    }
    float inverse = 1.0f, mean = 0.0f;
    if (of.renormalize) {
      inverse = 1.0f / (group.sum(total) + kSmallestSum);
      mean = group.sum(weighted) * inverse;
    }
    for (int j = 0; j < of.k; ++j) {
      const int32_t chosen = grads.indices[token * of.k + j];
      const float grad = (grads.weights[token * of.k + j] - mean) * inverse * of.scale;
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        if (Lane::expert(lane, v) == chosen) by_score[v] += grad;
      }
    }
    float dot = 0;
#pragma unroll
    for (int v = 0; v < kValues; ++v) dot += by_score[v] * of_token.scores[v];
    dot = group.sum(dot);
    const float by_z = 2.0f * *grads.z_loss * inverse_tokens * of_token.log_sum_exp;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const int expert = Lane::expert(lane, v);
      if (expert >= of.num_experts) continue;
      const float score = of_token.scores[v], softmax = of_token.softmax[v];
      const float grad = of.sigmoid ? by_score[v] * score * (1.0f - score) + by_z * softmax
                                    : softmax * (by_score[v] - dot + by_z);
      store(grad, grad_logits[token * of.num_experts + expert]);
    }
  }
}

// Calls body(lanes, values) with the smallest group that holds the experts, as constants.
template <typename Body>
auto with_group(int64_t num_experts, const Body& body) {
  if (num_experts <= 8) return body.template operator()<8, 1>();
  if (num_experts <= 64) return body.template operator()<16, 4>();
  if (num_experts <= 256) return body.template operator()<32, 8>();
  return body.template operator()<32, 16>();
}

}  // namespace

int64_t route_blocks(int64_t num_tokens, int64_t num_experts) {
  return with_group(num_experts, [&]<int kLanes, int kValues>() -> int64_t {
    constexpr int64_t kAtOnce = kThreads / kLanes * kTokens;
    return (num_tokens + kAtOnce - 1) / kAtOnce;
  });
}

cudaError_t route(const Route& of, const float* bias, const RouteOutputs& to,
                  cudaStream_t stream) {
  const int64_t blocks = route_blocks(of.num_tokens, of.num_experts);
  if (blocks > 0) {
    with_group(of.num_experts, [&]<int kLanes, int kValues>() {
      const auto grid = static_cast<unsigned>(blocks);
      if (of.bfloat16) {
        route_tokens<__nv_bfloat16, kLanes, kValues><<<grid, kThreads, 0, stream>>>(of, bias, to);
      } else {
        route_tokens<float, kLanes, kValues><<<grid, kThreads, 0, stream>>>(of, bias, to);
      }
    });
  }
  const auto columns = static_cast<unsigned>(of.num_experts / kWarp + 1);
  add_parts<<<columns, dim3(kWarp, kWarp), 0, stream>>>(to, blocks, of.num_tokens,
                                                        of.num_experts);
  return cudaGetLastError();
}

cudaError_t route_backward(const Route& of, const RouteGradients& grads, void* grad_logits,
                           cudaStream_t stream) {
  const int64_t blocks = route_blocks(of.num_tokens, of.num_experts);
  if (blocks == 0) return cudaSuccess;
  with_group(of.num_experts, [&]<int kLanes, int kValues>() {
    const auto grid = static_cast<unsigned>(blocks);
    if (of.bfloat16) {
      route_gradients<__nv_bfloat16, kLanes, kValues>
          <<<grid, kThreads, 0, stream>>>(of, grads, static_cast<__nv_bfloat16*>(grad_logits));
    } else {
      route_gradients<float, kLanes, kValues>
          <<<grid, kThreads, 0, stream>>>(of, grads, static_cast<float*>(grad_logits));
    }
  });
  return cudaGetLastError();
}

}  // namespace carillon::moe_routing
