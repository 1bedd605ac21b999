// The contrastive ops' backward pass on CUDA: the weights of a block of pairs, which two plain
// products then turn into gradients (cuda.cpp says why).
// Status: compiles for sm_90a; not run on a GPU yet.
#include "cuda_launch.h"

namespace carillon::contrastive {
namespace {

constexpr int kRangeThreads = 1024;
constexpr int kFactorThreads = 256;

__device__ void widen(const float* lse, const float* grad, int64_t length, float& least,
                      float& most) {
  for (int64_t at = threadIdx.x; at < length; at += kRangeThreads) {
    if (!has_power(lse[at], grad[at])) continue;
    least = smaller(least, lse[at] * kLog2E);
    most = larger(most, lse[at] * kLog2E);
  }
}

// One block: a shift in the middle of all log-sum-exps that have a gradient.
__global__ void __launch_bounds__(kRangeThreads) find_shift(
    const __grid_constant__ FactorArguments of) {
  __shared__ float leasts[kRangeThreads / 32], mosts[kRangeThreads / 32];
  float least = -kNothing, most = kNothing;
  widen(of.row_lse, of.row_lse_grad, of.num_rows, least, most);
  widen(of.column_lse, of.column_lse_grad, of.num_columns, least, most);
  for (int mask = 16; mask > 0; mask /= 2) {
    least = smaller(least, __shfl_xor_sync(0xffffffffu, least, mask));
    most = larger(most, __shfl_xor_sync(0xffffffffu, most, mask));
  }
  if (threadIdx.x % 32 == 0) {
    leasts[threadIdx.x / 32] = least;
    mosts[threadIdx.x / 32] = most;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kRangeThreads / 32; ++warp) {
    least = smaller(least, leasts[warp]);
    most = larger(most, mosts[warp]);
  }
  *of.shared = shared_shift_of(least, most);
}

__global__ void fill_factors(const __grid_constant__ FactorArguments of) {
  const int64_t at = int64_t{blockIdx.x} * kFactorThreads + threadIdx.x;
  const float shift = of.shared->shift;
  if (at < of.num_rows) of.row_factor[at] = factor_of(of.row_lse[at], of.row_lse_grad[at], shift);
  if (at < of.num_columns) {
    of.column_factor[at] = factor_of(of.column_lse[at], of.column_lse_grad[at], shift);
  }
}

}  // namespace

cudaError_t launch_factors(const FactorArguments& arguments, cudaStream_t stream) {
  find_shift<<<1, kRangeThreads, 0, stream>>>(arguments);
  const int64_t longest = std::max(arguments.num_rows, arguments.num_columns);
  fill_factors<<<num_tiles(longest, kFactorThreads), kFactorThreads, 0, stream>>>(arguments);
  return cudaGetLastError();
}

cudaError_t launch_softmax_weights(const FeaturePair& features,
                                   const SoftmaxWeightsArguments& arguments,
                                   cudaStream_t stream) {
  return launch_pairs<SoftmaxWeights>(features, arguments, stream);
}

cudaError_t launch_sigmoid_weights(const FeaturePair& features,
                                   const SigmoidWeightsArguments& arguments,
                                   cudaStream_t stream) {
  return launch_pairs<SigmoidWeights>(features, arguments, stream);
}

}  // namespace carillon::contrastive
