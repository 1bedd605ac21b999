// The contrastive ops' forward pass on CUDA: one kernel over all tiles (cuda_kernel.h), then small
// ones that add up what units and blocks left. Memory beside the results: per column 8 bytes (12
// with sums) for each multiplying warpgroup of the grid, per row as much for each column group.
// Status: compiles for sm_90a; not run on a GPU yet.
#include "cuda_launch.h"

namespace carillon::contrastive {
namespace {

constexpr int kFinishThreads = 256;

__global__ void finish_rows(const __grid_constant__ ReduceArguments of, float* lse, float* sums) {
  const int64_t row = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (row < of.pairs.num_rows) finish_row(of, row, lse, sums);
}

__global__ void finish_columns(const __grid_constant__ ReduceArguments of, float* lse,
                               float* sums) {
  const int64_t column = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (column < of.pairs.num_columns) finish_column(of, column, lse, sums);
}

}  // namespace

cudaError_t launch_reduce(const FeaturePair& features, const ReduceArguments& arguments,
                          cudaStream_t stream) {
  return launch_pairs<ReducePairs>(features, arguments, stream);
}

cudaError_t launch_sigmoid_losses(const FeaturePair& features, const SigmoidArguments& arguments,
                                  cudaStream_t stream) {
  return launch_pairs<SigmoidLosses>(features, arguments, stream);
}

cudaError_t launch_finish(const ReduceArguments& arguments, float* row_lse, float* column_lse,
                          float* row_sum, float* column_sum, cudaStream_t stream) {
  const auto blocks = [](int64_t length) {
    return static_cast<unsigned>(num_tiles(length, kFinishThreads));
  };
  const PairArguments& pairs = arguments.pairs;
  finish_rows<<<blocks(pairs.num_rows), kFinishThreads, 0, stream>>>(arguments, row_lse, row_sum);
  finish_columns<<<blocks(pairs.num_columns), kFinishThreads, 0, stream>>>(arguments, column_lse,
                                                                           column_sum);
  return cudaGetLastError();
}

}  // namespace carillon::contrastive
