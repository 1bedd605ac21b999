// grouped_mm and gather_grouped_mm on the CPU: torch's product (BLAS, oneDNN) expert by expert,
// straight into the result. The gathering form copies one block of rows at a time into scratch
// that stays in cache, so that no permuted copy of x is made.
#include "check.h"
#include "maps.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

namespace carillon::moe_routing {
namespace {

// Rows gathered at a time: large enough for a product to run at its full rate.
constexpr int64_t kBlockRows = 512;

std::vector<int64_t> checked_offsets(const char* op, const at::Tensor& offsets, int64_t num_rows) {
  const at::Tensor dense = offsets.contiguous();
  const int32_t* values = dense.const_data_ptr<int32_t>();
  std::vector<int64_t> ends(values, values + dense.numel());
  TORCH_CHECK_VALUE(ends.front() == 0 && std::is_sorted(ends.begin(), ends.end()) &&
                        ends.back() <= num_rows,
                    op, ": offsets must start at 0, never fall, and end at no more than the ",
                    num_rows, " rows");
  return ends;
}

void zero_from(at::Tensor& rows, int64_t first) {
  if (first < rows.size(0)) rows.narrow(0, first, rows.size(0) - first).zero_();
}

// x's rows of each expert times its matrix.
at::Tensor multiply(const at::Tensor& x, const at::Tensor& weights,
                    const std::vector<int64_t>& ends) {
  at::Tensor out = at::empty({x.size(0), weights.size(2)}, x.options());
  for (int64_t e = 0; e < weights.size(0); ++e) {
    const int64_t count = ends[e + 1] - ends[e];
    if (count == 0) continue;
    at::Tensor segment = out.narrow(0, ends[e], count);
    at::mm_out(segment, x.narrow(0, ends[e], count), weights.select(0, e));
  }
  zero_from(out, ends.back());
  return out;
}

// The rows [begin, begin + count) of the permuted x, of which no copy exists.
at::Tensor gathered(const at::Tensor& x, const Maps& maps, int64_t begin, int64_t count,
                    at::Tensor& scratch) {
  const int64_t size = x.size(1) * x.element_size();
  if (size == 0) return scratch.narrow(0, 0, count);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(scratch.mutable_data_ptr());
  at::parallel_for(0, count, 64, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t slot = maps.row_to_slot[begin + i];
      if (slot < 0) {
        std::memset(to + i * size, 0, static_cast<size_t>(size));
      } else {
        std::memcpy(to + i * size, from + slot / maps.k * size, static_cast<size_t>(size));
      }
    }
  });
  return scratch.narrow(0, 0, count);
}

int64_t largest_segment(const std::vector<int64_t>& ends) {
  int64_t largest = 0;
  for (size_t e = 0; e + 1 < ends.size(); ++e) largest = std::max(largest, ends[e + 1] - ends[e]);
  return largest;
}

at::Tensor grouped_mm(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& offsets) {
  check_grouped_mm("grouped_mm", x, weights, offsets);
  return multiply(x, weights, checked_offsets("grouped_mm", offsets, x.size(0)));
}

std::tuple<at::Tensor, at::Tensor> grouped_mm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                       const at::Tensor& weights,
                                                       const at::Tensor& offsets) {
  const char* op = "grouped_mm_backward";
  check_grouped_mm(op, x, weights, offsets);
  require_grad(op, grad, x, x.size(0), weights.size(2));
  const std::vector<int64_t> ends = checked_offsets(op, offsets, x.size(0));
  at::Tensor grad_weights = at::empty(weights.sizes(), x.options());
  for (int64_t e = 0; e < weights.size(0); ++e) {
    at::Tensor target = grad_weights.select(0, e);
    const int64_t count = ends[e + 1] - ends[e];
    if (count == 0) {
      target.zero_();
    } else {
      at::mm_out(target, x.narrow(0, ends[e], count).t(), grad.narrow(0, ends[e], count));
    }
  }
  return {multiply(grad, weights.transpose(1, 2), ends), grad_weights};
}

at::Tensor gather_grouped_mm(const at::Tensor& x, const at::Tensor& weights,
                             const at::Tensor& offsets, const at::Tensor& row_to_slot,
                             const at::Tensor& slot_to_row) {
  const char* op = "gather_grouped_mm";
  check_grouped_mm(op, x, weights, offsets);
  const Maps maps = checked_maps(op, row_to_slot, slot_to_row);
  require_tokens(op, "x", x, slot_to_row);
  const std::vector<int64_t> ends = checked_offsets(op, offsets, maps.num_rows);
  const at::Tensor source = x.contiguous();
  at::Tensor out = at::empty({maps.num_rows, weights.size(2)}, x.options());
  const int64_t block = std::min(kBlockRows, largest_segment(ends));
  at::Tensor scratch = at::empty({block, x.size(1)}, x.options());
  for (int64_t e = 0; e < weights.size(0); ++e) {
    for (int64_t begin = ends[e]; begin < ends[e + 1]; begin += block) {
      const int64_t count = std::min(block, ends[e + 1] - begin);
      at::Tensor target = out.narrow(0, begin, count);
      at::mm_out(target, gathered(source, maps, begin, count, scratch), weights.select(0, e));
    }
  }
  zero_from(out, ends.back());
  return out;
}

std::tuple<at::Tensor, at::Tensor> gather_grouped_mm_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weights,
    const at::Tensor& offsets, const at::Tensor& row_to_slot, const at::Tensor& slot_to_row) {
  const char* op = "gather_grouped_mm_backward";
  check_grouped_mm(op, x, weights, offsets);
  const Maps maps = checked_maps(op, row_to_slot, slot_to_row);
  require_tokens(op, "x", x, slot_to_row);
  require_grad(op, grad, x, maps.num_rows, weights.size(2));
  const std::vector<int64_t> ends = checked_offsets(op, offsets, maps.num_rows);
  const at::Tensor source = x.contiguous();
  at::Tensor grad_weights = at::empty(weights.sizes(), x.options());
  // A whole segment at a time: blocks would have to be added up, and rounded each in bfloat16.
  at::Tensor scratch = at::empty({largest_segment(ends), x.size(1)}, x.options());
  for (int64_t e = 0; e < weights.size(0); ++e) {
    at::Tensor target = grad_weights.select(0, e);
    const int64_t count = ends[e + 1] - ends[e];
    if (count == 0) {
      target.zero_();
    } else {
      const at::Tensor taken = gathered(source, maps, ends[e], count, scratch);
      at::mm_out(target, taken.t(), grad.narrow(0, ends[e], count));
    }
  }
  static const auto sum_of_rows = c10::Dispatcher::singleton()
      .findSchemaOrThrow("carillon::moe_permute_backward", "")
      .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>();
  const at::Tensor grad_rows = multiply(grad, weights.transpose(1, 2), ends);
  return {sum_of_rows.call(grad_rows, row_to_slot, slot_to_row),
          grad_weights};
}

}  // namespace
}  // namespace carillon::moe_routing

TORCH_LIBRARY_IMPL(carillon, CPU, m) {
  m.impl("grouped_mm", &carillon::moe_routing::grouped_mm);
  m.impl("grouped_mm_backward", &carillon::moe_routing::grouped_mm_backward);
  m.impl("gather_grouped_mm", &carillon::moe_routing::gather_grouped_mm);
  m.impl("gather_grouped_mm_backward", &carillon::moe_routing::gather_grouped_mm_backward);
}
