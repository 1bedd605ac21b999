// moe_plan on the CPU: a stable counting sort. Slots go in chunks of a fixed size, whose counts
// give each chunk its first rank in every expert, so that chunks are placed in parallel.
#include "check.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

namespace carillon::moe_routing {
namespace {

constexpr int64_t kMinChunkSlots = 4096;

std::tuple<at::Tensor, at::Tensor, at::Tensor> moe_plan(const at::Tensor& indices,
                                                        int64_t num_experts, int64_t alignment,
                                                        std::optional<int64_t> capacity) {
  check_plan(indices, num_experts, alignment, capacity);
  const at::Tensor source = indices.contiguous();
  const int64_t num_slots = source.numel();
  const int64_t size = num_rows(num_slots, num_experts, alignment, capacity);
  at::Tensor offsets = at::empty({num_experts + 1}, source.options());
  at::Tensor row_to_slot = at::empty({size}, source.options());
  at::Tensor slot_to_row = at::empty(source.sizes(), source.options());
  const int32_t* experts = source.const_data_ptr<int32_t>();
  int32_t* ends = offsets.mutable_data_ptr<int32_t>();
  int32_t* slots = row_to_slot.mutable_data_ptr<int32_t>();
  int32_t* rows = slot_to_row.mutable_data_ptr<int32_t>();

  // Chunks no smaller than the number of experts, so that their counts stay within the slots.
  const int64_t chunk_slots = std::max(kMinChunkSlots, num_experts);
  const int64_t num_chunks = (num_slots + chunk_slots - 1) / chunk_slots;
  std::vector<int32_t> ranks(num_chunks * num_experts, 0);  // counts, then first ranks
  std::atomic<int64_t> wrong_slot = -1;
  const auto slots_of = [&](int64_t chunk) {
    return std::pair(chunk * chunk_slots, std::min(num_slots, (chunk + 1) * chunk_slots));
  };
  at::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int32_t* counts = ranks.data() + chunk * num_experts;
      const auto [first, last] = slots_of(chunk);
      for (int64_t s = first; s < last; ++s) {
        if (experts[s] < 0 || experts[s] >= num_experts) {
          wrong_slot = s;
          return;
        }
        ++counts[experts[s]];
      }
    }
  });
  TORCH_CHECK_VALUE(wrong_slot < 0, "moe_plan: indices must be from 0 to ", num_experts - 1,
                    ", got ", experts[std::max<int64_t>(wrong_slot, 0)]);

  const int64_t most = std::min(capacity.value_or(num_slots), num_slots);
  ends[0] = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    int32_t rank = 0;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      const int32_t count = ranks[chunk * num_experts + e];
      ranks[chunk * num_experts + e] = rank;
      rank += count;
    }
    const int64_t kept = std::min<int64_t>(rank, most);
    const int64_t padded = (kept + alignment - 1) / alignment * alignment;
    ends[e + 1] = ends[e] + static_cast<int32_t>(padded);
  }
  std::fill(slots, slots + size, -1);
  at::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int32_t* next = ranks.data() + chunk * num_experts;
      const auto [first, last] = slots_of(chunk);
      for (int64_t s = first; s < last; ++s) {
        const int32_t expert = experts[s];
        const int32_t rank = next[expert]++;
        rows[s] = rank < most ? ends[expert] + rank : -1;
        if (rank < most) slots[rows[s]] = static_cast<int32_t>(s);
      }
    }
  });
  return {offsets, row_to_slot, slot_to_row};
}

}  // namespace
}  // namespace carillon::moe_routing

TORCH_LIBRARY_IMPL(carillon, CPU, m) { m.impl("moe_plan", &carillon::moe_routing::moe_plan); }
