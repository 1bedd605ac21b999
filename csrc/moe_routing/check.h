// Argument checks of the moe ops: the messages of kernels/moe_routing/check.py and check_values.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Optional.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string_view>

namespace carillon::moe_routing {

inline constexpr int64_t kMaxSlots = std::numeric_limits<int32_t>::max();

inline void require_shape(const char* op, const char* name, const at::Tensor& tensor,
                          int64_t num_dims, const char* shape) {
  TORCH_CHECK_VALUE(tensor.dim() == num_dims, op, ": ", name, " must have the shape ", shape,
                    ", got ", tensor.sizes());
}

inline void require_floats(const char* op, const char* name, const at::Tensor& tensor,
                           int64_t num_dims, const char* shape) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16,
                    op, ": ", name, " must be float32 or bfloat16, got ", tensor.scalar_type());
  require_shape(op, name, tensor, num_dims, shape);
}

inline void require_int32(const char* op, const char* name, const at::Tensor& tensor,
                          int64_t num_dims, const char* shape) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kInt, op, ": ", name, " must be int32, got ",
                    tensor.scalar_type());
  require_shape(op, name, tensor, num_dims, shape);
}

inline void require_same_device(const char* op, const at::Tensor& first, const char* name,
                                const at::Tensor& other) {
  TORCH_CHECK_VALUE(first.device() == other.device(), op, ": ", name, " must be on ",
                    first.device(), ", got ", other.device());
}

inline void require_experts(const char* op, int64_t num_experts) {
  TORCH_CHECK_VALUE(num_experts >= 1, op, ": there must be at least one expert, got ",
                    num_experts);
}

inline void check_score(std::string_view score, double scale) {
  TORCH_CHECK_VALUE(score == "softmax" || score == "sigmoid",
                    "moe_topk: score must be softmax or sigmoid, got ", score);
  TORCH_CHECK_VALUE(std::isfinite(scale) && scale > 0,
                    "moe_topk: scale must be finite and positive, got ", scale);
}

inline void check_topk(const at::Tensor& logits, int64_t k, std::string_view score, double scale,
                       const std::optional<at::Tensor>& selection_bias) {
  const char* op = "moe_topk";
  require_floats(op, "logits", logits, 2, "(T, E)");
  const int64_t num_experts = logits.size(1);
  require_experts(op, num_experts);
  TORCH_CHECK_VALUE(k >= 1 && k <= num_experts, op, ": k must be from 1 to the number of experts ",
                    num_experts, ", got ", k);
  check_score(score, scale);
  if (!selection_bias) return;
  TORCH_CHECK_VALUE(score == "sigmoid", op, ": selection_bias needs sigmoid scores, got ", score);
  TORCH_CHECK_VALUE(selection_bias->scalar_type() == at::kFloat, op,
                    ": selection_bias must be float32, got ", selection_bias->scalar_type());
  TORCH_CHECK_VALUE(selection_bias->dim() == 1 && selection_bias->size(0) == num_experts, op,
                    ": selection_bias must have the shape (", num_experts, ",), got ",
                    selection_bias->sizes());
  require_same_device(op, logits, "selection_bias", *selection_bias);
}

inline void check_topk_backward(const at::Tensor& grad_weights, const at::Tensor& grad_means,
                                const at::Tensor& grad_z, const at::Tensor& logits,
                                const at::Tensor& indices, std::string_view score, double scale) {
  const char* op = "moe_topk_backward";
  require_floats(op, "logits", logits, 2, "(T, E)");
  require_experts(op, logits.size(1));
  require_int32(op, "indices", indices, 2, "(T, k)");
  check_score(score, scale);
  TORCH_CHECK_VALUE(indices.size(0) == logits.size(0), op, ": indices must have ", logits.size(0),
                    " rows as logits has, got ", indices.size(0));
  TORCH_CHECK_VALUE(grad_weights.sizes() == indices.sizes() && grad_means.dim() == 1 &&
                        grad_means.size(0) == logits.size(1) && grad_z.dim() == 0,
                    op, ": gradients must have the shapes (", indices.size(0), ", ",
                    indices.size(1), "), (", logits.size(1), ",) and (), got ",
                    grad_weights.sizes(), ", ", grad_means.sizes(), " and ", grad_z.sizes());
  require_same_device(op, logits, "indices", indices);
  require_same_device(op, logits, "grad_weights", grad_weights);
  require_same_device(op, logits, "grad_mean_scores", grad_means);
  require_same_device(op, logits, "grad_z_loss", grad_z);
}

inline void check_plan(const at::Tensor& indices, int64_t num_experts, int64_t alignment,
                       std::optional<int64_t> capacity) {
  const char* op = "moe_plan";
  require_int32(op, "indices", indices, 2, "(T, k)");
  TORCH_CHECK_VALUE(indices.size(1) >= 1, op, ": indices must have k of at least 1, got 0");
  require_experts(op, num_experts);
  TORCH_CHECK_VALUE(alignment >= 1, op, ": alignment must be at least 1, got ", alignment);
  TORCH_CHECK_VALUE(!capacity || *capacity >= 1, op, ": capacity must be at least 1, got ",
                    capacity.value_or(0));
  TORCH_CHECK_VALUE(alignment <= kMaxSlots && num_experts <= kMaxSlots &&
                        indices.numel() + num_experts * (alignment - 1) <= kMaxSlots,
                    op, ": there must be at most ", kMaxSlots, " rows, padding included");
}

