// fp8_cast on the CPU: panels that stay in the second-level cache from the read of x to the write of
// both copies. Tensorwise (without a given scale) and rowwise scales take a first pass over x.
#include "check.h"
#include "panel.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <mutex>
#include <vector>

namespace carillon::fp8_cast {
namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ScaleView view(const at::Tensor& scale) {
  if (scale.dim() == 0) return {scale.mutable_data_ptr<float>(), 0, 0};
  return {scale.mutable_data_ptr<float>(), scale.stride(0), scale.stride(1)};
}

template <typename Bits>
void raise_atomic(std::atomic<Bits>& target, Bits value) {
  Bits seen = target.load(std::memory_order_relaxed);
  while (seen < value && !target.compare_exchange_weak(seen, value)) {
  }
}

// What must be known of all of x before the first code. The order of a maximum does not matter, so
// any number of threads finds the same.
template <typename Bits>
struct WholeAmax {
  std::atomic<Bits> any{0};
  std::atomic<Bits> finite{0};
  std::vector<Bits> rows;     // finite ones
  std::vector<Bits> columns;  // finite ones; empty where they are not asked for

  WholeAmax(const Bits* x, int64_t num_rows, int64_t num_columns, bool with_columns)
      : rows(num_rows), columns(with_columns ? num_columns : 0) {
    std::mutex merging;
    at::parallel_for(0, num_rows, kBlock, [&](int64_t begin, int64_t end) {
      std::vector<Bits> own(columns.size());
      Largest<Bits> all;
      for (int64_t r = begin; r < end; ++r) {
        const Bits* row = x + r * num_columns;
        const Largest<Bits> found = largest(row, num_columns);
        rows[r] = found.finite;
        all.any = std::max(all.any, found.any);
        all.finite = std::max(all.finite, found.finite);
        raise(row, static_cast<int64_t>(own.size()), own.data());
      }
      raise_atomic(any, all.any);
      raise_atomic(finite, all.finite);
      const std::lock_guard<std::mutex> lock(merging);
      for (size_t c = 0; c < own.size(); ++c) columns[c] = std::max(columns[c], own[c]);
    });
  }
};

template <typename Bits>
std::vector<float> write_scales(const std::vector<Bits>& amax, const Rule& rule, ScaleView target) {
  std::vector<float> inverse(amax.size());
  for (size_t i = 0; i < amax.size(); ++i) {
    const float scale = rule.scale(to_float(amax[i]));
    target.at(static_cast<int64_t>(i), 0) = scale;
    inverse[i] = 1.0f / scale;
  }
  return inverse;
}

// Fills the outputs and returns the largest magnitude of all of x.
template <typename Format, typename Bits>
float cast(const Bits* x, const Matrix& matrix, Granularity granularity, const Rule& rule,
           const float* given_scale, const Copies& copies) {
  std::atomic<Bits> any{0};
  Known known;
  std::vector<float> row_inverse;
  std::vector<float> column_inverse;
  bool count_amax = true;
  if (granularity == Granularity::kTensorwise) {
    float scale;
    if (given_scale != nullptr) {
      scale = *given_scale;
    } else {
      const WholeAmax<Bits> whole(x, matrix.num_rows, matrix.num_columns, false);
      any = whole.any.load();
      scale = rule.scale(to_float(whole.finite.load()));
      count_amax = false;
    }
    copies.row_scale.at(0, 0) = scale;
    if (copies.with_column) copies.column_scale.at(0, 0) = scale;
    known.inverse = 1.0f / scale;
  } else if (granularity == Granularity::kRowwise) {
    const WholeAmax<Bits> whole(x, matrix.num_rows, matrix.num_columns, copies.with_column);
    any = whole.any.load();
    count_amax = false;
    row_inverse = write_scales(whole.rows, rule, copies.row_scale);
    if (copies.with_column) {
      column_inverse = write_scales(whole.columns, rule, copies.column_scale);
    }
    known.row_inverse = row_inverse.data();
    known.column_inverse = column_inverse.data();
  }
  const int64_t across = (matrix.num_columns + kPanelColumns - 1) / kPanelColumns;
  const int64_t down = (matrix.num_rows + kPanelRows - 1) / kPanelRows;
  at::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    Panel<Format, Bits> panel(x, matrix, granularity, rule, known, copies);
    Bits own = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * kPanelRows;
      const int64_t column = i % across * kPanelColumns;
      if (count_amax) own = std::max(own, panel.amax(row, column));
      panel.cast(row, column);
    }
    raise_atomic(any, own);
  });
  return to_float(any.load());
}

template <typename Format>
float cast_from(const at::Tensor& x, const Matrix& matrix, Granularity granularity,
                const Rule& rule, const float* given_scale, const Copies& copies) {
  if (x.scalar_type() == at::kBFloat16) {
    return cast<Format>(reinterpret_cast<const uint16_t*>(x.const_data_ptr()), matrix, granularity,
                        rule, given_scale, copies);
  }
  return cast<Format>(reinterpret_cast<const uint32_t*>(x.const_data_ptr()), matrix, granularity,
                      rule, given_scale, copies);
}

Outputs fp8_cast(const at::Tensor& x, std::string_view granularity_name, at::ScalarType dtype,
                 const std::optional<at::Tensor>& scale, bool column, bool power_of_two,
                 bool check_finite) {
  const Granularity granularity = check(x, granularity_name, dtype, scale, power_of_two);
  const at::Tensor source = x.contiguous();
  const Matrix matrix{source.size(0), source.size(1)};
  const at::TensorOptions codes = source.options().dtype(dtype);
  const at::TensorOptions scales = source.options().dtype(at::kFloat);
  const auto new_copy = [&](int64_t rows, int64_t columns) {
    return std::make_pair(at::empty({rows, columns}, codes),
                          new_scale(scales, granularity, rows, columns));
  };
  const auto [row, row_scale] = new_copy(matrix.num_rows, matrix.num_columns);
  const auto [transposed, column_scale] =
      column ? new_copy(matrix.num_columns, matrix.num_rows)
             : std::make_pair(at::empty({0, 0}, codes), at::empty({0, 0}, scales));
  Copies copies;
  copies.row = static_cast<uint8_t*>(row.mutable_data_ptr());
  copies.row_scale = view(row_scale);
  if (column) {
    copies.with_column = true;
    copies.column = static_cast<uint8_t*>(transposed.mutable_data_ptr());
    copies.column_scale = view(column_scale);
  }
  const bool e4m3 = dtype == at::kFloat8_e4m3fn;
  const Rule rule{e4m3 ? E4m3::kMax : E5m2::kMax, power_of_two};
  const float* given = scale.has_value() ? scale->const_data_ptr<float>() : nullptr;
  const float largest =
      e4m3 ? cast_from<E4m3>(source, matrix, granularity, rule, given, copies)
           : cast_from<E5m2>(source, matrix, granularity, rule, given, copies);
  at::Tensor amax = at::empty({}, scales);
  *amax.mutable_data_ptr<float>() = largest;
  if (check_finite) {
    TORCH_CHECK_VALUE(std::isfinite(largest),
                      "fp8_cast: x must be finite, its largest magnitude is ", largest);
    TORCH_CHECK_VALUE(given == nullptr || (std::isfinite(*given) && *given > 0),
                      "fp8_cast: scale must be positive and finite, got ", *given);
  }
  return {row, row_scale, transposed, column_scale, amax};
}

}  // namespace
}  // namespace carillon::fp8_cast

TORCH_LIBRARY_IMPL(carillon, CPU, m) { m.impl("fp8_cast", &carillon::fp8_cast::fp8_cast); }
