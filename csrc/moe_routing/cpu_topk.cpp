// moe_topk on the CPU: one pass over the logits gives weights, choices, counts and both losses'
// inputs. Tokens go in chunks of a fixed size, whose sums are added in order: the result does not
// depend on the number of threads.
#include "check.h"

#include "cpu_dispatch.h"
#include "vector_exp.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

namespace carillon::moe_routing {
namespace {

constexpr int64_t kChunkTokens = 256;
constexpr int64_t kLanes = 16;  // partial sums, so that a sum vectorises in a fixed order
constexpr float kSmallestSum = 1e-20f;
constexpr int64_t kNoKey = std::numeric_limits<int64_t>::min();

struct Routing {
  int64_t num_experts;
  int64_t padded;  // num_experts up to a multiple of kLanes
  int64_t k;
  bool sigmoid;
  bool renormalize;
  float scale;
};

// Scratch of one chunk. Lanes past num_experts hold scores of zero.
struct Scratch {
  explicit Scratch(const Routing& routing)
      : logits(routing.padded), scores(routing.padded), softmax(routing.padded),
        grads(routing.padded), keys(routing.padded) {}
  std::vector<float> logits, scores, softmax, grads;
  std::vector<int64_t> keys;
};

CARILLON_INLINE float sum_of_lanes(const float* values, int64_t padded) {
  float lanes[kLanes] = {};
  for (int64_t e = 0; e < padded; e += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += values[e + l];
  }
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

// Order-preserving bits of a float; -0 and 0 are one value.
CARILLON_INLINE int32_t ordered(float value) {
  const int32_t bits = std::bit_cast<int32_t>(value + 0.0f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

struct Softmax {
  float log_sum_exp;
  bool finite;
};

// Fills scratch's logits, softmax and scores from one token's logits.
CARILLON_INLINE Softmax score_token(const Routing& routing, const float* logits, Scratch& scratch) {
  float* __restrict x = scratch.logits.data();
  float* __restrict softmax = scratch.softmax.data();
  float* __restrict scores = scratch.scores.data();
  const int64_t num_experts = routing.num_experts;
  int32_t largest_key = std::numeric_limits<int32_t>::min();
  int32_t not_finite = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const float value = logits[e];
    x[e] = value;
    largest_key = std::max(largest_key, ordered(value));
    not_finite |= (std::bit_cast<int32_t>(value) & 0x7f800000) == 0x7f800000 ? 1 : 0;
  }
  if (not_finite) return {0, false};
  const float largest = std::bit_cast<float>(largest_key ^ ((largest_key >> 31) & 0x7fffffff));
  for (int64_t e = 0; e < num_experts; ++e) softmax[e] = exp_of_nonpositive(x[e] - largest);
  const float sum = sum_of_lanes(softmax, routing.padded);
  const float inverse = 1.0f / sum;
  for (int64_t e = 0; e < num_experts; ++e) softmax[e] *= inverse;
  if (routing.sigmoid) {
    for (int64_t e = 0; e < num_experts; ++e) {
      const float small = exp_of_nonpositive(-std::abs(x[e]));
      scores[e] = (x[e] < 0 ? small : 1.0f) / (1.0f + small);
    }
  } else {
    for (int64_t e = 0; e < num_experts; ++e) scores[e] = softmax[e];
  }
  return {largest + std::log(sum), true};
}

// Eight keys at once: GCC does not vectorise a maximum of 64-bit integers by itself.
constexpr int64_t kKeys = 8;
using Keys = int64_t __attribute__((vector_size(kKeys * sizeof(int64_t))));

CARILLON_INLINE int64_t largest_of(const Keys& keys) {
  Keys other = __builtin_shuffle(keys, Keys{4, 5, 6, 7, 0, 1, 2, 3});
  Keys best = keys < other ? other : keys;
  other = __builtin_shuffle(best, Keys{2, 3, 0, 1, 6, 7, 4, 5});
  best = best < other ? other : best;
  return best[0] < best[1] ? best[1] : best[0];
}

// The k best by (value, lower index): unique keys, so the next best is the largest below the last.
CARILLON_INLINE void choose(const Routing& routing, const float* by, const float* bias, Scratch& scratch,
                   int32_t* indices) {
  int64_t* __restrict keys = scratch.keys.data();
  for (int64_t e = 0; e < routing.num_experts; ++e) {
    const float value = bias == nullptr ? by[e] : by[e] + bias[e];
    keys[e] = (static_cast<int64_t>(ordered(value)) << 32) | (0x7fffffff - e);
  }
  const Keys all_no_key = Keys{} + kNoKey;
  Keys below = Keys{} + std::numeric_limits<int64_t>::max();
  for (int64_t j = 0; j < routing.k; ++j) {
    Keys largest = all_no_key;
    for (int64_t e = 0; e < routing.padded; e += kKeys) {
      Keys some;
      std::memcpy(&some, keys + e, sizeof(some));
      some = some < below ? some : all_no_key;
      largest = largest < some ? some : largest;
    }
    const int64_t best = largest_of(largest);
    indices[j] = static_cast<int32_t>(0x7fffffff - (best & 0x7fffffff));
    below = Keys{} + best;
  }
}

// One chunk's sums: mean_scores before division, z_loss before division, slots an expert.
struct ChunkSums {
  float* scores;
  int32_t* counts;
  float z;
  bool finite;
};

CARILLON_CPU_CLONES
void topk_chunk(const Routing& routing, const float* logits, const float* bias,
                int64_t num_tokens, float* weights, int32_t* indices, Scratch& scratch,
                ChunkSums& sums) {
  const int64_t k = routing.k;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const Softmax softmax = score_token(routing, logits + t * routing.num_experts, scratch);
    if (!softmax.finite) {
      sums.finite = false;
      return;
    }
    const float* __restrict scores = scratch.scores.data();
    int32_t* chosen = indices + t * k;
    choose(routing, bias == nullptr ? scratch.logits.data() : scores, bias, scratch, chosen);
    float chosen_sum = 0;
    for (int64_t j = 0; j < k; ++j) chosen_sum += scores[chosen[j]];
    const float factor =
        routing.renormalize ? routing.scale / (chosen_sum + kSmallestSum) : routing.scale;
    for (int64_t j = 0; j < k; ++j) {
      weights[t * k + j] = scores[chosen[j]] * factor;
      ++sums.counts[chosen[j]];
    }
    const float share =
        routing.sigmoid ? 1.0f / (sum_of_lanes(scores, routing.padded) + kSmallestSum) : 1.0f;
    float* __restrict total = sums.scores;
    for (int64_t e = 0; e < routing.num_experts; ++e) total[e] += scores[e] * share;
    sums.z += softmax.log_sum_exp * softmax.log_sum_exp;
  }
}

// grad_means is already divided by the number of tokens, grad_z doubled and divided.
CARILLON_CPU_CLONES
void topk_backward_chunk(const Routing& routing, const float* logits, const int32_t* indices,
                         const float* grad_weights, const float* grad_means, float grad_z,
                         int64_t num_tokens, Scratch& scratch, float* grad_logits) {
  const int64_t k = routing.k;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const float z = score_token(routing, logits + t * routing.num_experts, scratch).log_sum_exp;
    const float* __restrict scores = scratch.scores.data();
    const float* __restrict softmax = scratch.softmax.data();
    float* __restrict grads = scratch.grads.data();
    float* __restrict product = scratch.logits.data();
    const int64_t num_experts = routing.num_experts;
    if (routing.sigmoid) {
      const float inverse = 1.0f / (sum_of_lanes(scores, routing.padded) + kSmallestSum);
      for (int64_t e = 0; e < num_experts; ++e) product[e] = grad_means[e] * (scores[e] * inverse);
      const float mean = sum_of_lanes(product, routing.padded);
      for (int64_t e = 0; e < num_experts; ++e) grads[e] = (grad_means[e] - mean) * inverse;
    } else {
      for (int64_t e = 0; e < num_experts; ++e) grads[e] = grad_means[e];
    }
    const int32_t* chosen = indices + t * k;
    const float* grad = grad_weights + t * k;
    float factor = routing.scale, mean = 0;
    if (routing.renormalize) {
      float sum = kSmallestSum, weighted = 0;
      for (int64_t j = 0; j < k; ++j) {
        sum += scores[chosen[j]];
        weighted += scores[chosen[j]] * grad[j];
      }
      factor /= sum;
      mean = weighted / sum;
    }
    for (int64_t j = 0; j < k; ++j) grads[chosen[j]] += (grad[j] - mean) * factor;
    float* __restrict out = grad_logits + t * num_experts;
    const float of_z = grad_z * z;
    if (routing.sigmoid) {
      for (int64_t e = 0; e < num_experts; ++e) {
        out[e] = grads[e] * scores[e] * (1.0f - scores[e]) + of_z * softmax[e];
      }
    } else {
      for (int64_t e = 0; e < num_experts; ++e) product[e] = grads[e] * scores[e];
      const float dot = sum_of_lanes(product, routing.padded);
      for (int64_t e = 0; e < num_experts; ++e) out[e] = softmax[e] * (grads[e] - dot + of_z);
    }
  }
}

Routing routing_of(const at::Tensor& logits, int64_t k, std::string_view score, bool renormalize,
                   double scale) {
  const int64_t num_experts = logits.size(1);
  return {num_experts, (num_experts + kLanes - 1) / kLanes * kLanes, k, score == "sigmoid",
          renormalize, static_cast<float>(scale)};
}

// Calls body(chunk, first token, number of tokens, scratch).
template <typename Body>
void for_each_chunk(const Routing& routing, int64_t num_tokens, const Body& body) {
  const int64_t num_chunks = (num_tokens + kChunkTokens - 1) / kChunkTokens;
  at::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(routing);
    std::fill(scratch.keys.begin(), scratch.keys.end(), kNoKey);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunkTokens;
      // The lanes past the last expert are read by sums and must be zero.
      std::fill(scratch.logits.begin(), scratch.logits.end(), 0.0f);
      body(chunk, first, std::min(kChunkTokens, num_tokens - first), scratch);
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> moe_topk(
    const at::Tensor& logits, int64_t k, c10::string_view score, bool renormalize, double scale,
    const std::optional<at::Tensor>& selection_bias) {
  check_topk(logits, k, score, scale, selection_bias);
  const Routing routing = routing_of(logits, k, score, renormalize, scale);
  const int64_t num_tokens = logits.size(0), num_experts = routing.num_experts;
  const at::Tensor source = logits.to(at::kFloat).contiguous();
  const at::Tensor bias = selection_bias ? selection_bias->contiguous() : at::Tensor();
  const float* by_bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  for (int64_t e = 0; by_bias != nullptr && e < num_experts; ++e) {
    TORCH_CHECK_VALUE(std::isfinite(by_bias[e]), "moe_topk: selection_bias must be finite");
  }
  const auto options = source.options();
  at::Tensor weights = at::empty({num_tokens, k}, options);
  at::Tensor indices = at::empty({num_tokens, k}, options.dtype(at::kInt));
  at::Tensor counts = at::empty({num_experts}, options.dtype(at::kInt));
  at::Tensor means = at::empty({num_experts}, options);
  at::Tensor z_loss = at::empty({}, options);

  const int64_t num_chunks = (num_tokens + kChunkTokens - 1) / kChunkTokens;
  std::vector<float> chunk_scores(num_chunks * num_experts, 0.0f);
  std::vector<int32_t> chunk_counts(num_chunks * num_experts, 0);
  std::vector<float> chunk_z(num_chunks, 0.0f);
  std::atomic<bool> finite = true;
  const float* from = source.const_data_ptr<float>();
  float* to_weights = weights.mutable_data_ptr<float>();
  int32_t* to_indices = indices.mutable_data_ptr<int32_t>();
  for_each_chunk(routing, num_tokens, [&](int64_t chunk, int64_t first, int64_t count,
                                          Scratch& scratch) {
    ChunkSums sums{chunk_scores.data() + chunk * num_experts,
                   chunk_counts.data() + chunk * num_experts, 0.0f, true};
    topk_chunk(routing, from + first * num_experts, by_bias, count, to_weights + first * k,
               to_indices + first * k, scratch, sums);
    chunk_z[chunk] = sums.z;
    if (!sums.finite) finite = false;
  });
  TORCH_CHECK_VALUE(finite, "moe_topk: logits must be finite");

  const double divisor = static_cast<double>(std::max<int64_t>(num_tokens, 1));
  for (int64_t e = 0; e < num_experts; ++e) {
    double sum = 0;
    int32_t count = 0;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      sum += chunk_scores[chunk * num_experts + e];
      count += chunk_counts[chunk * num_experts + e];
    }
    means.mutable_data_ptr<float>()[e] = static_cast<float>(sum / divisor);
    counts.mutable_data_ptr<int32_t>()[e] = count;
  }
  double z = 0;
  for (const float part : chunk_z) z += part;
  *z_loss.mutable_data_ptr<float>() = static_cast<float>(z / divisor);
  return {weights, indices, counts, means, z_loss};
}

at::Tensor moe_topk_backward(const at::Tensor& grad_weights, const at::Tensor& grad_means,
                             const at::Tensor& grad_z, const at::Tensor& logits,
                             const at::Tensor& indices, c10::string_view score, bool renormalize,
                             double scale) {
  const char* op = "moe_topk_backward";
  check_topk_backward(grad_weights, grad_means, grad_z, logits, indices, score, scale);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1), k = indices.size(1);
  const Routing routing = routing_of(logits, k, score, renormalize, scale);
  const at::Tensor source = logits.to(at::kFloat).contiguous();
  const at::Tensor chosen = indices.contiguous();
  const at::Tensor grads = grad_weights.to(at::kFloat).contiguous();
  const at::Tensor means = grad_means.to(at::kFloat).contiguous();
  const int32_t* slots = chosen.const_data_ptr<int32_t>();
  for (int64_t s = 0; s < chosen.numel(); ++s) {
    TORCH_CHECK_VALUE(slots[s] >= 0 && slots[s] < num_experts, op, ": indices must be from 0 to ",
                      num_experts - 1, ", got ", slots[s]);
  }
  const float divisor = static_cast<float>(std::max<int64_t>(num_tokens, 1));
  std::vector<float> scaled(means.const_data_ptr<float>(),
                            means.const_data_ptr<float>() + num_experts);
  for (float& value : scaled) value /= divisor;
  const float z = 2.0f * grad_z.to(at::kFloat).item<float>() / divisor;
  at::Tensor out = at::empty({num_tokens, num_experts}, source.options());
  for_each_chunk(routing, num_tokens, [&](int64_t, int64_t first, int64_t count,
                                          Scratch& scratch) {
    topk_backward_chunk(routing, source.const_data_ptr<float>() + first * num_experts,
                        slots + first * k, grads.const_data_ptr<float>() + first * k,
                        scaled.data(), z, count, scratch,
                        out.mutable_data_ptr<float>() + first * num_experts);
  });
  return out.to(logits.scalar_type());
}

}  // namespace
}  // namespace carillon::moe_routing

TORCH_LIBRARY_IMPL(carillon, CPU, m) {
  m.impl("moe_topk", &carillon::moe_routing::moe_topk);
  m.impl("moe_topk_backward", &carillon::moe_routing::moe_topk_backward);
}