// As reference.py's num_rows: rows that any choice of experts fits into.
inline int64_t num_rows(int64_t num_slots, int64_t num_experts, int64_t alignment,
                        std::optional<int64_t> capacity) {
  int64_t most = num_slots + std::min(num_experts, num_slots) * (alignment - 1);
  most = most / alignment * alignment;
  // A capacity above the slots holds nothing back; the test keeps the product below in range.
  if (!capacity || *capacity >= num_slots) return most;
  const int64_t padded = (*capacity + alignment - 1) / alignment * alignment;
  return std::min(most, num_experts * padded);
}

inline void check_maps(const char* op, const at::Tensor& row_to_slot,
                       const at::Tensor& slot_to_row) {
  require_int32(op, "row_to_slot", row_to_slot, 1, "(R,)");
  require_int32(op, "slot_to_row", slot_to_row, 2, "(T, k)");
  require_same_device(op, slot_to_row, "row_to_slot", row_to_slot);
  TORCH_CHECK_VALUE(slot_to_row.size(1) >= 1, op, ": slot_to_row must have k of at least 1, got 0");
}

inline void require_tokens(const char* op, const char* name, const at::Tensor& x,
                           const at::Tensor& slot_to_row) {
  TORCH_CHECK_VALUE(x.size(0) == slot_to_row.size(0), op, ": ", name, " must have ",
                    slot_to_row.size(0), " rows, one a token of slot_to_row, got ", x.size(0));
}

inline void require_rows(const char* op, const at::Tensor& rows, const at::Tensor& row_to_slot) {
  TORCH_CHECK_VALUE(rows.size(0) == row_to_slot.size(0), op, ": rows must be ",
                    row_to_slot.size(0), ", as row_to_slot has, got ", rows.size(0));
}

// A gradient has the type and the device of what it is a gradient of.
inline void require_grad(const char* op, const at::Tensor& grad, const at::Tensor& x,
                         int64_t num_rows, int64_t width) {
  TORCH_CHECK_VALUE(grad.scalar_type() == x.scalar_type() && grad.dim() == 2 &&
                        grad.size(0) == num_rows && grad.size(1) == width,
                    op, ": grad must be ", x.scalar_type(), " of the shape (", num_rows, ", ",
                    width, "), got ", grad.scalar_type(), " ", grad.sizes());
  require_same_device(op, x, "grad", grad);
}

inline void check_permute(const at::Tensor& x, const at::Tensor& row_to_slot,
                          const at::Tensor& slot_to_row) {
  const char* op = "moe_permute";
  require_floats(op, "x", x, 2, "(T, D)");
  require_same_device(op, x, "slot_to_row", slot_to_row);
  check_maps(op, row_to_slot, slot_to_row);
  require_tokens(op, "x", x, slot_to_row);
}

inline void check_permute_backward(const at::Tensor& grad, const at::Tensor& row_to_slot,
                                   const at::Tensor& slot_to_row) {
  const char* op = "moe_permute_backward";
  require_floats(op, "grad", grad, 2, "(R, D)");
  require_same_device(op, grad, "slot_to_row", slot_to_row);
  check_maps(op, row_to_slot, slot_to_row);
  require_rows(op, grad, row_to_slot);
}

inline void check_unpermute(const char* op, const at::Tensor& rows, const at::Tensor& weights,
                            const at::Tensor& row_to_slot, const at::Tensor& slot_to_row) {
  require_floats(op, "rows", rows, 2, "(R, D)");
  TORCH_CHECK_VALUE(weights.scalar_type() == at::kFloat, op, ": weights must be float32, got ",
                    weights.scalar_type());
  require_same_device(op, rows, "weights", weights);
  require_same_device(op, rows, "slot_to_row", slot_to_row);
  check_maps(op, row_to_slot, slot_to_row);
  TORCH_CHECK_VALUE(weights.sizes() == slot_to_row.sizes(), op,
                    ": weights must have the shape of slot_to_row ", slot_to_row.sizes(), ", got ",
                    weights.sizes());
  require_rows(op, rows, row_to_slot);
}

inline void check_grouped_mm(const char* op, const at::Tensor& x, const at::Tensor& weights,
                             const at::Tensor& offsets) {
  require_floats(op, "x", x, 2, "(R, D)");
  require_shape(op, "weights", weights, 3, "(E, D, F)");
  TORCH_CHECK_VALUE(weights.scalar_type() == x.scalar_type(), op, ": weights must be ",
                    x.scalar_type(), " as x is, got ", weights.scalar_type());
  require_same_device(op, x, "weights", weights);
  require_same_device(op, x, "offsets", offsets);
  require_experts(op, weights.size(0));
  TORCH_CHECK_VALUE(weights.size(1) == x.size(1), op, ": weights must have D = ", x.size(1),
                    " as x has, got ", weights.size(1));
  require_int32(op, "offsets", offsets, 1, "(E + 1,)");
  TORCH_CHECK_VALUE(offsets.size(0) == weights.size(0) + 1, op, ": offsets must have E + 1 = ",
                    weights.size(0) + 1, " values, got ", offsets.size(0));
}

}  // namespace carillon::moe_routing
