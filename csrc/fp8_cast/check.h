// Argument checks of fp8_cast, the same for every native provider, and the memory of its outputs.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace carillon::fp8_cast {

inline constexpr int64_t kBlock = 128;

enum class Granularity { kTensorwise, kRowwise, k1x128, k128x128 };

inline constexpr int64_t num_blocks(int64_t size) { return (size + kBlock - 1) / kBlock; }

inline Granularity parse(std::string_view name) {
  if (name == "tensorwise") return Granularity::kTensorwise;
  if (name == "rowwise") return Granularity::kRowwise;
  if (name == "1x128") return Granularity::k1x128;
  TORCH_CHECK_VALUE(name == "128x128",
                    "fp8_cast: granularity must be one of tensorwise, rowwise, 1x128, 128x128, "
                    "got '",
                    name, "'");
  return Granularity::k128x128;
}

inline Granularity check(const at::Tensor& x, std::string_view granularity, at::ScalarType dtype,
                         const std::optional<at::Tensor>& scale, bool power_of_two) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat,
                    "fp8_cast: x must be bfloat16 or float32, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() == 2, "fp8_cast: x must have the shape (M, K), got ", x.sizes());
  const Granularity kind = parse(granularity);
  TORCH_CHECK_VALUE(dtype == at::kFloat8_e4m3fn || dtype == at::kFloat8_e5m2,
                    "fp8_cast: dtype must be float8_e4m3fn or float8_e5m2, got ", dtype);
  if (!scale.has_value()) return kind;
  TORCH_CHECK_VALUE(kind == Granularity::kTensorwise,
                    "fp8_cast: scale goes with tensorwise granularity, got '", granularity, "'");
  TORCH_CHECK_VALUE(!power_of_two,
                    "fp8_cast: power_of_two rounds computed scales, and scale is given");
  TORCH_CHECK_VALUE(
      scale->scalar_type() == at::kFloat && scale->numel() == 1 && scale->device() == x.device(),
      "fp8_cast: scale must be one float32 value on the device of x, ", x.device(), ", got ",
      scale->numel(), " of ", scale->scalar_type(), " on ", scale->device());
  return kind;
}

// The scales of a copy of this size; kernels/fp8_cast/layout.py says why they stand so.
inline at::Tensor new_scale(const at::TensorOptions& options, Granularity granularity,
                            int64_t num_rows, int64_t num_columns) {
  const int64_t blocks = num_blocks(num_columns);
  switch (granularity) {
    case Granularity::kTensorwise:
      return at::empty({}, options);
    case Granularity::kRowwise:
      return at::empty({num_rows, 1}, options);
    case Granularity::k1x128:
      return at::empty({blocks, num_rows}, options).t();
    default:
      return at::zeros({num_blocks(num_rows), (blocks + 3) / 4 * 4}, options).narrow(1, 0, blocks);
  }
}

}  // namespace carillon::fp8_cast
