// Argument checks of packed_attention, in the words of kernels/packed_attention/check.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <string_view>
#include <vector>

namespace carillon::packed_attention {

inline constexpr int64_t kMaxHeadDim = 256;
inline constexpr int64_t kHeadDimStep = 8;

// The lengths, read once, so that nothing can change them between the check and their use.
struct Lengths {
  std::vector<int64_t> starts_q, starts_k, prefixes;
};

inline std::vector<int64_t> values_of(const at::Tensor& indices) {
  const at::Tensor dense = indices.to(at::kLong).contiguous();
  const int64_t* first = dense.const_data_ptr<int64_t>();
  return {first, first + dense.numel()};
}

inline bool is_index(const at::Tensor& tensor) {
  return (tensor.scalar_type() == at::kInt || tensor.scalar_type() == at::kLong) &&
         tensor.dim() == 1;
}

inline void check_heads(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  TORCH_CHECK_VALUE(q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16,
                    "packed_attention: q must be float32 or bfloat16, got ", q.scalar_type());
  TORCH_CHECK_VALUE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                    "packed_attention: k and v must have q's dtype, got ", k.scalar_type(), " and ",
                    v.scalar_type());
  TORCH_CHECK_VALUE(q.dim() == 3,
                    "packed_attention: q must have the shape (total_q, num_heads, head_dim), got ",
                    q.sizes());
  TORCH_CHECK_VALUE(k.dim() == 3 && v.dim() == 3 && k.sizes() == v.sizes(),
                    "packed_attention: k and v must have one shape (total_k, num_kv_heads, "
                    "head_dim), got ",
                    k.sizes(), " and ", v.sizes());
  TORCH_CHECK_VALUE(q.size(2) == k.size(2) && q.size(2) % kHeadDimStep == 0 && q.size(2) > 0 &&
                        q.size(2) <= kMaxHeadDim,
                    "packed_attention: head_dim must be a multiple of ", kHeadDimStep, " from ",
                    kHeadDimStep, " to ", kMaxHeadDim, ", the same for q and k, got ", q.size(2),
                    " and ", k.size(2));
  TORCH_CHECK_VALUE(k.size(1) > 0 && q.size(1) > 0 && q.size(1) % k.size(1) == 0,
                    "packed_attention: num_heads must be a multiple of num_kv_heads, got ",
                    q.size(1), " and ", k.size(1));
}

inline std::vector<int64_t> check_starts(std::string_view of, const at::Tensor& cu_seqlens,
                                         int64_t total, int64_t max_seqlen) {
  std::vector<int64_t> starts = values_of(cu_seqlens);
  TORCH_CHECK_VALUE(starts.front() == 0 && starts.back() == total, "packed_attention: cu_seqlens_",
                    of, " must begin with 0 and end with total_", of, " = ", total, ", got ",
                    starts.front(), " and ", starts.back());
  for (size_t i = 0; i + 1 < starts.size(); ++i) {
    TORCH_CHECK_VALUE(starts[i] <= starts[i + 1], "packed_attention: cu_seqlens_", of,
                      " must not decrease, got ", starts[i], " then ", starts[i + 1], " at ", i);
    TORCH_CHECK_VALUE(starts[i + 1] - starts[i] <= max_seqlen, "packed_attention: max_seqlen_", of,
                      " must be at least the longest length, got ", max_seqlen,
                      " where sequence ", i, " has ", starts[i + 1] - starts[i]);
  }
  return starts;
}

inline void check_cu_seqlens(std::string_view name, const at::Tensor& cu_seqlens) {
  TORCH_CHECK_VALUE(is_index(cu_seqlens) && cu_seqlens.size(0) > 0, "packed_attention: ", name,
                    " must be int32 or int64 of the shape (num_sequences + 1,), got ",
                    cu_seqlens.scalar_type(), " ", cu_seqlens.sizes());
}

inline void check_device(std::string_view name, const at::Tensor& tensor, const at::Tensor& q) {
  TORCH_CHECK_VALUE(tensor.device() == q.device(), "packed_attention: ", name,
                    " must be on q's device ", q.device(), ", got ", tensor.device());
}

inline Lengths check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                     int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal,
                     const std::optional<at::Tensor>& prefix_lengths, std::optional<double> scale) {
  check_heads(q, k, v);
  check_cu_seqlens("cu_seqlens_q", cu_seqlens_q);
  check_cu_seqlens("cu_seqlens_k", cu_seqlens_k);
  TORCH_CHECK_VALUE(cu_seqlens_q.size(0) == cu_seqlens_k.size(0),
                    "packed_attention: cu_seqlens_q and cu_seqlens_k must be equally long, got ",
                    cu_seqlens_q.size(0), " and ", cu_seqlens_k.size(0));
  check_device("k", k, q);
  check_device("v", v, q);
  check_device("cu_seqlens_q", cu_seqlens_q, q);
  check_device("cu_seqlens_k", cu_seqlens_k, q);
  if (prefix_lengths) {
    TORCH_CHECK_VALUE(causal,
                      "packed_attention: prefix_lengths widens the causal mask: pass causal=True, "
                      "got False");
    TORCH_CHECK_VALUE(
        is_index(*prefix_lengths) && prefix_lengths->size(0) == cu_seqlens_q.size(0) - 1,
        "packed_attention: prefix_lengths must be int32 or int64 of the shape (num_sequences,), "
        "one shorter than cu_seqlens_q, got ",
        prefix_lengths->scalar_type(), " ", prefix_lengths->sizes());
    check_device("prefix_lengths", *prefix_lengths, q);
  }
  TORCH_CHECK_VALUE(!scale || std::isfinite(*scale), "packed_attention: scale must be finite, got ",
                    *scale);
  Lengths lengths;
  lengths.starts_q = check_starts("q", cu_seqlens_q, q.size(0), max_seqlen_q);
  lengths.starts_k = check_starts("k", cu_seqlens_k, k.size(0), max_seqlen_k);
  if (prefix_lengths) {
    lengths.prefixes = values_of(*prefix_lengths);
    for (size_t i = 0; i < lengths.prefixes.size(); ++i) {
      const int64_t length = lengths.starts_k[i + 1] - lengths.starts_k[i];
      TORCH_CHECK_VALUE(0 <= lengths.prefixes[i] && lengths.prefixes[i] <= length,
                        "packed_attention: prefix_lengths must be from 0 to the number of keys, "
                        "got ",
                        lengths.prefixes[i], " for sequence ", i, " with ", length, " keys");
    }
  }
  return lengths;
}

inline void check_like_q(std::string_view name, const at::Tensor& tensor, const at::Tensor& q) {
  TORCH_CHECK_VALUE(tensor.sizes() == q.sizes() && tensor.scalar_type() == q.scalar_type(),
                    "packed_attention: ", name, " must have q's shape ", q.sizes(), " and dtype ",
                    q.scalar_type(), ", got ", tensor.sizes(), " ", tensor.scalar_type());
  check_device(name, tensor, q);
}

inline void check_lse(std::string_view name, const at::Tensor& tensor, const at::Tensor& q) {
  const std::array<int64_t, 2> shape = {q.size(1), q.size(0)};
  TORCH_CHECK_VALUE(tensor.sizes() == at::IntArrayRef(shape) && tensor.scalar_type() == at::kFloat,
                    "packed_attention: ", name,
                    " must be float32 of the shape (num_heads, total_q) = ", at::IntArrayRef(shape),
                    ", got ", tensor.scalar_type(), " ", tensor.sizes());
  check_device(name, tensor, q);
}

}  // namespace carillon::packed_attention
