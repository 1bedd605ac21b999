// float32 products without tensor cores: a warpgroup's tile in the registers where a tensor core
// would leave it, so that both types share all that follows. Exact factors, sums in float32; three
// TF32 products would be faster and are left out.
#pragma once

#include "cuda_schedule.h"

namespace carillon::contrastive {

constexpr int kFloatStepDims = 16;
// Lines of shared memory: one dim of all of a tile's rows or columns. Two more floats spread over
// all banks what is written dim by dim, and keep pairs of columns aligned.
constexpr int kRowLine = kTileRows + 2;
constexpr int kColumnLine = kTileColumns + 2;

struct FloatStep {
  float rows[kFloatStepDims * kRowLine];
  alignas(8) float columns[kFloatStepDims * kColumnLine];
};

// Copies one step of one side; past the edges zeros. All `num_threads` call it.
CARILLON_HOST_DEVICE void load_step(const float* from, int64_t first, int64_t length, int64_t dim,
                                    int64_t dims, int count, int line, float* to, int thread,
                                    int num_threads) {
  for (int at = thread; at < count * kFloatStepDims; at += num_threads) {
    const int k = at % kFloatStepDims, i = at / kFloatStepDims;
    const bool is_inside = first + i < length && dim + k < dims;
    to[k * line + i] = is_inside ? from[(first + i) * dims + dim + k] : 0.0f;
  }
}

CARILLON_HOST_DEVICE void multiply_step(const FloatStep& step, int group, int thread,
                                        float (&sums)[kRegisters]) {
  for (int k = 0; k < kFloatStepDims; ++k) {
    const float* rows = step.rows + k * kRowLine + group * hopper::kGroupRows;
    const float* columns = step.columns + k * kColumnLine;
    const float of_rows[2] = {rows[hopper::row_of(thread, 0)], rows[hopper::row_of(thread, 2)]};
    CARILLON_UNROLL
    for (int r = 0; r < kRegisters; ++r) {
      sums[r] += of_rows[r / 2 % 2] * columns[hopper::column_of(thread, r)];
    }
  }
}

}  // namespace carillon::contrastive
