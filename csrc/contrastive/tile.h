// What the contrastive ops' CPU loops are given: one tile of the logits, and where its sums go.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace carillon::contrastive {

// 96 x 192 float32 are 72 KiB: with a block of rows they stay in a second-level cache. Multiples of
// every instruction set's block (12 x 32, 6 x 16, 4 x 8).
constexpr int64_t kRowTile = 96;
constexpr int64_t kColumnTile = 192;
constexpr float kLeftOut = -std::numeric_limits<float>::infinity();
// Exponentials that flush to zero (below e^-87) are no loss beside a sum of this size.
constexpr float kSmallestSum = 1e-30f;
constexpr float kWidestShift = 60.0f;  // e^60 times any gradient stays far inside float32

struct Tile {
  const uint32_t* rows;     // kRowTile x depth words, row-major, readable to the end
  const uint32_t* columns;  // panels of kColumnTile columns
  int64_t depth;            // words: dims, or half of them for bfloat16
  int64_t num_rows;         // at most kRowTile
  int64_t num_columns;      // at most kColumnTile
  float scale;
  float bias;
  int64_t first_match;       // the first row's matching column, counted from the tile's first
  const int64_t* row_ids;    // of the tile's rows and columns; null where there are none
  const int64_t* column_ids;

  // The matching column of a row inside this tile, or -1.
  int64_t match(int64_t row) const {
    const int64_t column = first_match + row;
    return column >= 0 && column < num_columns ? column : -1;
  }
};

// exp(shift) * sum of each row or column so far.
struct Sums {
  float* shift;
  float* sum;
};

// Of a tile's rows and columns; the sums' gradients are null where no sums were asked for.
struct Gradients {
  const float* row_lse;
  const float* column_lse;
  const float* row_lse_grad;
  const float* column_lse_grad;  // kColumnTile values can be read, zeros past the last column
  const float* positive_grad;
  const float* row_sum_grad;
  const float* column_sum_grad;  // likewise
};

struct TileGradients {
  const uint32_t* rows;     // panels over dims, kRowTile deep
  const uint32_t* columns;  // panels over dims, kColumnTile deep
  float* rows_grad;         // kRowTile x padded_dims
  float* columns_grad;      // kColumnTile x padded_dims
  int64_t padded_dims;
  uint32_t* by_row;         // room for the weights in bfloat16, twice
  uint32_t* by_column;
};

struct Loops {
  int64_t panel;
  void (*pack_columns)(const uint32_t*, int64_t, int64_t, uint32_t*, int64_t);
  void (*pack_rows_float)(const float*, int64_t, int64_t, uint32_t*, int64_t, int64_t);
  void (*pack_rows_bfloat16)(const uint16_t*, int64_t, int64_t, uint32_t*, int64_t, int64_t);
  void (*fill_float)(const Tile&, float*);
  void (*fill_bfloat16)(const Tile&, float*);
  void (*reduce_tile)(const Tile&, const float*, const Sums&, const Sums&);
  void (*add_plain_sums)(const Tile&, const float*, float*, float*);
  float (*sigmoid_row)(const Tile&, float*, int64_t);
  float (*softmax_weights)(const Tile&, float*, const Gradients&);
  float (*sigmoid_weights)(const Tile&, float*, const float*, double&);
  void (*add_gradients)(const TileGradients&, const float*, bool);
};

// The widest that this processor has; `name` (as the namespaces of cpu_targets.h) asks for one.
const Loops& loops();

}  // namespace carillon::contrastive
