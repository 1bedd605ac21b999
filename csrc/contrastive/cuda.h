// Launchers of the contrastive ops' CUDA kernels: raw pointers and a stream, no torch, so that nvcc
// compiles them without a CUDA torch. Devices of compute capability 9.0; all pointers are on the
// stream's device, but for those of a struct.
#pragma once

#include "cuda_reduce.h"
#include "cuda_sigmoid.h"
#include "cuda_weights.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace carillon::contrastive {

// Row-major features of both sides: float, or bfloat16, whose rows are then a multiple of 16 bytes
// at addresses that are, and not empty (the copy engine's terms). At least a row and a column.
struct FeaturePair {
  const void* rows;
  const void* columns;
  int64_t dims;
  bool is_bfloat16;
};

cudaError_t launch_reduce(const FeaturePair& features, const ReduceArguments& arguments,
                          cudaStream_t stream);
cudaError_t launch_sigmoid_losses(const FeaturePair& features, const SigmoidArguments& arguments,
                                  cudaStream_t stream);

// Log-sum-exps of what launch_reduce left, and sums where there were any.
cudaError_t launch_finish(const ReduceArguments& arguments, float* row_lse, float* column_lse,
                          float* row_sum, float* column_sum, cudaStream_t stream);

// Computes what the softmax form's weights share: once, before any block of pairs.
struct FactorArguments {
  int64_t num_rows;
  int64_t num_columns;
  const float* row_lse;
  const float* row_lse_grad;
  const float* column_lse;
  const float* column_lse_grad;
  SharedShift* shared;
  float* row_factor;
  float* column_factor;
};
cudaError_t launch_factors(const FactorArguments& arguments, cudaStream_t stream);

cudaError_t launch_softmax_weights(const FeaturePair& features,
                                   const SoftmaxWeightsArguments& arguments, cudaStream_t stream);
cudaError_t launch_sigmoid_weights(const FeaturePair& features,
                                   const SigmoidWeightsArguments& arguments, cudaStream_t stream);

}  // namespace carillon::contrastive
