// image_normalize's CUDA provider: checks, allocates, and calls the launcher on torch's stream.
#include "check.h"
#include "cuda.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

namespace carillon::image_normalize {
namespace {

at::Tensor image_normalize(const at::Tensor& images, at::ArrayRef<double> mean,
                           at::ArrayRef<double> std, at::ScalarType dtype) {
  const Affine affine = check(images, mean, std, dtype);
  const c10::cuda::CUDAGuard guard(images.device());
  const at::Tensor source = images.contiguous();
  at::Tensor out = at::empty({source.size(0), kNumChannels, source.size(1), source.size(2)},
                             source.options().dtype(dtype));
  CudaAffine cuda_affine;
  std::copy(affine.scale.begin(), affine.scale.end(), cuda_affine.scale);
  std::copy(affine.shift.begin(), affine.shift.end(), cuda_affine.shift);
  if (out.numel() == 0) return out;
  C10_CUDA_CHECK(launch(source.const_data_ptr<uint8_t>(), out.mutable_data_ptr(),
                        dtype == at::kBFloat16, source.size(0), source.size(1) * source.size(2),
                        cuda_affine, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace
}  // namespace carillon::image_normalize

TORCH_LIBRARY_IMPL(carillon, CUDA, m) {
  m.impl("image_normalize", &carillon::image_normalize::image_normalize);
}
