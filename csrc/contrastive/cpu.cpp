// The contrastive ops on the CPU: logits live in tiles of a second-level cache's size, never whole.
//
// Columns are taken in strips. A strip's columns are packed once by all threads; then each thread
// goes over its own rows, tile by tile, with sums or gradients of the strip's columns of its own,
// which are added up in thread order. So results depend on the number of threads, and on nothing
// else. Memory beside the results: the packed strip, and each thread's tile and strip gradients.
#include "check.h"
#include "tile.h"

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace carillon::contrastive {

#define CARILLON_LOOPS "contrastive/loops.h"
#include "cpu_targets.h"

const Loops& loops() {
#ifdef CARILLON_X86_TARGETS
  static const Loops& chosen = [&]() -> const Loops& {
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return avx512_bf16::kLoops;
    if (avx512) return avx512::kLoops;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kLoops;
    return portable::kLoops;
  }();
  return chosen;
#else
  return portable::kLoops;
#endif
}

namespace {

constexpr int64_t kTilesPerStrip = 5;
constexpr int64_t kStrip = kTilesPerStrip * kColumnTile;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Calls work(task, first tile, end) for an even share of the row tiles a thread.
template <typename Work>
void for_each_thread(int64_t num_tiles, const Work& work) {
  const int64_t num_tasks = std::min<int64_t>(at::get_num_threads(), num_tiles);
  at::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      work(task, num_tiles * task / num_tasks, num_tiles * (task + 1) / num_tasks);
    }
  });
}

using Words = std::vector<uint32_t>;
using Values = std::vector<float>;

// The arguments that all four ops share, contiguous, with an even number of words a row.
class Pairs {
 public:
  Pairs(const at::Tensor& rows, const at::Tensor& columns, float scale, float bias,
        int64_t first_column, const std::optional<at::Tensor>& row_ids,
        const std::optional<at::Tensor>& column_ids)
      : is_bfloat16(rows.scalar_type() == at::kBFloat16),
        num_rows(rows.size(0)),
        num_columns(columns.size(0)),
        dims(rows.size(1)),
        scale_(scale),
        bias_(bias),
        first_column_(first_column) {
    const bool odd = is_bfloat16 && dims % 2 != 0;
    rows_ = odd ? at::constant_pad_nd(rows, {0, 1}) : rows.contiguous();
    columns_ = odd ? at::constant_pad_nd(columns, {0, 1}) : columns.contiguous();
    depth = is_bfloat16 ? rows_.size(1) / 2 : dims;
    padded_dims = round_up(std::max<int64_t>(dims, 1), loops().panel);
    if (row_ids) {
      row_ids_ = row_ids->contiguous();
      column_ids_ = column_ids->contiguous();
    }
  }

  bool is_bfloat16;
  int64_t num_rows, num_columns, dims, depth, padded_dims;

  int64_t num_row_tiles() const { return (num_rows + kRowTile - 1) / kRowTile; }

  const uint32_t* row_words(int64_t row) const { return words(rows_) + row * depth; }

