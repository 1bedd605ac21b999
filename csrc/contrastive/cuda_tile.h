// The problem, and one warpgroup's tile of its logits: edges, matches, and what is left out.
#pragma once

#include "cuda_arithmetic.h"
#include "cuda_schedule.h"

namespace carillon::contrastive {

constexpr int kNoMatch = -(1 << 20);  // far from every column of a tile

struct PairArguments {
  int64_t num_rows;
  int64_t num_columns;
  int64_t first_column;  // from -num_rows to num_columns, which both match nothing
  const float* scale;
  const float* bias;          // null in the softmax form
  const int64_t* row_ids;     // both or neither
  const int64_t* column_ids;
};

struct TileAt {
  int64_t row;  // the tile's first
  int64_t column;
  int num_rows;  // inside the edges: at most 64 and 256, and none or fewer past them
  int num_columns;
  int match;  // row i of the tile matches its column match + i; kNoMatch where none does
  const int64_t* row_ids;
  const int64_t* column_ids;

  CARILLON_HOST_DEVICE TileAt(const PairArguments& of, int64_t first_row, int64_t first_column)
      : row(first_row),
        column(first_column),
        num_rows(inside(of.num_rows - first_row, hopper::kGroupRows)),
        num_columns(inside(of.num_columns - first_column, kTileColumns)),
        row_ids(of.row_ids == nullptr ? nullptr : of.row_ids + first_row),
        column_ids(of.column_ids == nullptr ? nullptr : of.column_ids + first_column) {
    const int64_t offset = of.first_column + first_row - first_column;
    const bool crosses = offset > -hopper::kGroupRows && offset < kTileColumns;
    match = crosses ? static_cast<int>(offset) : kNoMatch;
  }

  CARILLON_HOST_DEVICE bool is_whole() const {
    return num_rows == hopper::kGroupRows && num_columns == kTileColumns && row_ids == nullptr;
  }

  CARILLON_HOST_DEVICE bool matches(int i, int j) const { return j == match + i; }
  CARILLON_HOST_DEVICE bool is_inside(int i, int j) const {
    return i < num_rows && j < num_columns;
  }

  // Of a row; one that stands for no id where there are none.
  CARILLON_HOST_DEVICE int64_t row_id(int i) const {
    return row_ids != nullptr && i < num_rows ? row_ids[i] : -1;
  }

  CARILLON_HOST_DEVICE bool is_kept(int i, int j, int64_t row_id) const {
    return is_inside(i, j) && (row_id < 0 || column_ids[j] != row_id || matches(i, j));
  }

 private:
  CARILLON_HOST_DEVICE static int inside(int64_t left, int size) {
    return left < size ? static_cast<int>(left < 0 ? 0 : left) : size;
  }
};

}  // namespace carillon::contrastive
