// Launcher of image_normalize's CUDA kernel: raw pointers and a stream, no torch, so that nvcc
// compiles it without a CUDA torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace carillon::image_normalize {

struct CudaAffine {
  float scale[3];
  float shift[3];
};

// images: num_images x plane pixels of 3 bytes, out: num_images x 3 x plane values, both dense and
// on the stream's device. out is float32, or bfloat16 where to_bfloat16 says so.
cudaError_t launch(const uint8_t* images, void* out, bool to_bfloat16, int64_t num_images,
                   int64_t plane, const CudaAffine& affine, cudaStream_t stream);

}  // namespace carillon::image_normalize