  // Packs the columns of a strip as the right factor of the logits' product.
  void pack_strip(int64_t first, Words& to) const {
    to.resize(kStrip * depth);
    const int64_t count = std::min(kStrip, num_columns - first);
    const int64_t num_panels = kStrip / loops().panel;
    at::parallel_for(0, num_panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t at = panel * loops().panel;
        const int64_t present = std::clamp<int64_t>(count - at, 0, loops().panel);
        loops().pack_columns(words(columns_) + (first + std::min(at, count)) * depth, present,
                             depth, to.data() + at * depth, loops().panel);
      }
    });
  }

  // Packs `count` rows of either side, `padded` deep, as the right factor of a gradient's product.
  void pack_rows(bool columns, int64_t first, int64_t count, int64_t padded, uint32_t* to) const {
    const at::Tensor& from = columns ? columns_ : rows_;
    if (is_bfloat16) {
      loops().pack_rows_bfloat16(
          reinterpret_cast<const uint16_t*>(from.const_data_ptr<at::BFloat16>()) +
              first * 2 * depth,
          count, 2 * depth, to, padded, padded_dims);
    } else {
      loops().pack_rows_float(from.const_data_ptr<float>() + first * dims, count, dims, to, padded,
                              padded_dims);
    }
  }

  // Words of one packed tile of `padded` rows.
  int64_t packed_words(int64_t padded) const {
    return padded_dims * (is_bfloat16 ? padded / 2 : padded);
  }

  // A tile's description; rows past the last are read from `edge`, which it fills when needed.
  Tile tile(int64_t row, int64_t column, const uint32_t* packed_columns, Words& edge) const {
    const int64_t rows_here = std::min(kRowTile, num_rows - row);
    const uint32_t* from = row_words(row);
    if (rows_here < kRowTile) {
      edge.assign(kRowTile * depth, 0);
      std::copy(from, from + rows_here * depth, edge.begin());
      from = edge.data();
    }
    return Tile{
        .rows = from,
        .columns = packed_columns,
        .depth = depth,
        .num_rows = rows_here,
        .num_columns = std::min(kColumnTile, num_columns - column),
        .scale = scale_,
        .bias = bias_,
        .first_match = first_column_ + row - column,
        .row_ids = row_ids_.defined() ? row_ids_.const_data_ptr<int64_t>() + row : nullptr,
        .column_ids = row_ids_.defined() ? column_ids_.const_data_ptr<int64_t>() + column : nullptr,
    };
  }

  void fill(const Tile& tile, float* logits) const {
    (is_bfloat16 ? loops().fill_bfloat16 : loops().fill_float)(tile, logits);
  }

 private:
  const uint32_t* words(const at::Tensor& features) const {
    return static_cast<const uint32_t*>(features.const_data_ptr());
  }

  at::Tensor rows_, columns_, row_ids_, column_ids_;
  float scale_, bias_;
  int64_t first_column_;
};

