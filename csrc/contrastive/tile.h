// What the contrastive ops' CPU loops are given: one tile of the logits, and where its sums go.
#pragma once

#include <cstdint>
#include <limits>

namespace carillon::contrastive {

// 96 x 192 float32 are 72 KiB: with a block of rows they stay in a second-level cache. Multiples of
// the widest vector, so that only the last tile of a side is smaller.
constexpr int64_t kRowTile = 96;
constexpr int64_t kColumnTile = 192;
constexpr float kLeftOut = -std::numeric_limits<float>::infinity();
// Exponentials that flush to zero (below e^-87) are no loss beside a sum of this size.
constexpr float kSmallestSum = 1e-30f;
constexpr float kWidestShift = 60.0f;  // e^60 times any gradient stays far inside float32

// Features of one side, row-major: float, or the bits of bfloat16 (then an even number a row).
struct Features {
  const void* data;
  int64_t dims;
};

struct Tile {
  const float* rows;     // packed, num_rows of them
  const float* columns;  // packed, kColumnTile of them, zeros past num_columns
  int64_t dims;
  int64_t num_rows;     // at most kRowTile
  int64_t num_columns;  // at most kColumnTile
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

// Both sides packed as steps of a product, and what their gradients are added to.
struct TileGradients {
  const float* rows;     // kRowTile steps
  const float* columns;  // kColumnTile steps
  float* rows_grad;      // num_rows x width
  float* columns_grad;   // num_columns x width
  int64_t width;         // dims, rounded up to a vector
  float* by_row;         // room for the weights in bfloat16, twice
  float* by_column;
};

// What depends on the features' type.
struct Products {
  int64_t (*units)(int64_t values);  // floats that so many values take when packed
  void (*pack_rows)(const Features&, int64_t first, int64_t count, float* to);
  void (*pack_columns)(const Features&, int64_t first, int64_t count, float* to);
  void (*pack_steps)(const Features&, int64_t first, int64_t count, int64_t width, float* to);
  void (*fill_tile)(const Tile&, float* logits);
  void (*add_gradients)(const Tile&, const TileGradients&, const float* weights);
};

struct Loops {
  int64_t width;  // floats of a vector
  Products of_float;
  Products of_bfloat16;
  void (*reduce_tile)(const Tile&, const float*, const Sums&, const Sums&);
  void (*add_plain_sums)(const Tile&, const float*, float*, float*);
  float (*sigmoid_row)(const Tile&, float*, int64_t);
  float (*softmax_weights)(const Tile&, float*, const Gradients&);
  float (*sigmoid_weights)(const Tile&, float*, const float*, double&);
};

}  // namespace carillon::contrastive
