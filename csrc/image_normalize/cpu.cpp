// image_normalize on the CPU: one pass from interleaved bytes to planes of float32 or bfloat16.
#include "check.h"

#include "cpu_dispatch.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>

namespace carillon::image_normalize {
namespace {

// Pixels per task: 8192 x 3 bytes read and 96 KiB written, about an L2 cache's share.
constexpr int64_t kGrainPixels = 8192;

CARILLON_CPU_CLONES
void normalize_float(const uint8_t* pixels, int64_t num_pixels, int64_t plane,
                     const Affine& affine, float* out) {
  for (int64_t c = 0; c < kNumChannels; ++c) {
    const float scale = affine.scale[c];
    const float shift = affine.shift[c];
    float* __restrict target = out + c * plane;
    for (int64_t i = 0; i < num_pixels; ++i) {
      target[i] = static_cast<float>(pixels[i * kNumChannels + c]) * scale + shift;
    }
  }
}

// Rounds to nearest even by integer arithmetic, which vectorises; no value is NaN or infinite.
CARILLON_CPU_CLONES
void normalize_bfloat16(const uint8_t* pixels, int64_t num_pixels, int64_t plane,
                        const Affine& affine, uint16_t* out) {
  for (int64_t c = 0; c < kNumChannels; ++c) {
    const float scale = affine.scale[c];
    const float shift = affine.shift[c];
    uint16_t* __restrict target = out + c * plane;
    for (int64_t i = 0; i < num_pixels; ++i) {
      const float value = static_cast<float>(pixels[i * kNumChannels + c]) * scale + shift;
      const uint32_t bits = std::bit_cast<uint32_t>(value);
      target[i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
  }
}

// Calls span(first pixel, number of pixels, offset of the span in the output's first plane) for
// pieces that never cross a picture's end.
template <typename Span>
void for_each_span(int64_t num_images, int64_t plane, const Span& span) {
  at::parallel_for(0, num_images * plane, kGrainPixels, [&](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end;) {
      const int64_t image = pixel / plane;
      const int64_t image_end = (image + 1) * plane;
      const int64_t stop = std::min({end, image_end, pixel + kGrainPixels});
      span(pixel, stop - pixel, image * kNumChannels * plane + (pixel - image * plane));
      pixel = stop;
    }
  });
}

at::Tensor image_normalize(const at::Tensor& images, at::ArrayRef<double> mean,
                           at::ArrayRef<double> std, at::ScalarType dtype) {
  const Affine affine = check(images, mean, std, dtype);
  const at::Tensor source = images.contiguous();
  const int64_t plane = source.size(1) * source.size(2);
  at::Tensor out = at::empty({source.size(0), kNumChannels, source.size(1), source.size(2)},
                             source.options().dtype(dtype));
  if (out.numel() == 0) return out;
  const uint8_t* pixels = source.const_data_ptr<uint8_t>();
  if (dtype == at::kFloat) {
    float* values = out.mutable_data_ptr<float>();
    for_each_span(source.size(0), plane, [&](int64_t first, int64_t count, int64_t offset) {
      normalize_float(pixels + first * kNumChannels, count, plane, affine, values + offset);
    });
  } else {
    auto* values = reinterpret_cast<uint16_t*>(out.mutable_data_ptr<at::BFloat16>());
    for_each_span(source.size(0), plane, [&](int64_t first, int64_t count, int64_t offset) {
      normalize_bfloat16(pixels + first * kNumChannels, count, plane, affine, values + offset);
    });
  }
  return out;
}

}  // namespace
}  // namespace carillon::image_normalize

TORCH_LIBRARY_IMPL(carillon, CPU, m) {
  m.impl("image_normalize", &carillon::image_normalize::image_normalize);
}
