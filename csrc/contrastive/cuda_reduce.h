// Forward pass, softmax form: what becomes of one tile of products.
//
// The first tile of a unit sets a shift, its largest logit, which all exponentials of the unit
// share: one exponential a pair then serves its row's and its column's sum, and no later tile needs
// a maximum. Where a sum leaves float32's safe range by that shift, the tile is reduced again with
// each row's and each column's own largest logit, and the next tile sets a shift of its own.
#pragma once

#include "cuda_lanes.h"
#include "cuda_tile.h"

namespace carillon::contrastive {

struct ReduceArguments {
  PairArguments pairs;
  ForwardPlan plan;
  Total* row_totals;     // (column groups, N), every one written
  Total* column_totals;  // (column slots, M), written where a block touches the column's group
  float* row_sums;       // likewise; null where no sums were asked for
  float* column_sums;
  float* positive;       // (N,), written for rows that match a column
};

// What all units left of a row, and all blocks of a column, in a fixed order.
CARILLON_HOST_DEVICE void finish_row(const ReduceArguments& of, int64_t row, float* lse,
                                     float* sums) {
  Total all;
  float sum = 0.0f;
  for (int group = 0; group < of.plan.column_groups; ++group) {
    const int64_t at = group * of.pairs.num_rows + row;
    all = merge(all, of.row_totals[at]);
    if (sums != nullptr) sum += of.row_sums[at];
  }
  lse[row] = log_of(all);
  if (sums != nullptr) sums[row] = sum;
}

CARILLON_HOST_DEVICE void finish_column(const ReduceArguments& of, int64_t column, float* lse,
                                        float* sums) {
  const int column_group = of.plan.column_group_of(column);
  Total all;
  float sum = 0.0f;
  for (int block = 0; block < of.plan.grid; ++block) {
    if (!of.plan.touches(block, column_group)) continue;
    for (int group = 0; group < kGroups; ++group) {
      const int64_t at = of.plan.column_slot(block, group) * of.pairs.num_columns + column;
      all = merge(all, of.column_totals[at]);
      if (sums != nullptr) sum += of.column_sums[at];
    }
  }
  lse[column] = log_of(all);
  if (sums != nullptr) sums[column] = sum;
}

template <class Threads>
class ReducePairs {
 public:
  using Arguments = ReduceArguments;

  CARILLON_HOST_DEVICE ReducePairs(Threads& threads, const Arguments& arguments, int block,
                                   int group)
      : threads_(threads),
        of_(arguments),
        scale_(arguments.pairs.scale[0]),
        slot_(arguments.plan.column_slot(block, group)) {}

  CARILLON_HOST_DEVICE void start_unit(int unit) {
    unit_ = unit;
    is_first_ = of_.plan.is_first(unit);
    has_shift_ = false;
    CARILLON_UNROLL
    for (int k = 0; k < 2; ++k) {
      rows_[k] = Total{};
      row_sums_[k] = 0.0f;
    }
  }

  CARILLON_HOST_DEVICE void add_tile(float (&dots)[kRegisters], int64_t row, int64_t column) {
    const TileAt tile(of_.pairs, row, column);
    if (tile.match != kNoMatch) write_positives(dots, tile);
    float factor = scale_ * kLog2E;
    if (!tile.is_whole()) {
      leave_out(dots, tile, factor);
      factor = 1.0f;
    }
    if (of_.row_sums != nullptr) add_sums(dots, tile, factor * kLn2);
    if (!has_shift_) choose_shift(dots, factor);
    if (!add_with_shared_shift(dots, tile, factor)) {
      add_exactly(dots, tile, factor);
      has_shift_ = false;  // what suits no sum here may suit no later tile
    }
  }

  CARILLON_HOST_DEVICE void end_unit(int64_t row) {
    if (threads_.thread % 4 != 0) return;
    CARILLON_UNROLL
    for (int k = 0; k < 2; ++k) {
      const int64_t at = row + hopper::row_of(threads_.thread, 2 * k);
      if (at >= of_.pairs.num_rows) continue;
      const int64_t to = of_.plan.column_group(unit_) * of_.pairs.num_rows + at;
      of_.row_totals[to] = rows_[k];
      if (of_.row_sums != nullptr) of_.row_sums[to] = row_sums_[k];
    }
  }

