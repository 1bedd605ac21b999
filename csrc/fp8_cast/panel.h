// One panel of the matrix: finds the scales of its groups, writes its codes and their transpose.
//
// Codes of the column copy go through a tile that is transposed in registers and written in runs of
// a panel's height, because single bytes a matrix row apart would each touch another cache line.
#pragma once

#include "byte_transpose.h"
#include "check.h"
#include "loops.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace carillon::fp8_cast {

// 256 x 256 bfloat16 and the tile of codes are 208 KiB: a fifth of a 1 MiB second-level cache.
inline constexpr int64_t kPanelRows = 256;
inline constexpr int64_t kPanelColumns = 256;
// A cache line more than a row, so that the rows of a column fall into different sets.
inline constexpr int64_t kTileStride = kPanelColumns + 64;
inline constexpr int64_t kStrip = 16;
static_assert(kPanelRows % kBlock == 0 && kPanelColumns % kBlock == 0);

struct Matrix {
  int64_t num_rows;
  int64_t num_columns;
};

struct ScaleView {
  float* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
  float& at(int64_t row, int64_t column) const {
    return data[row * row_stride + column * column_stride];
  }
};

struct Copies {
  uint8_t* row = nullptr;
  uint8_t* column = nullptr;
  bool with_column = false;
  ScaleView row_scale;
  ScaleView column_scale;
};

struct Rule {
  float fp8_max;
  bool power_of_two;
  float scale(float amax) const { return scale_from_amax(amax, fp8_max, power_of_two); }
};

// Inverse scales that are known before the panels are cast.
struct Known {
  float inverse = 1.0f;                   // tensorwise
  const float* row_inverse = nullptr;     // rowwise, of all rows
  const float* column_inverse = nullptr;  // rowwise, of all columns
};

template <typename Format, typename Bits>
class Panel {
 public:
  Panel(const Bits* x, const Matrix& matrix, Granularity granularity, const Rule& rule,
        const Known& known, const Copies& copies)
      : x_(x), matrix_(matrix), granularity_(granularity), rule_(rule), known_(known),
        copies_(copies), tile_(copies.with_column ? kPanelRows * kTileStride : 0) {}

  // The largest magnitude of the panel whose first value is at (row, column).
  Bits amax(int64_t row, int64_t column) const {
    const int64_t width = std::min(kPanelColumns, matrix_.num_columns - column);
    Bits any[kPanelColumns] = {};
    for (int64_t r = row; r < std::min(row + kPanelRows, matrix_.num_rows); ++r) {
      raise_any(at(r, column), width, any);
    }
    return *std::max_element(any, any + width);
  }

  void cast(int64_t row, int64_t column) {
    const int64_t height = std::min(kPanelRows, matrix_.num_rows - row);
    const int64_t width = std::min(kPanelColumns, matrix_.num_columns - column);
    for (int64_t r = 0; r < height; r += kBlock) {
      const int64_t rows = std::min(kBlock, height - r);
      for (int64_t c = 0; c < width; c += kBlock) {
        cast_block(row + r, column + c, rows, std::min(kBlock, width - c),
                   tile_.data() + r * kTileStride + c);
      }
    }
    if (copies_.with_column) write_column_copy(row, column, height, width);
  }

 private:
  const Bits* at(int64_t row, int64_t column) const {
    return x_ + row * matrix_.num_columns + column;
  }

  // Codes of at most 128 x 128 values into the row copy, and those of the column copy into `tile`.
  void cast_block(int64_t row, int64_t column, int64_t rows, int64_t columns, uint8_t* tile) {
    find_scales(row, column, rows, columns);
    const bool same = granularity_ == Granularity::kTensorwise ||
                      granularity_ == Granularity::k128x128;
    for (int64_t r = 0; r < rows; ++r) {
      const Bits* values = at(row + r, column);
      uint8_t* codes = copies_.row + (row + r) * matrix_.num_columns + column;
      encode_by_one(Format{}, values, columns, row_inverse_[r], codes);
      if (!copies_.with_column) continue;
      if (same) {
        // Encoding again is faster than a copy, which would wait for the stores of `codes`.
        encode_by_one(Format{}, values, columns, row_inverse_[r], tile + r * kTileStride);
      } else {
        encode_by_each(Format{}, values, columns, column_inverse_, tile + r * kTileStride);
      }
    }
  }

  // Fills row_inverse_ and column_inverse_, and writes the scales that are of this block.
  void find_scales(int64_t row, int64_t column, int64_t rows, int64_t columns) {
    if (granularity_ == Granularity::kTensorwise) {
      std::fill_n(row_inverse_, rows, known_.inverse);
    } else if (granularity_ == Granularity::kRowwise) {
      std::copy_n(known_.row_inverse + row, rows, row_inverse_);
      if (copies_.with_column) {
        std::copy_n(known_.column_inverse + column, columns, column_inverse_);
      }
    } else if (granularity_ == Granularity::k1x128) {
      find_scales_1x128(row, column, rows, columns);
    } else {
      Bits amax[kBlock] = {};
      for (int64_t r = 0; r < rows; ++r) raise(at(row + r, column), columns, amax);
      const float scale = rule_.scale(to_float(largest_finite(amax, columns)));
      copies_.row_scale.at(row / kBlock, column / kBlock) = scale;
      if (copies_.with_column) copies_.column_scale.at(column / kBlock, row / kBlock) = scale;
      std::fill_n(row_inverse_, rows, 1.0f / scale);
    }
  }

  void find_scales_1x128(int64_t row, int64_t column, int64_t rows, int64_t columns) {
    Bits column_amax[kBlock] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const Bits* values = at(row + r, column);
      const float scale = rule_.scale(to_float(largest_finite(values, columns)));
      copies_.row_scale.at(row + r, column / kBlock) = scale;
      row_inverse_[r] = 1.0f / scale;
      if (copies_.with_column) raise(values, columns, column_amax);
    }
    if (!copies_.with_column) return;
    for (int64_t c = 0; c < columns; ++c) {
      const float scale = rule_.scale(to_float(column_amax[c]));
      copies_.column_scale.at(column + c, row / kBlock) = scale;
      column_inverse_[c] = 1.0f / scale;
    }
  }

  void write_column_copy(int64_t row, int64_t column, int64_t height, int64_t width) {
    alignas(64) uint8_t strip[kStrip * kPanelRows];
    for (int64_t c = 0; c < width; c += kStrip) {
      for (int64_t r = 0; r < height; r += kStrip) {
        transpose_16x16(tile_.data() + r * kTileStride + c, kTileStride, strip + r, kPanelRows);
      }
      for (int64_t i = 0; i < std::min(kStrip, width - c); ++i) {
        std::memcpy(copies_.column + (column + c + i) * matrix_.num_rows + row,
                    strip + i * kPanelRows, height);
      }
    }
  }

  const Bits* x_;
  Matrix matrix_;
  Granularity granularity_;
  Rule rule_;
  Known known_;
  Copies copies_;
  std::vector<uint8_t> tile_;
  float row_inverse_[kBlock];
  float column_inverse_[kBlock];
};

}  // namespace carillon::fp8_cast
