// moe_plan on CUDA: a stable counting sort without atomics. A block ranks the slots of its chunk
// by comparing all pairs, a scan over the chunks turns their counts into first ranks, a scan over
// the experts gives the offsets, and each slot then knows its row.
#include "cuda.h"
#include "plan_chunk.h"

namespace carillon::moe_routing {
namespace {

constexpr int kWarp = 32;
constexpr int kOffsetThreads = 256;

// Writes each slot's rank where its row will stand, and the chunk's counts.
__global__ void __launch_bounds__(kChunkSlots) rank_slots(Plan plan) {
  __shared__ int32_t experts[kChunkSlots];
  const int64_t chunk = blockIdx.x, first = chunk * kChunkSlots;
  const int64_t left = plan.num_slots - first;
  const int count = left < kChunkSlots ? static_cast<int>(left) : kChunkSlots;
  const int mine = threadIdx.x;
  experts[mine] = mine < count ? plan.experts[first + mine] : -1;
  __syncthreads();
  if (mine >= count) return;
  const RankInChunk found = rank_in_chunk(experts, count, mine);
  plan.slot_to_row[first + mine] = found.rank;
  if (found.is_last && is_expert(experts[mine], plan.num_experts)) {
    plan.chunk_ranks[chunk * plan.num_experts + experts[mine]] = found.rank + 1;
  }
}

// Turns the chunks' counts into their first ranks, a column an expert.
__global__ void __launch_bounds__(kWarp* kScanGroups, 1) scan_chunks(Plan plan, int64_t num_chunks) {
  __shared__ int32_t sums[kScanGroups][kWarp];
  const int64_t expert = int64_t{blockIdx.x} * kWarp + threadIdx.x;
  const bool valid = expert < plan.num_experts;
  const int group = threadIdx.y;
  const int64_t first = first_chunk_of_group(num_chunks, group);
  const int64_t last = first_chunk_of_group(num_chunks, group + 1);
  int32_t sum = 0;
#pragma unroll 4
  for (int64_t chunk = first; chunk < last; ++chunk) {
    if (valid) sum += plan.chunk_ranks[chunk * plan.num_experts + expert];
  }
  sums[group][threadIdx.x] = sum;
  __syncthreads();
  if (!valid) return;
  int32_t rank = 0;
  for (int earlier = 0; earlier < group; ++earlier) rank += sums[earlier][threadIdx.x];
  for (int64_t chunk = first; chunk < last; ++chunk) {
    int32_t& at = plan.chunk_ranks[chunk * plan.num_experts + expert];
    const int32_t count = at;
    at = rank;
    rank += count;
  }
  if (group == kScanGroups - 1) plan.totals[expert] = rank;
}

// One block: a thread sums a run of experts, and the runs are scanned.
__global__ void __launch_bounds__(kOffsetThreads, 1) make_offsets(Plan plan) {
  __shared__ int64_t sums[kOffsetThreads];
  const int thread = threadIdx.x;
  const int64_t each = (plan.num_experts + kOffsetThreads - 1) / kOffsetThreads;
  const int64_t first = thread * each;
  const int64_t last = first + each < plan.num_experts ? first + each : plan.num_experts;
  int64_t sum = 0;
  for (int64_t e = first; e < last; ++e) {
    sum += padded_rows(plan.totals[e], plan.most, plan.alignment);
  }
  sums[thread] = sum;
  __syncthreads();
  for (int step = 1; step < kOffsetThreads; step *= 2) {
    const int64_t before = thread >= step ? sums[thread - step] : 0;
    __syncthreads();
    sums[thread] += before;
    __syncthreads();
  }
  int64_t offset = sums[thread] - sum;
  if (thread == 0) plan.offsets[0] = 0;
  for (int64_t e = first; e < last; ++e) {
    offset += padded_rows(plan.totals[e], plan.most, plan.alignment);
    plan.offsets[e + 1] = static_cast<int32_t>(offset);
  }
}

__global__ void __launch_bounds__(kChunkSlots) place_slots(Plan plan) {
  const int64_t chunk = blockIdx.x, slot = chunk * kChunkSlots + threadIdx.x;
  if (slot >= plan.num_slots) return;
  const int32_t expert = plan.experts[slot];
  int32_t row = -1;
  if (is_expert(expert, plan.num_experts)) {
    const int64_t first_rank = plan.chunk_ranks[chunk * plan.num_experts + expert];
    row = row_of(plan.offsets[expert], first_rank + plan.slot_to_row[slot], plan.most,
                 plan.num_rows);
  }
  plan.slot_to_row[slot] = row;
  if (row >= 0) plan.row_to_slot[row] = static_cast<int32_t>(slot);
}

}  // namespace

int64_t plan_chunks(int64_t num_slots) { return (num_slots + kChunkSlots - 1) / kChunkSlots; }

cudaError_t make_plan(const Plan& plan, cudaStream_t stream) {
  const int64_t num_chunks = plan_chunks(plan.num_slots);
  const size_t row_bytes = plan.num_rows * sizeof(int32_t);
  const size_t count_bytes = num_chunks * plan.num_experts * sizeof(int32_t);
  if (row_bytes > 0) {  // all bits set: -1
    const cudaError_t error = cudaMemsetAsync(plan.row_to_slot, 0xff, row_bytes, stream);
    if (error != cudaSuccess) return error;
  }
  if (count_bytes > 0) {
    const cudaError_t error = cudaMemsetAsync(plan.chunk_ranks, 0, count_bytes, stream);
    if (error != cudaSuccess) return error;
    rank_slots<<<static_cast<unsigned>(num_chunks), kChunkSlots, 0, stream>>>(plan);
  }
  const auto columns = static_cast<unsigned>((plan.num_experts + kWarp - 1) / kWarp);
  scan_chunks<<<columns, dim3(kWarp, kScanGroups), 0, stream>>>(plan, num_chunks);
  make_offsets<<<1, kOffsetThreads, 0, stream>>>(plan);
  if (count_bytes > 0) {
    place_slots<<<static_cast<unsigned>(num_chunks), kChunkSlots, 0, stream>>>(plan);
  }
  return cudaGetLastError();
}

}  // namespace carillon::moe_routing
