// The moe ops' CUDA provider: checks, allocates, and calls the launchers on torch's stream. Values
// are not read, which would wait for the device: the kernels hold them within bounds.
// grouped_mm is torch's on CUDA (kernels/moe_routing/torch_impl.py), or Triton's.
#include "cuda.h"

#include "check.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

namespace carillon::moe_routing {
namespace {

at::Tensor floats_of(const at::Tensor& tensor) { return tensor.to(at::kFloat).contiguous(); }

Route route_of(const char* op, const at::Tensor& logits, int64_t k, std::string_view score,
               bool renormalize, double scale) {
  TORCH_CHECK_VALUE(logits.size(1) <= kMaxExperts, op, ": the cuda provider takes at most ",
                    kMaxExperts, " experts, got ", logits.size(1));
  return {logits.const_data_ptr(),
          logits.scalar_type() == at::kBFloat16,
          logits.size(0),
          static_cast<int32_t>(logits.size(1)),
          static_cast<int32_t>(k),
          score == "sigmoid",
          renormalize,
          static_cast<float>(scale)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> moe_topk(
    const at::Tensor& logits, int64_t k, c10::string_view score, bool renormalize, double scale,
    const std::optional<at::Tensor>& selection_bias) {
  check_topk(logits, k, score, scale, selection_bias);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor source = logits.contiguous();
  const at::Tensor bias = selection_bias ? selection_bias->contiguous() : at::Tensor();
  const Route of = route_of("moe_topk", source, k, score, renormalize, scale);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  const auto floats = source.options().dtype(at::kFloat), ints = floats.dtype(at::kInt);
  at::Tensor weights = at::empty({num_tokens, k}, floats);
  at::Tensor indices = at::empty({num_tokens, k}, ints);
  at::Tensor counts = at::empty({num_experts}, ints);
  at::Tensor means = at::empty({num_experts}, floats);
  at::Tensor z_loss = at::empty({}, floats);
  const int64_t blocks = route_blocks(num_tokens, num_experts);
  at::Tensor part_sums = at::empty({blocks, num_experts + 1}, floats);
  at::Tensor part_counts = at::empty({blocks, num_experts}, ints);
  const RouteOutputs to{weights.mutable_data_ptr<float>(),   indices.mutable_data_ptr<int32_t>(),
                        counts.mutable_data_ptr<int32_t>(),  means.mutable_data_ptr<float>(),
                        z_loss.mutable_data_ptr<float>(),    part_sums.mutable_data_ptr<float>(),
                        part_counts.mutable_data_ptr<int32_t>()};
  C10_CUDA_CHECK(route(of, bias.defined() ? bias.const_data_ptr<float>() : nullptr, to,
                       c10::cuda::getCurrentCUDAStream()));
  return {weights, indices, counts, means, z_loss};
}

at::Tensor moe_topk_backward(const at::Tensor& grad_weights, const at::Tensor& grad_means,
                             const at::Tensor& grad_z, const at::Tensor& logits,
                             const at::Tensor& indices, c10::string_view score, bool renormalize,
                             double scale) {
  check_topk_backward(grad_weights, grad_means, grad_z, logits, indices, score, scale);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor source = logits.contiguous(), chosen = indices.contiguous();
  const at::Tensor weights = floats_of(grad_weights), means = floats_of(grad_means);
  const at::Tensor z_loss = floats_of(grad_z);
  const Route of =
      route_of("moe_topk_backward", source, indices.size(1), score, renormalize, scale);
  const RouteGradients grads{weights.const_data_ptr<float>(), means.const_data_ptr<float>(),
                             z_loss.const_data_ptr<float>(), chosen.const_data_ptr<int32_t>()};
  at::Tensor out = at::empty(source.sizes(), source.options());
  C10_CUDA_CHECK(route_backward(of, grads, out.mutable_data_ptr(),
                                c10::cuda::getCurrentCUDAStream()));
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> moe_plan(const at::Tensor& indices,
                                                        int64_t num_experts, int64_t alignment,
                                                        std::optional<int64_t> capacity) {
  check_plan(indices, num_experts, alignment, capacity);
  const c10::cuda::CUDAGuard guard(indices.device());
  const at::Tensor source = indices.contiguous();
  const int64_t num_slots = source.numel();
  const int64_t size = num_rows(num_slots, num_experts, alignment, capacity);
  at::Tensor offsets = at::empty({num_experts + 1}, source.options());
  at::Tensor row_to_slot = at::empty({size}, source.options());
  at::Tensor slot_to_row = at::empty(source.sizes(), source.options());
  at::Tensor chunk_ranks = at::empty({plan_chunks(num_slots), num_experts}, source.options());
  at::Tensor totals = at::empty({num_experts}, source.options());
  const Plan plan{source.const_data_ptr<int32_t>(),
                  num_slots,
                  num_experts,
                  alignment,
                  std::min(capacity.value_or(num_slots), num_slots),
                  size,
                  offsets.mutable_data_ptr<int32_t>(),
                  row_to_slot.mutable_data_ptr<int32_t>(),
                  slot_to_row.mutable_data_ptr<int32_t>(),
                  chunk_ranks.mutable_data_ptr<int32_t>(),
                  totals.mutable_data_ptr<int32_t>()};
  C10_CUDA_CHECK(make_plan(plan, c10::cuda::getCurrentCUDAStream()));
  return {offsets, row_to_slot, slot_to_row};
}

Rows rows_of(const at::Tensor& rows, const at::Tensor& row_to_slot,
             const at::Tensor& slot_to_row) {
  return {rows.scalar_type() == at::kBFloat16,
          slot_to_row.size(0),
          row_to_slot.size(0),
          slot_to_row.size(1),
          rows.size(1),
          row_to_slot.const_data_ptr<int32_t>(),
          slot_to_row.const_data_ptr<int32_t>()};
}

at::Tensor moe_permute(const at::Tensor& x, const at::Tensor& row_to_slot,
                       const at::Tensor& slot_to_row) {
  check_permute(x, row_to_slot, slot_to_row);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor source = x.contiguous();
  const at::Tensor slots = row_to_slot.contiguous(), rows = slot_to_row.contiguous();
  at::Tensor out = at::empty({row_to_slot.size(0), x.size(1)}, source.options());
  C10_CUDA_CHECK(permute(rows_of(source, slots, rows), source.const_data_ptr(),
                         out.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

// The sum of a token's rows by weights, or plain where they are undefined.
at::Tensor sum_of_rows(const at::Tensor& rows, const at::Tensor& weights,
                       const at::Tensor& row_to_slot, const at::Tensor& slot_to_row) {
  const c10::cuda::CUDAGuard guard(rows.device());
  const at::Tensor source = rows.contiguous();
  const at::Tensor slots = row_to_slot.contiguous(), to_row = slot_to_row.contiguous();
  at::Tensor out = at::empty({slot_to_row.size(0), rows.size(1)}, source.options());
  if (out.numel() == 0) return out;
  const at::Tensor factors = weights.defined() ? weights.contiguous() : weights;
  C10_CUDA_CHECK(sum_rows(rows_of(source, slots, to_row), source.const_data_ptr(),
                          factors.defined() ? factors.const_data_ptr<float>() : nullptr,
                          out.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

at::Tensor moe_permute_backward(const at::Tensor& grad, const at::Tensor& row_to_slot,
                                const at::Tensor& slot_to_row) {
  check_permute_backward(grad, row_to_slot, slot_to_row);
  return sum_of_rows(grad, at::Tensor(), row_to_slot, slot_to_row);
}

at::Tensor moe_unpermute(const at::Tensor& rows, const at::Tensor& weights,
                         const at::Tensor& row_to_slot, const at::Tensor& slot_to_row) {
  check_unpermute("moe_unpermute", rows, weights, row_to_slot, slot_to_row);
  return sum_of_rows(rows, weights, row_to_slot, slot_to_row);
}

std::tuple<at::Tensor, at::Tensor> moe_unpermute_backward(const at::Tensor& grad,
                                                          const at::Tensor& rows,
                                                          const at::Tensor& weights,
                                                          const at::Tensor& row_to_slot,
                                                          const at::Tensor& slot_to_row) {
  const char* op = "moe_unpermute_backward";
  check_unpermute(op, rows, weights, row_to_slot, slot_to_row);
  require_grad(op, grad, rows, slot_to_row.size(0), rows.size(1));
  const c10::cuda::CUDAGuard guard(rows.device());
  const at::Tensor from = grad.contiguous(), source = rows.contiguous();
  const at::Tensor slots = row_to_slot.contiguous(), to_row = slot_to_row.contiguous();
  const at::Tensor factors = weights.contiguous();
  at::Tensor grad_rows = at::empty(source.sizes(), source.options());
  at::Tensor grad_weights = at::empty(factors.sizes(), factors.options());
  C10_CUDA_CHECK(unpermute_backward(rows_of(source, slots, to_row), from.const_data_ptr(),
                                    source.const_data_ptr(), factors.const_data_ptr<float>(),
                                    grad_rows.mutable_data_ptr(),
                                    grad_weights.mutable_data_ptr<float>(),
                                    c10::cuda::getCurrentCUDAStream()));
  return {grad_rows, grad_weights};
}

}  // namespace
}  // namespace carillon::moe_routing

TORCH_LIBRARY_IMPL(carillon, CUDA, m) {
  m.impl("moe_topk", &carillon::moe_routing::moe_topk);
  m.impl("moe_topk_backward", &carillon::moe_routing::moe_topk_backward);
  m.impl("moe_plan", &carillon::moe_routing::moe_plan);
  m.impl("moe_permute", &carillon::moe_routing::moe_permute);
  m.impl("moe_permute_backward", &carillon::moe_routing::moe_permute_backward);
  m.impl("moe_unpermute", &carillon::moe_routing::moe_unpermute);
  m.impl("moe_unpermute_backward", &carillon::moe_routing::moe_unpermute_backward);
}
