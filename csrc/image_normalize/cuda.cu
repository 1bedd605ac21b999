// image_normalize on CUDA: memory-bound, one pass. A thread takes four pixels: twelve bytes read
// as three words and one vector store per plane; what is left over or misaligned goes by ones.
#include "cuda.h"

#include <cuda_bf16.h>

#include <algorithm>

namespace carillon::image_normalize {
namespace {

constexpr int kThreads = 256;
constexpr int kPixels = 4;  // per thread
constexpr int64_t kMaxBlocks = 1 << 16;

__device__ void store_four(float* out, const float (&v)[kPixels]) {
  *reinterpret_cast<float4*>(out) = make_float4(v[0], v[1], v[2], v[3]);
}

__device__ void store_four(__nv_bfloat16* out, const float (&v)[kPixels]) {
  __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(v[0], v[1]), __floats2bfloat162_rn(v[2], v[3])};
  *reinterpret_cast<uint2*>(out) = *reinterpret_cast<uint2*>(pairs);
}

__device__ void store_one(float* out, float v) { *out = v; }
__device__ void store_one(__nv_bfloat16* out, float v) { *out = __float2bfloat16_rn(v); }

// plane % kPixels == 0 and aligned pointers.
template <typename Out>
__global__ void normalize_by_four(const uint8_t* __restrict__ images, Out* __restrict__ out,
                                  int64_t num_groups, int64_t groups_per_plane,
                                  CudaAffine affine) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t g = int64_t{blockIdx.x} * kThreads + threadIdx.x; g < num_groups; g += stride) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(images) + g * 3;
    const uint32_t packed[3] = {words[0], words[1], words[2]};
    const int64_t image = g / groups_per_plane;
    const int64_t group = g - image * groups_per_plane;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      float values[kPixels];
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        const int byte = p * 3 + c;
        const uint32_t x = (packed[byte / 4] >> (8 * (byte % 4))) & 0xff;
        values[p] = static_cast<float>(x) * affine.scale[c] + affine.shift[c];
      }
      store_four(out + ((image * 3 + c) * groups_per_plane + group) * kPixels, values);
    }
  }
}

template <typename Out>
__global__ void normalize_by_one(const uint8_t* __restrict__ images, Out* __restrict__ out,
                                 int64_t num_pixels, int64_t plane, CudaAffine affine) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < num_pixels; i += stride) {
    const int64_t image = i / plane;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const float value =
          static_cast<float>(images[i * 3 + c]) * affine.scale[c] + affine.shift[c];
      store_one(out + (image * 3 + c) * plane + (i - image * plane), value);
    }
  }
}

template <typename Out>
cudaError_t launch_as(const uint8_t* images, Out* out, int64_t num_images, int64_t plane,
                      const CudaAffine& affine, cudaStream_t stream) {
  const bool aligned = plane % kPixels == 0 && reinterpret_cast<uintptr_t>(images) % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(out) % (kPixels * sizeof(Out)) == 0;
  const int64_t num_items = num_images * plane / (aligned ? kPixels : 1);
  if (num_items == 0) return cudaSuccess;
  const auto blocks =
      static_cast<unsigned>(std::min<int64_t>((num_items + kThreads - 1) / kThreads, kMaxBlocks));
  if (aligned) {
    normalize_by_four<<<blocks, kThreads, 0, stream>>>(images, out, num_items, plane / kPixels,
                                                       affine);
  } else {
    normalize_by_one<<<blocks, kThreads, 0, stream>>>(images, out, num_items, plane, affine);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch(const uint8_t* images, void* out, bool to_bfloat16, int64_t num_images,
                   int64_t plane, const CudaAffine& affine, cudaStream_t stream) {
  if (to_bfloat16) {
    return launch_as(images, static_cast<__nv_bfloat16*>(out), num_images, plane, affine, stream);
  }
  return launch_as(images, static_cast<float*>(out), num_images, plane, affine, stream);
}

}  // namespace carillon::image_normalize