  CARILLON_HOST_DEVICE void finish() {}

 private:
  CARILLON_HOST_DEVICE void write_positives(const float (&dots)[kRegisters], const TileAt& tile) {
    CARILLON_UNROLL
    for (int r = 0; r < kRegisters; ++r) {
      const int i = hopper::row_of(threads_.thread, r), j = hopper::column_of(threads_.thread, r);
      if (tile.matches(i, j) && tile.is_inside(i, j)) of_.positive[tile.row + i] = dots[r] * scale_;
    }
  }

  // Logits as exponents of two, -inf where they are left out.
  CARILLON_HOST_DEVICE void leave_out(float (&dots)[kRegisters], const TileAt& tile,
                                      float factor) {
    const int64_t ids[2] = {tile.row_id(hopper::row_of(threads_.thread, 0)),
                            tile.row_id(hopper::row_of(threads_.thread, 2))};
    CARILLON_UNROLL
    for (int r = 0; r < kRegisters; ++r) {
      const int i = hopper::row_of(threads_.thread, r), j = hopper::column_of(threads_.thread, r);
      dots[r] = tile.is_kept(i, j, ids[r / 2 % 2]) ? dots[r] * factor : kNothing;
    }
  }

  CARILLON_HOST_DEVICE void add_sums(const float (&dots)[kRegisters], const TileAt& tile,
                                     float factor) {
    float rows[2] = {0.0f, 0.0f};
    CARILLON_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk * kChunkColumns >= tile.num_columns) break;
      float columns[kChunkValues];
      CARILLON_UNROLL
      for (int v = 0; v < kChunkValues; ++v) {
        const float above = dots[chunk_register(chunk, v)];
        const float below = dots[chunk_register(chunk, v) + 2];
        const float first = above == kNothing ? 0.0f : above * factor;
        const float second = below == kNothing ? 0.0f : below * factor;
        rows[0] += first;
        rows[1] += second;
        columns[v] = first + second;
      }
      fold_chunk(threads_, columns, Add{});
      put_chunk(threads_, chunk, columns);
    }
    CARILLON_UNROLL
    for (int k = 0; k < 2; ++k) row_sums_[k] += over_quad(threads_, rows[k], Add{});
    threads_.wait();
    CARILLON_UNROLL
    for (int which = 0; which < 2; ++which) {
      const int j = threads_.thread * 2 + which;
      const float sum = gather(threads_, which, Add{});
      if (j >= tile.num_columns) continue;
      float* to = of_.column_sums + slot_ * of_.pairs.num_columns + tile.column + j;
      *to = is_first_ ? sum : *to + sum;
    }
    threads_.wait();
  }

  CARILLON_HOST_DEVICE void choose_shift(const float (&dots)[kRegisters], float factor) {
    const Foremost foremost{factor < 0.0f};
    float largest = dots[0];
    CARILLON_UNROLL
    for (int r = 1; r < kRegisters; ++r) largest = foremost(largest, dots[r]);
    largest = over_warp(threads_, largest, foremost) * factor;
    if (threads_.thread % 32 == 0) threads_.shared()[threads_.thread / 32] = largest;
    threads_.wait();
    for (int warp = 0; warp < kWarps; ++warp) largest = larger(largest, threads_.shared()[warp]);
    threads_.wait();
    shift_ = finite_shift(largest);  // what is not finite here makes sums that are not safe
    has_shift_ = true;
  }

  // False, with nothing added, where a sum is outside the safe range.
  CARILLON_HOST_DEVICE bool add_with_shared_shift(const float (&dots)[kRegisters],
                                                  const TileAt& tile, float factor) {
    float rows[2] = {0.0f, 0.0f};
    CARILLON_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk * kChunkColumns >= tile.num_columns) break;
      float columns[kChunkValues];
      CARILLON_UNROLL
      for (int v = 0; v < kChunkValues; ++v) {
        const int r = chunk_register(chunk, v);
        const float above = power_of_two(dots[r] * factor - shift_);
        const float below = power_of_two(dots[r + 2] * factor - shift_);
        rows[0] += above;
        rows[1] += below;
        columns[v] = above + below;
      }
      fold_chunk(threads_, columns, Add{});
      put_chunk(threads_, chunk, columns);
    }
    bool is_bad = false;
    CARILLON_UNROLL
    for (int k = 0; k < 2; ++k) {
      rows[k] = over_quad(threads_, rows[k], Add{});
      is_bad |= hopper::row_of(threads_.thread, 2 * k) < tile.num_rows && !is_safe(rows[k]);
    }
    threads_.wait();
    float columns[2];
    CARILLON_UNROLL
    for (int which = 0; which < 2; ++which) {
      columns[which] = gather(threads_, which, Add{});
      const bool is_used = tile.num_rows > 0 && threads_.thread * 2 + which < tile.num_columns;
      is_bad |= is_used && !is_safe(columns[which]);
    }
    if (threads_.any(is_bad)) return false;
    CARILLON_UNROLL
    for (int k = 0; k < 2; ++k) rows_[k] = merge(rows_[k], {shift_, rows[k]});
    CARILLON_UNROLL
    for (int which = 0; which < 2; ++which) add_column(tile, which, {shift_, columns[which]});
    return true;
  }

  // Multiplies by the factor late, so that no products stand in registers beside the dots.
  CARILLON_HOST_DEVICE void add_exactly(const float (&dots)[kRegisters], const TileAt& tile,
                                        float factor) {
    const Foremost foremost{factor < 0.0f};
    float rows[2] = {dots[0], dots[2]};
    CARILLON_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk * kChunkColumns >= tile.num_columns) break;
      float columns[kChunkValues];
      CARILLON_UNROLL
      for (int v = 0; v < kChunkValues; ++v) {
        const int r = chunk_register(chunk, v);
        rows[0] = foremost(rows[0], dots[r]);
        rows[1] = foremost(rows[1], dots[r + 2]);
        columns[v] = foremost(dots[r], dots[r + 2]);
      }
      fold_chunk(threads_, columns, foremost);
      put_chunk(threads_, chunk, columns);
    }
    threads_.wait();
    float shifts[2], columns[2];
    float* of_columns = threads_.shared() + kWarps * kTileColumns;
    CARILLON_UNROLL
    for (int k = 0; k < 2; ++k) {
      rows[k] = over_quad(threads_, rows[k], foremost) * factor;
      columns[k] = gather(threads_, k, foremost) * factor;
      of_columns[threads_.thread * 2 + k] = finite_shift(columns[k]);
      shifts[k] = finite_shift(rows[k]);
    }
    threads_.wait();
    float totals[2] = {0.0f, 0.0f};
    CARILLON_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk * kChunkColumns >= tile.num_columns) break;
      float values[kChunkValues];
      CARILLON_UNROLL
      for (int v = 0; v < kChunkValues; ++v) {
        const int r = chunk_register(chunk, v);
        const float above = dots[r] * factor, below = dots[r + 2] * factor;
        const float shift = of_columns[hopper::column_of(threads_.thread, r)];
        totals[0] += power_of_two(above - shifts[0]);
        totals[1] += power_of_two(below - shifts[1]);
        values[v] = power_of_two(above - shift) + power_of_two(below - shift);
      }
      fold_chunk(threads_, values, Add{});
      put_chunk(threads_, chunk, values);
    }
    threads_.wait();
    CARILLON_UNROLL
    for (int k = 0; k < 2; ++k) {
      rows_[k] = merge(rows_[k], {rows[k], over_quad(threads_, totals[k], Add{})});
      add_column(tile, k, {columns[k], gather(threads_, k, Add{})});
    }
    threads_.wait();
  }

  CARILLON_HOST_DEVICE void add_column(const TileAt& tile, int which, const Total& sum) {
    const int j = threads_.thread * 2 + which;
    if (j >= tile.num_columns) return;
    Total* to = of_.column_totals + slot_ * of_.pairs.num_columns + tile.column + j;
    *to = is_first_ ? sum : merge(*to, sum);
  }

  Threads& threads_;
  const Arguments& of_;
  float scale_;
  int64_t slot_;
  int unit_ = 0;
  bool is_first_ = false;
  bool has_shift_ = false;
  float shift_ = 0.0f;
  Total rows_[2];
  float row_sums_[2] = {0.0f, 0.0f};
};

}  // namespace carillon::contrastive
