// The contrastive ops on the CPU: logits live in tiles of a second-level cache's size, never whole.
//
// Columns are taken in strips. A strip's columns are packed once by all threads; then each thread
// goes over its own rows, tile by tile, with sums or gradients of the strip's columns of its own,
// which are added up in thread order. So results depend on the number of threads, and on nothing
// else. Memory beside the results: the packed strip, and each thread's tile and strip gradients.
#include "check.h"
#include "tile.h"

#include "cpu_dispatch.h"
#include "instruction_set.h"
#include "round_up.h"

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace carillon::contrastive {

#define CARILLON_LOOPS "contrastive/loops.h"
#include "cpu_targets.h"

namespace {

#include "pairs.h"

#include "gradients.h"

void write_lse(const Values& shift, const Values& sum, at::Tensor& out, int64_t first,
               int64_t count) {
  float* to = out.mutable_data_ptr<float>() + first;
  for (int64_t k = 0; k < count; ++k) to[k] = sum[k] == 0 ? kLeftOut : shift[k] + std::log(sum[k]);
}

using Reductions = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Shifts, sums and plain sums of one strip's columns, as one task sees them.
struct ColumnSums {
  Values shift, sum, plain;
  void clear(bool with_sums) {
    shift.assign(kStrip, kLeftOut);
    sum.assign(kStrip, 0.0f);
    plain.assign(with_sums ? kStrip : 0, 0.0f);
  }
};

Reductions contrastive(const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& scale,
                       int64_t first_column, const std::optional<at::Tensor>& row_ids,
                       const std::optional<at::Tensor>& column_ids, bool with_sums) {
  check_pairs("contrastive", rows, columns, scale, row_ids, column_ids);
  const Pairs pairs(rows, columns, *scale.const_data_ptr<float>(), 0.0f, first_column, row_ids,
                    column_ids);
  const int64_t n = pairs.num_rows, m = pairs.num_columns;
  const auto options = rows.options().dtype(at::kFloat);
  at::Tensor row_lse = at::empty({n}, options), column_lse = at::empty({m}, options);
  at::Tensor positive = at::zeros({n}, options);
  at::Tensor row_sum = at::zeros({with_sums ? n : 0}, options);
  at::Tensor column_sum = at::zeros({with_sums ? m : 0}, options);
  float* positives = positive.mutable_data_ptr<float>();
  float* row_sums = row_sum.mutable_data_ptr<float>();
  Values row_shift(n, kLeftOut), row_total(n, 0.0f);
  std::vector<ColumnSums> by_task(pairs.num_tasks());
  Values packed;
  for (int64_t strip = 0; strip < m; strip += kStrip) {
    for (auto& own : by_task) own.clear(with_sums);
    pairs.for_each_tile(strip, packed, [&](int64_t task, const Tile& tile, const float* logits,
                                           int64_t row, int64_t column) {
      ColumnSums& own = by_task[task];
      const int64_t at = column - strip;
      pairs.loops.reduce_tile(tile, logits, {row_shift.data() + row, row_total.data() + row},
                          {own.shift.data() + at, own.sum.data() + at});
      if (with_sums) {
        pairs.loops.add_plain_sums(tile, logits, row_sums + row, own.plain.data() + at);
      }
      for (int64_t i = 0; i < tile.num_rows; ++i) {
        if (tile.match(i) >= 0) positives[row + i] = logits[i * kColumnTile + tile.match(i)];
      }
    });
    ColumnSums all;
    all.clear(with_sums);
    for (const auto& own : by_task) {
      for (int64_t k = 0; k < kStrip; ++k) {
        if (own.sum[k] != 0) {
          portable::merge(own.shift[k], own.sum[k], all.shift[k], all.sum[k]);
        }
        if (with_sums) all.plain[k] += own.plain[k];
      }
    }
    const int64_t count = std::min(kStrip, m - strip);
    write_lse(all.shift, all.sum, column_lse, strip, count);
    if (with_sums) {
      std::copy_n(all.plain.data(), count, column_sum.mutable_data_ptr<float>() + strip);
    }
  }
  write_lse(row_shift, row_total, row_lse, 0, n);
  return {row_lse, column_lse, positive, row_sum, column_sum};
}

at::Tensor contrastive_sigmoid(const at::Tensor& rows, const at::Tensor& columns,
                               const at::Tensor& scale, const at::Tensor& bias,
                               int64_t first_column, const std::optional<at::Tensor>& row_ids,
                               const std::optional<at::Tensor>& column_ids) {
  check_pairs("contrastive_sigmoid", rows, columns, scale, row_ids, column_ids);
  check_one("contrastive_sigmoid", "bias", bias);
  const Pairs pairs(rows, columns, *scale.const_data_ptr<float>(), *bias.const_data_ptr<float>(),
                    first_column, row_ids, column_ids);
  at::Tensor loss = at::zeros({pairs.num_rows}, rows.options().dtype(at::kFloat));
  float* losses = loss.mutable_data_ptr<float>();
  Values packed;
  for (int64_t strip = 0; strip < pairs.num_columns; strip += kStrip) {
    pairs.for_each_tile(strip, packed, [&](int64_t, const Tile& tile, float* logits, int64_t row,
                                           int64_t) {
      for (int64_t i = 0; i < tile.num_rows; ++i) {
        losses[row + i] += pairs.loops.sigmoid_row(tile, logits + i * kColumnTile, i);
      }
    });
  }
  return loss;
}

at::Tensor one_value(double value) {
  at::Tensor out = at::empty({1}, at::kFloat);
  *out.mutable_data_ptr<float>() = static_cast<float>(value);
  return out;
}

// Derivatives by the scaled logits become those by the features and by the scale. `weighted` sums
// the derivative by a logit times the logit less its bias, which is the scale times what is wanted.
std::tuple<at::Tensor, at::Tensor, at::Tensor> finish(const GradientSums& sums,
                                                      const at::Tensor& rows, float scale,
                                                      double weighted) {
  const int64_t dims = rows.size(1);
  const auto dtype = rows.scalar_type();
  const at::Tensor by_rows = sums.rows(dims);
  const at::Tensor by_scale = scale == 0.0f
                                  ? by_rows.mul(rows).sum().reshape({1}).to(at::kFloat)
                                  : one_value(weighted / static_cast<double>(scale));
  return {by_rows.mul(scale).to(dtype), sums.columns(dims).mul(scale).to(dtype), by_scale};
}

// Sum over tasks, in order: each has its own place.
double total(const std::vector<double>& by_task) {
  double sum = 0.0;
  for (const double value : by_task) sum += value;
  return sum;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> contrastive_backward(
    const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& scale,
    int64_t first_column, const std::optional<at::Tensor>& row_ids,
    const std::optional<at::Tensor>& column_ids, const at::Tensor& row_lse,
    const at::Tensor& column_lse, const at::Tensor& row_lse_grad,
    const at::Tensor& column_lse_grad, const at::Tensor& positive_grad,
    const std::optional<at::Tensor>& row_sum_grad,
    const std::optional<at::Tensor>& column_sum_grad) {
  const char* op = "contrastive_backward";
  check_pairs(op, rows, columns, scale, row_ids, column_ids);
  const int64_t n = rows.size(0), m = columns.size(0);
  check_vector(op, "row_lse", row_lse, n);
  check_vector(op, "column_lse", column_lse, m);
  check_vector(op, "row_lse_grad", row_lse_grad, n);
  check_vector(op, "column_lse_grad", column_lse_grad, m);
  check_vector(op, "positive_grad", positive_grad, n);
  TORCH_CHECK_VALUE(row_sum_grad.has_value() == column_sum_grad.has_value(), op,
                    ": give row_sum_grad and column_sum_grad, or neither");
  if (row_sum_grad) {
    check_vector(op, "row_sum_grad", *row_sum_grad, n);
    check_vector(op, "column_sum_grad", *column_sum_grad, m);
  }
  const float factor = *scale.const_data_ptr<float>();
  const Pairs pairs(rows, columns, factor, 0.0f, first_column, row_ids, column_ids);
  // A tile reads whole: past the last column stand zeros.
  const int64_t padding = round_up(m, kColumnTile) - m;
  const auto padded = [&](const at::Tensor& values) {
    return at::constant_pad_nd(values, {0, padding}).contiguous();
  };
  const at::Tensor lse_M = padded(column_lse), grad_M = padded(column_lse_grad);
  const at::Tensor lse_N = row_lse.contiguous(), grad_N = row_lse_grad.contiguous();
  const at::Tensor positive_N = positive_grad.contiguous();
  const at::Tensor sum_N = row_sum_grad ? row_sum_grad->contiguous() : at::Tensor();
  const at::Tensor sum_M = column_sum_grad ? padded(*column_sum_grad) : at::Tensor();
  const auto from = [](const at::Tensor& values, int64_t at) {
    return values.defined() ? values.const_data_ptr<float>() + at : nullptr;
  };
  GradientSums sums(pairs);
  std::vector<double> weighted(std::max<int64_t>(at::get_num_threads(), 1), 0.0);
  Values packed;
  for (int64_t strip = 0; strip < m; strip += kStrip) {
    sums.start_strip(strip);
    pairs.for_each_tile(strip, packed, [&](int64_t task, const Tile& tile, float* logits,
                                           int64_t row, int64_t column) {
      const Gradients by{
          .row_lse = from(lse_N, row),
          .column_lse = from(lse_M, column),
          .row_lse_grad = from(grad_N, row),
          .column_lse_grad = from(grad_M, column),
          .positive_grad = from(positive_N, row),
          .row_sum_grad = from(sum_N, row),
          .column_sum_grad = from(sum_M, column),
      };
      weighted[task] += pairs.loops.softmax_weights(tile, logits, by);
      sums.add(task, tile, logits, row, column);
    });
    sums.end_strip();
  }
  return finish(sums, rows, factor, total(weighted));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_sigmoid_backward(
    const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& scale,
    const at::Tensor& bias, int64_t first_column, const std::optional<at::Tensor>& row_ids,
    const std::optional<at::Tensor>& column_ids, const at::Tensor& row_loss_grad) {
  const char* op = "contrastive_sigmoid_backward";
  check_pairs(op, rows, columns, scale, row_ids, column_ids);
  check_one(op, "bias", bias);
  check_vector(op, "row_loss_grad", row_loss_grad, rows.size(0));
  const float factor = *scale.const_data_ptr<float>();
  const Pairs pairs(rows, columns, factor, *bias.const_data_ptr<float>(), first_column, row_ids,
                    column_ids);
  const at::Tensor grad_N = row_loss_grad.contiguous();
  GradientSums sums(pairs);
  const int64_t num_tasks = std::max<int64_t>(at::get_num_threads(), 1);
  std::vector<double> weighted(num_tasks, 0.0), biases(num_tasks, 0.0);
  Values packed;
  for (int64_t strip = 0; strip < pairs.num_columns; strip += kStrip) {
    sums.start_strip(strip);
    pairs.for_each_tile(strip, packed, [&](int64_t task, const Tile& tile, float* logits,
                                           int64_t row, int64_t column) {
      weighted[task] += pairs.loops.sigmoid_weights(tile, logits, grad_N.const_data_ptr<float>() + row,
                                                biases[task]);
      sums.add(task, tile, logits, row, column);
    });
    sums.end_strip();
  }
  return std::tuple_cat(finish(sums, rows, factor, total(weighted)),
                        std::make_tuple(one_value(total(biases))));
}

}  // namespace
}  // namespace carillon::contrastive

TORCH_LIBRARY_IMPL(carillon, CPU, m) {
  m.impl("contrastive", &carillon::contrastive::contrastive);
  m.impl("contrastive_backward", &carillon::contrastive::contrastive_backward);
  m.impl("contrastive_sigmoid", &carillon::contrastive::contrastive_sigmoid);
  m.impl("contrastive_sigmoid_backward", &carillon::contrastive::contrastive_sigmoid_backward);
}
