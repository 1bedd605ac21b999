// The plan's four kernels, block by block and thread by thread, against a plan made slot by slot.
#include "expect.h"
#include "moe_routing/plan_chunk.h"

#include <algorithm>
#include <random>
#include <vector>

namespace {

using namespace carillon::moe_routing;

struct Result {
  std::vector<int32_t> offsets, row_to_slot, slot_to_row;
};

Result by_blocks(const std::vector<int32_t>& experts, int64_t num_experts, int64_t alignment,
                 int64_t most, int64_t num_rows) {
  const auto num_slots = static_cast<int64_t>(experts.size());
  const int64_t num_chunks = (num_slots + kChunkSlots - 1) / kChunkSlots;
  Result to{std::vector<int32_t>(num_experts + 1, 0), std::vector<int32_t>(num_rows, -1),
            std::vector<int32_t>(num_slots)};
  std::vector<int32_t> chunk_ranks(num_chunks * num_experts, 0), totals(num_experts);
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const int32_t* first = experts.data() + chunk * kChunkSlots;
    const int count = static_cast<int>(std::min<int64_t>(kChunkSlots, num_slots - chunk * kChunkSlots));
    // A copy of its own length, so that a look past it is found.
    const std::vector<int32_t> shared(first, first + count);
    for (int i = 0; i < count; ++i) {
      const RankInChunk found = rank_in_chunk(shared.data(), count, i);
      to.slot_to_row[chunk * kChunkSlots + i] = found.rank;
      if (found.is_last && is_expert(shared[i], num_experts)) {
        chunk_ranks.at(chunk * num_experts + shared[i]) = found.rank + 1;
      }
    }
  }
  EXPECT_EQUAL(first_chunk_of_group(num_chunks, 0), 0);
  EXPECT_EQUAL(first_chunk_of_group(num_chunks, kScanGroups), num_chunks);
  for (int64_t e = 0; e < num_experts; ++e) {
    std::vector<int32_t> sums(kScanGroups, 0);
    for (int group = 0; group < kScanGroups; ++group) {
      for (int64_t c = first_chunk_of_group(num_chunks, group);
           c < first_chunk_of_group(num_chunks, group + 1); ++c) {
        sums[group] += chunk_ranks.at(c * num_experts + e);
      }
    }
    for (int group = 0; group < kScanGroups; ++group) {
      int32_t rank = 0;
      for (int earlier = 0; earlier < group; ++earlier) rank += sums[earlier];
      for (int64_t c = first_chunk_of_group(num_chunks, group);
           c < first_chunk_of_group(num_chunks, group + 1); ++c) {
        const int32_t count = chunk_ranks[c * num_experts + e];
        chunk_ranks[c * num_experts + e] = rank;
        rank += count;
      }
      if (group == kScanGroups - 1) totals[e] = rank;
    }
    to.offsets[e + 1] =
        to.offsets[e] + static_cast<int32_t>(padded_rows(totals[e], most, alignment));
  }
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    const int32_t expert = experts[slot];
    int32_t row = -1;
    if (is_expert(expert, num_experts)) {
      const int64_t first_rank = chunk_ranks.at(slot / kChunkSlots * num_experts + expert);
      row = row_of(to.offsets[expert], first_rank + to.slot_to_row[slot], most, num_rows);
    }
    to.slot_to_row[slot] = row;
    if (row < 0) continue;
    EXPECT_EQUAL(to.row_to_slot.at(row), -1);
    to.row_to_slot.at(row) = static_cast<int32_t>(slot);
  }
  return to;
}

Result by_slots(const std::vector<int32_t>& experts, int64_t num_experts, int64_t alignment,
                int64_t most, int64_t num_rows) {
  std::vector<std::vector<int32_t>> taken(num_experts);
  for (size_t slot = 0; slot < experts.size(); ++slot) {
    if (experts[slot] < 0 || experts[slot] >= num_experts) continue;
    auto& slots = taken[experts[slot]];
    if (static_cast<int64_t>(slots.size()) < most) slots.push_back(static_cast<int32_t>(slot));
  }
  Result to{{0}, std::vector<int32_t>(num_rows, -1), std::vector<int32_t>(experts.size(), -1)};
  for (const auto& slots : taken) {
    int64_t end = to.offsets.back();
    for (const int32_t slot : slots) {
      to.slot_to_row[slot] = static_cast<int32_t>(end);
      to.row_to_slot.at(end++) = slot;
    }
    while (end % alignment != 0) ++end;
    to.offsets.push_back(static_cast<int32_t>(end));
  }
  return to;
}

void check(int64_t num_slots, int64_t num_experts, int64_t alignment, int64_t most, bool stray,
           std::mt19937& generator) {
  std::vector<int32_t> experts(num_slots);
  for (int32_t& expert : experts) {
    expert = static_cast<int32_t>(generator() % num_experts);
    if (stray && generator() % 5 == 0) expert = static_cast<int32_t>(generator());
  }
  const int64_t num_rows = num_slots + num_experts * (alignment - 1);
  const Result got = by_blocks(experts, num_experts, alignment, most, num_rows);
  const Result wanted = by_slots(experts, num_experts, alignment, most, num_rows);
  EXPECT_EQUAL(got.offsets == wanted.offsets, true);
  EXPECT_EQUAL(got.row_to_slot == wanted.row_to_slot, true);
  EXPECT_EQUAL(got.slot_to_row == wanted.slot_to_row, true);
}

}  // namespace

int main() {
  std::mt19937 generator(0);
  for (const int64_t num_slots : {0, 1, 255, 256, 257, 5000, 256 * 40 + 3}) {
    for (const int64_t num_experts : {1, 7, 33}) {
      check(num_slots, num_experts, 1, num_slots, false, generator);
      check(num_slots, num_experts, 16, num_slots, true, generator);
      check(num_slots, num_experts, 3, std::max<int64_t>(num_slots / 9, 1), true, generator);
    }
  }
  // Rows that do not fit are dropped, not written elsewhere.
  EXPECT_EQUAL(row_of(8, 2, 5, 10), -1);
  EXPECT_EQUAL(row_of(8, 1, 5, 10), 9);
  EXPECT_EQUAL(row_of(8, 1, 1, 10), -1);
  return carillon::test::report();
}
