// moe_permute, moe_unpermute and their gradients on the CPU. All are bound by memory: each walks
// the tokens once, a token's row stays in cache for its k copies, and large results are written
// past the caches.
#include "check.h"
#include "maps.h"
#include "rows.h"

#include "cpu_dispatch.h"
#include "huge_pages.h"
#include "instruction_set.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

namespace carillon::moe_routing {

#define CARILLON_LOOPS "moe_routing/row_loops.h"
#include "cpu_targets.h"

namespace {

// Tokens a task: enough for its scratch to be worth it, few enough to balance.
constexpr int64_t kGrainTokens = 64;
// A row this many slots ahead is prefetched while one is computed.
constexpr int64_t kRowsAhead = 2;

int64_t row_bytes(const at::Tensor& rows) { return rows.size(1) * rows.element_size(); }

const char* bytes_of(const at::Tensor& tensor) {
  return static_cast<const char*>(tensor.const_data_ptr());
}

const RowLoops& loops_of(const at::Tensor& rows) {
  const RowTable& best = best_table();
  return rows.scalar_type() == at::kBFloat16 ? best.bfloat16 : best.float32;
}

void zero_padding(const Maps& maps, at::Tensor& rows) {
  char* to = static_cast<char*>(rows.mutable_data_ptr());
  const int64_t size = row_bytes(rows);
  at::parallel_for(0, maps.num_rows, kMapGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (maps.row_to_slot[r] == -1) std::fill_n(to + r * size, size, char{0});
    }
  });
}

at::Tensor moe_permute(const at::Tensor& x, const at::Tensor& row_to_slot,
                       const at::Tensor& slot_to_row) {
  check_permute(x, row_to_slot, slot_to_row);
  const Maps maps = checked_maps("moe_permute", row_to_slot, slot_to_row);
  const at::Tensor source = x.contiguous();
  at::Tensor out = empty_on_huge_pages({maps.num_rows, x.size(1)}, source.options());
  const int64_t size = row_bytes(out);
  if (out.numel() == 0) return out;
  const char* from = bytes_of(source);
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const bool streams = writes_past_caches(to, size, out.nbytes());
  at::parallel_for(0, maps.num_tokens, kGrainTokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t j = 0; j < maps.k; ++j) {
        const int64_t row = maps.slot_to_row[t * maps.k + j];
        if (row >= 0) write_bytes(from + t * size, to + row * size, size, streams);
      }
    }
    finish_writes(streams);
  });
  zero_padding(maps, out);
  return out;
}

// The sum of a token's rows by weights, or plain where weights is null.
at::Tensor sum_of_rows(const Maps& maps, const at::Tensor& rows, const float* weights) {
  const at::Tensor source = rows.contiguous();
  const int64_t width = rows.size(1);
  at::Tensor out = empty_on_huge_pages({maps.num_tokens, width}, source.options());
  if (out.numel() == 0) return out;
  const RowLoops& loops = loops_of(rows);
  const int64_t size = row_bytes(source);
  const char* from = bytes_of(source);
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const bool streams = writes_past_caches(to, size, out.nbytes());
  at::parallel_for(0, maps.num_tokens, kGrainTokens, [&](int64_t begin, int64_t end) {
    std::vector<const char*> taken(maps.k), next(maps.k);
    std::vector<float> factors(maps.k);
    for (int64_t t = begin; t < end; ++t) {
      int64_t count = 0;
      for (int64_t j = 0; j < maps.k; ++j) {
        const int64_t slot = t * maps.k + j;
        if (maps.slot_to_row[slot] < 0) continue;
        taken[count] = from + maps.slot_to_row[slot] * size;
        factors[count++] = weights == nullptr ? 1.0f : weights[slot];
      }
      const int64_t ahead = std::min(t + 1, end - 1) * maps.k;
      for (int64_t j = 0; j < maps.k; ++j) {
        const int64_t row = std::max(maps.slot_to_row[ahead + j], 0);
        next[j] = from + row * size;
      }
      loops.sum_rows({taken.data(), factors.data(), count, next.data(), maps.k, width,
                      streams},
                     to + t * size);
    }
    finish_writes(streams);
  });
  return out;
}

at::Tensor moe_permute_backward(const at::Tensor& grad, const at::Tensor& row_to_slot,
                                const at::Tensor& slot_to_row) {
  check_permute_backward(grad, row_to_slot, slot_to_row);
  const Maps maps = checked_maps("moe_permute_backward", row_to_slot, slot_to_row);
  return sum_of_rows(maps, grad, nullptr);
}

at::Tensor moe_unpermute(const at::Tensor& rows, const at::Tensor& weights,
                         const at::Tensor& row_to_slot, const at::Tensor& slot_to_row) {
  check_unpermute("moe_unpermute", rows, weights, row_to_slot, slot_to_row);
  const Maps maps = checked_maps("moe_unpermute", row_to_slot, slot_to_row);
  const at::Tensor factors = weights.contiguous();
  return sum_of_rows(maps, rows, factors.const_data_ptr<float>());
}

std::tuple<at::Tensor, at::Tensor> moe_unpermute_backward(const at::Tensor& grad,
                                                          const at::Tensor& rows,
                                                          const at::Tensor& weights,
                                                          const at::Tensor& row_to_slot,
                                                          const at::Tensor& slot_to_row) {
  const char* op = "moe_unpermute_backward";
  check_unpermute(op, rows, weights, row_to_slot, slot_to_row);
  const Maps maps = checked_maps(op, row_to_slot, slot_to_row);
  require_grad(op, grad, rows, maps.num_tokens, rows.size(1));
  const at::Tensor from = grad.contiguous(), source = rows.contiguous();
  const at::Tensor factors = weights.contiguous();
  at::Tensor grad_rows = empty_on_huge_pages(source.sizes(), source.options());
  at::Tensor grad_weights = at::empty(factors.sizes(), factors.options());
  const int64_t width = rows.size(1), size = row_bytes(source);
  if (width == 0) return {grad_rows, grad_weights.zero_()};
  const RowLoops& loops = loops_of(rows);
  const char *grads = bytes_of(from), *values = bytes_of(source);
  const float* by = factors.const_data_ptr<float>();
  char* to = static_cast<char*>(grad_rows.mutable_data_ptr());
  float* to_weights = grad_weights.mutable_data_ptr<float>();
  const bool streams = writes_past_caches(to, size, grad_rows.nbytes());
  at::parallel_for(0, maps.num_tokens, kGrainTokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t j = 0; j < maps.k; ++j) {
        const int64_t slot = t * maps.k + j;
        const int64_t row = maps.slot_to_row[slot];
        if (row < 0) {
          to_weights[slot] = 0;
          continue;
        }
        const int64_t ahead = std::min(slot + kRowsAhead, end * maps.k - 1);
        const char* next = values + std::max(maps.slot_to_row[ahead], 0) * size;
        to_weights[slot] = loops.scale_and_dot({grads + t * size, values + row * size, next,
                                                to + row * size, width, by[slot], streams});
      }
    }
    finish_writes(streams);
  });
  if (grad_rows.numel() != 0) zero_padding(maps, grad_rows);
  return {grad_rows, grad_weights};
}

}  // namespace
}  // namespace carillon::moe_routing

TORCH_LIBRARY_IMPL(carillon, CPU, m) {
  m.impl("moe_permute", &carillon::moe_routing::moe_permute);
  m.impl("moe_permute_backward", &carillon::moe_routing::moe_permute_backward);
  m.impl("moe_unpermute", &carillon::moe_routing::moe_unpermute);
  m.impl("moe_unpermute_backward", &carillon::moe_routing::moe_unpermute_backward);
}
