// What the blocks of a plan compute, on the CPU too: ranks within a chunk of slots, the sums over
// chunks in groups, an expert's rows, a slot's row. Any value may stand among the indices.
#pragma once

#include "host_device.h"

#include <cstdint>

namespace carillon::moe_routing {

inline constexpr int kChunkSlots = 256;
inline constexpr int kScanGroups = 32;  // of chunks, summed in parallel

struct RankInChunk {
  int32_t rank;  // earlier slots of the chunk with the same expert
  bool is_last;  // no later one has it: rank + 1 is the expert's count
};

// All pairs of a chunk: exact, stable, and the same for any number of experts.
CARILLON_HOST_DEVICE RankInChunk rank_in_chunk(const int32_t* experts, int count, int slot) {
  RankInChunk found{0, true};
  const int32_t expert = experts[slot];
  for (int other = 0; other < count; ++other) {
    const bool same = experts[other] == expert;
    found.rank += same && other < slot ? 1 : 0;
    found.is_last = found.is_last && !(same && other > slot);
  }
  return found;
}

CARILLON_HOST_DEVICE bool is_expert(int32_t expert, int64_t num_experts) {
  return expert >= 0 && expert < num_experts;
}

// The chunks that a group of the scan sums: from here to the next group's first.
CARILLON_HOST_DEVICE int64_t first_chunk_of_group(int64_t num_chunks, int group) {
  const int64_t each = (num_chunks + kScanGroups - 1) / kScanGroups;
  const int64_t first = group * each;
  return first < num_chunks ? first : num_chunks;
}

// Rows of an expert: its slots, at most `most` of them, up to a multiple of the alignment.
CARILLON_HOST_DEVICE int64_t padded_rows(int64_t num_slots, int64_t most, int64_t alignment) {
  const int64_t kept = num_slots < most ? num_slots : most;
  return (kept + alignment - 1) / alignment * alignment;
}

// The row of a slot with this rank in its expert, or -1.
CARILLON_HOST_DEVICE int32_t row_of(int64_t offset, int64_t rank, int64_t most, int64_t num_rows) {
  const int64_t row = offset + rank;
  return rank < most && row < num_rows ? static_cast<int32_t>(row) : -1;
}

}  // namespace carillon::moe_routing
