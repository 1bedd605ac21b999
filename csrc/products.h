// Small matrix products on packed operands. Included once per instruction set (vectors.h).
//
// An operand counts in units of 4 bytes: one float32, or with kPairs two bfloat16 that follow each
// other in the dimension that is summed over. Sums are float32 either way, so one loop serves both.

template <bool kPairs>
CARILLON_INLINE Floats multiply_add(Floats a, Floats b, Floats sum) {
#if CARILLON_PAIRS
  if constexpr (kPairs) return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  return a * b + sum;
}

// c[kRows, kVectors * kWidth] (+)= a * b with all of c in registers. a[row, step] lies at
// row * a_row + step * a_step, so that it is read transposed as easily.
template <bool kPairs, int kRows, int kVectors>
CARILLON_NOINLINE void tile(const float* a, int64_t a_row, int64_t a_step, const float* b,
                            int64_t b_step, int64_t depth, float* c, int64_t c_row,
                            bool accumulate) {
  Floats sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = accumulate ? load(c + r * c_row + v * kWidth) : Floats{};
    }
  }
  for (int64_t step = 0; step < depth; ++step) {
    Floats right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats left = broadcast(a + r * a_row);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = multiply_add<kPairs>(left, right[v], sums[r][v]);
      }
    }
    a += a_step;
    b += b_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + r * c_row + v * kWidth, sums[r][v]);
  }
}

typedef void (*BlockProduct)(const float*, int64_t, int64_t, const float*, int64_t, int64_t, float*,
                     int64_t, bool);

template <bool kPairs, int kVectors>
CARILLON_INLINE BlockProduct tile_of_rows(int64_t rows) {
  constexpr BlockProduct tiles[kTileRows] = {
      tile<kPairs, 1, kVectors>, tile<kPairs, 2, kVectors>, tile<kPairs, 3, kVectors>,
      tile<kPairs, 4, kVectors>, tile<kPairs, 5, kVectors>, tile<kPairs, 6, kVectors>};
  return tiles[rows - 1];
}

template <bool kPairs>
CARILLON_INLINE BlockProduct tile_of(int64_t rows, int64_t vectors) {
  if constexpr (kTileVectors == 4) {
    if (vectors == 4) return tile_of_rows<kPairs, 4>(rows);
    if (vectors == 3) return tile_of_rows<kPairs, 3>(rows);
  }
  return vectors == 2 ? tile_of_rows<kPairs, 2>(rows) : tile_of_rows<kPairs, 1>(rows);
}

// The left operand: unit (row, step) at row * row_stride + step * step_stride.
struct Left {
  const float* data;
  int64_t row_stride;
  int64_t step_stride;
};

// The right operand, depth x columns units in panels of kPanel columns (the last may be narrower),
// each panel depth-major: panel p begins at p * kPanel * depth. columns is a multiple of kWidth.
struct Right {
  float* data;
  int64_t depth;
  int64_t columns;

  int64_t panel_width(int64_t column) const {
    return std::min<int64_t>(kPanel, columns - column / kPanel * kPanel);
  }
  // Where unit (step, column) lies.
  float* at(int64_t step, int64_t column) const {
    const int64_t first = column / kPanel * kPanel;
    return data + first * depth + step * panel_width(column) + (column - first);
  }
};

// c[rows, columns] (+)= a * b over the first `depth` steps and `columns` columns of b.
template <bool kPairs>
inline void multiply(const Left& a, const Right& b, int64_t rows, int64_t depth, int64_t columns,
                     float* c, int64_t c_row, bool accumulate) {
  for (int64_t column = 0; column < columns; column += kPanel) {
    const int64_t vectors = (std::min(columns - column, kPanel) + kWidth - 1) / kWidth;
    for (int64_t row = 0; row < rows; row += kTileRows) {
      tile_of<kPairs>(std::min(rows - row, kTileRows), vectors)(
          a.data + row * a.row_stride, a.row_stride, a.step_stride, b.at(0, column),
          b.panel_width(column), depth, c + row * c_row + column, c_row, accumulate);
    }
  }
}