// Calls visit(task, tile, logits, first row, first column) for every tile of a strip, tiles of one
// task in order. `logits` is the task's own.
template <typename Visit>
void for_each_tile(const Pairs& pairs, int64_t strip, const Words& packed, const Visit& visit) {
  for_each_thread(pairs.num_row_tiles(), [&](int64_t task, int64_t begin, int64_t end) {
    Values logits(kRowTile * kColumnTile);
    Words edge;
    for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
      const int64_t last = std::min(strip + kStrip, pairs.num_columns);
      for (int64_t column = strip; column < last; column += kColumnTile) {
        const uint32_t* columns = packed.data() + (column - strip) * pairs.depth;
        const Tile tile = pairs.tile(row_tile * kRowTile, column, columns, edge);
        pairs.fill(tile, logits.data());
        visit(task, tile, logits.data(), row_tile * kRowTile, column);
      }
    }
  });
}

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
  check_pairs("contrastive", rows, columns, scale, first_column, row_ids, column_ids);
  const Pairs pairs(rows, columns, *scale.const_data_ptr<float>(), 0.0f, first_column, row_ids,
                    column_ids);
  const int64_t n = pairs.num_rows, m = pairs.num_columns;
  const auto options = rows.options().dtype(at::kFloat);
  at::Tensor row_lse = at::empty({n}, options), column_lse = at::empty({m}, options);
  at::Tensor positive = at::empty({n}, options);
  at::Tensor row_sum = at::zeros({with_sums ? n : 0}, options);
  at::Tensor column_sum = at::zeros({with_sums ? m : 0}, options);
  float* positives = positive.mutable_data_ptr<float>();
  float* row_sums = row_sum.mutable_data_ptr<float>();
  Values row_shift(n, kLeftOut), row_total(n, 0.0f);
  std::vector<ColumnSums> by_task(std::min<int64_t>(at::get_num_threads(), pairs.num_row_tiles()));
  Words packed;
  for (int64_t strip = 0; strip < m; strip += kStrip) {
    pairs.pack_strip(strip, packed);
    for (auto& own : by_task) own.clear(with_sums);
    for_each_tile(pairs, strip, packed, [&](int64_t task, const Tile& tile, const float* logits,
                                            int64_t row, int64_t column) {
      ColumnSums& own = by_task[task];
      const int64_t at = column - strip;
      loops().reduce_tile(tile, logits, {row_shift.data() + row, row_total.data() + row},
                          {own.shift.data() + at, own.sum.data() + at});
      if (with_sums) {
        loops().add_plain_sums(tile, logits, row_sums + row, own.plain.data() + at);
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
  check_pairs("contrastive_sigmoid", rows, columns, scale, first_column, row_ids, column_ids);
  check_one("contrastive_sigmoid", "bias", bias);
  const Pairs pairs(rows, columns, *scale.const_data_ptr<float>(), *bias.const_data_ptr<float>(),
                    first_column, row_ids, column_ids);
  at::Tensor loss = at::zeros({pairs.num_rows}, rows.options().dtype(at::kFloat));
  float* losses = loss.mutable_data_ptr<float>();
  Words packed;
  for (int64_t strip = 0; strip < pairs.num_columns; strip += kStrip) {
    pairs.pack_strip(strip, packed);
    for_each_tile(pairs, strip, packed,
                  [&](int64_t, const Tile& tile, float* logits, int64_t row, int64_t) {
                    for (int64_t i = 0; i < tile.num_rows; ++i) {
                      losses[row + i] += loops().sigmoid_row(tile, logits + i * kColumnTile, i);
                    }
                  });
  }
  return loss;
}

// What a backward pass accumulates into, and each task's room for it.
class GradientBuffers {
 public:
  explicit GradientBuffers(const Pairs& pairs) : pairs_(pairs) {
    const int64_t num_tasks = std::min<int64_t>(at::get_num_threads(), pairs.num_row_tiles());
    rows.assign(pairs.num_row_tiles() * kRowTile * pairs.padded_dims, 0.0f);
    tasks_.resize(num_tasks);
    packed_columns_.resize(kTilesPerStrip * pairs.packed_words(kColumnTile));
    columns = at::empty({pairs.num_columns, pairs.dims}, at::kFloat);
  }

  std::vector<float> rows;  // row tiles x padded_dims
  at::Tensor columns;

  void start_strip(int64_t strip) {
    strip_ = strip;
    at::parallel_for(0, kTilesPerStrip, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = strip + t * kColumnTile;
        if (first >= pairs_.num_columns) continue;
        pairs_.pack_rows(true, first, std::min(kColumnTile, pairs_.num_columns - first),
                         kColumnTile, packed_columns_.data() + t * pairs_.packed_words(kColumnTile));
      }
    });
    for (auto& task : tasks_) {
      task.columns.assign(kStrip * pairs_.padded_dims, 0.0f);
      task.packed_row = -1;
    }
  }

  void add(int64_t number, const Tile& tile, const float* weights, int64_t row, int64_t column) {
    Task& task = tasks_[number];
    if (task.packed_row != row) {
      task.packed_rows.resize(pairs_.packed_words(kRowTile));
      pairs_.pack_rows(false, row, tile.num_rows, kRowTile, task.packed_rows.data());
      task.packed_row = row;
      task.by_row.resize(kRowTile * kColumnTile / 2);
      task.by_column.resize(kRowTile * kColumnTile / 2);
    }
    const int64_t at = column - strip_;
    loops().add_gradients(
        TileGradients{
            .rows = task.packed_rows.data(),
            .columns =
                packed_columns_.data() + at / kColumnTile * pairs_.packed_words(kColumnTile),
            .rows_grad = rows.data() + row * pairs_.padded_dims,
            .columns_grad = task.columns.data() + at * pairs_.padded_dims,
            .padded_dims = pairs_.padded_dims,
            .by_row = task.by_row.data(),
            .by_column = task.by_column.data(),
        },
        weights, pairs_.is_bfloat16);
  }

  void end_strip() {
    const int64_t count = std::min(kStrip, pairs_.num_columns - strip_);
    const int64_t dims = pairs_.dims, padded = pairs_.padded_dims;
    float* to = columns.mutable_data_ptr<float>() + strip_ * dims;
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        for (int64_t d = 0; d < dims; ++d) {
          float sum = 0.0f;
          for (const auto& task : tasks_) sum += task.columns[k * padded + d];
          to[k * dims + d] = sum;
        }
      }
    });
  }

  // The rows' gradients without their padding.
  at::Tensor rows_tensor() const {
    at::Tensor out = at::empty({pairs_.num_rows, pairs_.dims}, at::kFloat);
    float* to = out.mutable_data_ptr<float>();
    at::parallel_for(0, pairs_.num_rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::copy_n(rows.data() + i * pairs_.padded_dims, pairs_.dims, to + i * pairs_.dims);
      }
    });
    return out;
  }

 private:
  struct Task {
    Values columns;
    Words packed_rows, by_row, by_column;
    int64_t packed_row = -1;
  };
  const Pairs& pairs_;
  std::vector<Task> tasks_;
  Words packed_columns_;
  int64_t strip_ = 0;
};

