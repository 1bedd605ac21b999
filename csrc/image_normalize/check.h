// Argument checks of image_normalize, the same for every native provider.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>

#include <array>
#include <cmath>

namespace carillon::image_normalize {

inline constexpr int64_t kNumChannels = 3;

// x / 255 / std - mean / std as one multiply-add per value.
struct Affine {
  std::array<float, kNumChannels> scale;
  std::array<float, kNumChannels> shift;
};

inline Affine check(const at::Tensor& images, at::ArrayRef<double> mean, at::ArrayRef<double> std,
                    at::ScalarType dtype) {
  TORCH_CHECK_VALUE(images.scalar_type() == at::kByte,
                    "image_normalize: images must be uint8, got ", images.scalar_type());
  TORCH_CHECK_VALUE(images.dim() == 4 && images.size(3) == kNumChannels,
                    "image_normalize: images must have the shape (N, H, W, 3), got ",
                    images.sizes());
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16,
                    "image_normalize: dtype must be float32 or bfloat16, got ", dtype);
  TORCH_CHECK_VALUE(mean.size() == kNumChannels && std.size() == kNumChannels,
                    "image_normalize: mean and std must have 3 values, got ", mean.size(), " and ",
                    std.size());
  Affine affine;
  for (int64_t c = 0; c < kNumChannels; ++c) {
    TORCH_CHECK_VALUE(std::isfinite(mean[c]) && std::isfinite(std[c]) && std[c] > 0,
                      "image_normalize: mean must be finite and std finite and positive, got ",
                      mean, " and ", std);
    affine.scale[c] = static_cast<float>(1.0 / (255.0 * std[c]));
    affine.shift[c] = static_cast<float>(-mean[c] / std[c]);
  }
  return affine;
}

}  // namespace carillon::image_normalize
