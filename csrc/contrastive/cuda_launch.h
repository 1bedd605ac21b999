// Launches a kernel of all pairs, by the features' type.
#pragma once

#include "cuda.h"
#include "cuda_kernel.h"

namespace carillon::contrastive {

// cuTensorMapEncodeTiled, found at run time: nothing links to the driver's library.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    const bool is_there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(is_there ? found : nullptr);
  }();
  return encoder;
}

// A map of (length, dims) bfloat16 in boxes of kStepDims dims by `box_rows` rows, swizzled.
inline cudaError_t make_tensor_map(const void* features, int64_t length, int64_t dims,
                                   int box_rows, CUtensorMap& map) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorSymbolNotFound;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(dims), static_cast<cuuint64_t>(length)};
  const cuuint64_t strides_bytes[1] = {static_cast<cuuint64_t>(dims) * 2};
  const cuuint32_t box[2] = {kStepDims, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(features), sizes,
             strides_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <template <class> class Epilogue, class Arguments>
cudaError_t launch_pairs(const FeaturePair& features, const Arguments& arguments,
                         cudaStream_t stream) {
  const PairArguments& pairs = arguments.pairs;
  if (!features.is_bfloat16) {
    ffma_tiles<Epilogue><<<arguments.plan.grid, kFloatThreads, 0, stream>>>(
        static_cast<const float*>(features.rows), static_cast<const float*>(features.columns),
        features.dims, arguments);
    return cudaGetLastError();
  }
  CUtensorMap rows, columns;
  cudaError_t error =
      make_tensor_map(features.rows, pairs.num_rows, features.dims, kTileRows, rows);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(features.columns, pairs.num_columns, features.dims, kTileColumns,
                          columns);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(wgmma_tiles<Epilogue>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               kSharedBytes);
  if (error != cudaSuccess) return error;
  const int steps = num_tiles(features.dims, kStepDims);
  wgmma_tiles<Epilogue><<<arguments.plan.grid, kThreads, kSharedBytes, stream>>>(
      rows, columns, steps, arguments);
  return cudaGetLastError();
}

}  // namespace carillon::contrastive