at::Tensor one_value(double value) {
  at::Tensor out = at::empty({1}, at::kFloat);
  *out.mutable_data_ptr<float>() = static_cast<float>(value);
  return out;
}

// Derivatives by the scaled logits become those by the features and by the scale. `weighted` sums
// the derivative by a logit times the logit less its bias, which is the scale times what is wanted.
std::tuple<at::Tensor, at::Tensor, at::Tensor> finish(const GradientBuffers& buffers,
                                                      const at::Tensor& rows, float scale,
                                                      double weighted) {
  const at::Tensor by_rows = buffers.rows_tensor();
  const at::Tensor by_scale = scale == 0.0f
                                  ? by_rows.mul(rows).sum().reshape({1}).to(at::kFloat)
                                  : one_value(weighted / static_cast<double>(scale));
  const auto dtype = rows.scalar_type();
  return {by_rows.mul(scale).to(dtype), buffers.columns.mul(scale).to(dtype), by_scale};
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
  check_pairs(op, rows, columns, scale, first_column, row_ids, column_ids);
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
  GradientBuffers buffers(pairs);
  std::vector<double> weighted(std::max<int64_t>(at::get_num_threads(), 1), 0.0);
  Words packed;
  for (int64_t strip = 0; strip < m; strip += kStrip) {
    pairs.pack_strip(strip, packed);
    buffers.start_strip(strip);
    for_each_tile(pairs, strip, packed, [&](int64_t task, const Tile& tile, float* logits,
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
      weighted[task] += loops().softmax_weights(tile, logits, by);
      buffers.add(task, tile, logits, row, column);
    });
    buffers.end_strip();
  }
  return finish(buffers, rows, factor, total(weighted));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_sigmoid_backward(
    const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& scale,
    const at::Tensor& bias, int64_t first_column, const std::optional<at::Tensor>& row_ids,
    const std::optional<at::Tensor>& column_ids, const at::Tensor& row_loss_grad) {
  const char* op = "contrastive_sigmoid_backward";
  check_pairs(op, rows, columns, scale, first_column, row_ids, column_ids);
  check_one(op, "bias", bias);
  check_vector(op, "row_loss_grad", row_loss_grad, rows.size(0));
  const float factor = *scale.const_data_ptr<float>();
  const Pairs pairs(rows, columns, factor, *bias.const_data_ptr<float>(), first_column, row_ids,
                    column_ids);
  const at::Tensor grad_N = row_loss_grad.contiguous();
  GradientBuffers buffers(pairs);
  const int64_t num_tasks = std::max<int64_t>(at::get_num_threads(), 1);
  std::vector<double> weighted(num_tasks, 0.0), biases(num_tasks, 0.0);
  Words packed;
  for (int64_t strip = 0; strip < pairs.num_columns; strip += kStrip) {
    pairs.pack_strip(strip, packed);
    buffers.start_strip(strip);
    for_each_tile(pairs, strip, packed, [&](int64_t task, const Tile& tile, float* logits,
                                            int64_t row, int64_t column) {
      weighted[task] += loops().sigmoid_weights(tile, logits, grad_N.const_data_ptr<float>() + row,
                                                biases[task]);
      buffers.add(task, tile, logits, row, column);
    });
    buffers.end_strip();
  }
  return std::tuple_cat(finish(buffers, rows, factor, total(weighted)),
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
