// Argument checks of the contrastive ops, shared by their providers; the reference's messages.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace carillon::contrastive {

inline void check_ids(const char* op, const char* what, const std::optional<at::Tensor>& ids,
                      int64_t length) {
  if (!ids) return;
  TORCH_CHECK_VALUE(ids->dim() == 1 && ids->size(0) == length && ids->scalar_type() == at::kLong,
                    op, ": ", what, " must be int64 of shape (", length, ",), got ",
                    ids->scalar_type(), " of shape ", ids->sizes());
}

inline void check_one(const char* op, const char* what, const at::Tensor& value) {
  TORCH_CHECK_VALUE(value.dim() == 1 && value.size(0) == 1 && value.scalar_type() == at::kFloat, op,
                    ": ", what, " must be one float32 value of shape (1,), got ",
                    value.scalar_type(), " of shape ", value.sizes());
}

// What every statistic and gradient of rows or of columns must look like.
inline void check_vector(const char* op, const char* what, const at::Tensor& values,
                         int64_t length) {
  TORCH_CHECK_VALUE(
      values.dim() == 1 && values.size(0) == length && values.scalar_type() == at::kFloat, op, ": ",
      what, " must be float32 of shape (", length, ",), got ", values.scalar_type(), " of shape ",
      values.sizes());
}

inline void check_pairs(const char* op, const at::Tensor& rows, const at::Tensor& columns,
                        const at::Tensor& scale, const std::optional<at::Tensor>& row_ids,
                        const std::optional<at::Tensor>& column_ids) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && columns.dim() == 2 && rows.size(1) == columns.size(1), op,
                    ": rows and columns must have the shapes (N, D) and (M, D), got ", rows.sizes(),
                    " and ", columns.sizes());
  const auto dtype = rows.scalar_type();
  TORCH_CHECK_VALUE(
      (dtype == at::kFloat || dtype == at::kBFloat16) && columns.scalar_type() == dtype, op,
      ": rows and columns must both be float32 or both bfloat16, got ", dtype, " and ",
      columns.scalar_type());
  check_one(op, "scale", scale);
  TORCH_CHECK_VALUE(row_ids.has_value() == column_ids.has_value(), op,
                    ": give row_ids and column_ids, or neither");
  check_ids(op, "row_ids", row_ids, rows.size(0));
  check_ids(op, "column_ids", column_ids, columns.size(0));
}

}  // namespace carillon::contrastive
