// The contrastive ops' loops, compiled once per instruction set (cpu_targets.h).
//
// A tile is kRowTile rows x kColumnTile columns of logits, computed by one product into a buffer
// that stays in cache, reduced or turned into weights there, and never kept. Its exponentials share
// one shift, the tile's largest logit, so that a row's and a column's sums need one exponential of
// a pair between them. Where that shift is so far above a row's or a column's own logits that their
// sums lose precision, the tile is done again with a shift of their own.


template <typename Element>
Head<Element> rows_of(const Features& features, int64_t first) {
  return {static_cast<const Element*>(features.data) + first * features.dims, features.dims, 0};
}

// Rows as the left operand of the logits' product.
template <typename Element, bool kPairs>
void pack_tile_rows(const Features& from, int64_t first, int64_t count, float* to) {
  pack_rows<Element, kPairs>(rows_of<Element>(from, first), count, units_of<kPairs>(from.dims), to);
}

// A tile's columns as its right operand; zeros past `count`.
template <typename Element, bool kPairs>
void pack_tile_columns(const Features& from, int64_t first, int64_t count, float* to) {
  const int64_t units = units_of<kPairs>(from.dims);
  pack_transposed<Element, kPairs>(rows_of<Element>(from, first), count, units,
                                   {to, units, kColumnTile});
}

// Either side as the right operand of the product that gives the other side's gradient.
template <typename Element, bool kPairs>
void pack_tile_steps(const Features& from, int64_t first, int64_t count, int64_t width, float* to) {
  pack_steps<Element, kPairs>(rows_of<Element>(from, first), count, from.dims,
                              {to, units_of<kPairs>(count), width});
}

// Logits of a tile: the product, then the scale and bias, then what is left out.
template <bool kPairs>
void fill_tile(const Tile& tile, float* logits) {
  const int64_t units = units_of<kPairs>(tile.dims);
  multiply<kPairs>({tile.rows, units, 1}, {const_cast<float*>(tile.columns), units, kColumnTile},
                   tile.num_rows, units, kColumnTile, logits, kColumnTile, false);
  for (int64_t i = 0; i < tile.num_rows; ++i) {
    float* line = logits + i * kColumnTile;
    for (int64_t j = 0; j < kColumnTile; j += kWidth) {
      store(line + j, load(line + j) * broadcast(tile.scale) + broadcast(tile.bias));
    }
    for (int64_t j = tile.num_columns; j < kColumnTile; ++j) line[j] = kLeftOut;
  }
  if (tile.row_ids == nullptr) return;
  for (int64_t i = 0; i < tile.num_rows; ++i) {
    const int64_t id = tile.row_ids[i];
    if (id < 0) continue;
    float* line = logits + i * kColumnTile;
    const int64_t match = tile.match(i);
    const float kept = match >= 0 ? line[match] : 0.0f;
    for (int64_t j = 0; j < tile.num_columns; ++j) {
      line[j] = tile.column_ids[j] == id ? kLeftOut : line[j];
    }
    if (match >= 0) line[match] = kept;
  }
}

// NaN where there is one, so that it reaches the sums.
float largest_logit(const float* logits, int64_t num_rows) {
  Floats top = broadcast(kLeftOut), odd = {};
  for (int64_t at = 0; at < num_rows * kColumnTile; at += kWidth) {
    const Floats logit = load(logits + at);
    top = larger(logit, top);
    odd += choose(logit * 0.0f == 0.0f, Floats{}, logit);  // -inf and NaN alone
  }
  const float nan = sum(odd);
  return nan != nan ? nan : largest(top);
}

// Adds sums of exponentials with one shift to what was summed with another.
CARILLON_INLINE void merge(float shift, float sum, float& old_shift, float& old_sum) {
  if (shift > old_shift) {
    old_sum = old_sum * std::exp(old_shift - shift) + sum;
    old_shift = shift;
  } else {
    old_sum += sum * std::exp(shift - old_shift);
  }
}

// One row's or column's own largest logit and sum; `step` floats apart, `count` of them.
void merge_exactly(const float* logits, int64_t step, int64_t count, float& shift, float& sum) {
  float largest = kLeftOut;
  for (int64_t k = 0; k < count; ++k) {
    const float logit = logits[k * step];
    if (logit > largest || logit != logit) largest = logit;
  }
  if (largest == kLeftOut) return;
  float total = 0.0f;
  for (int64_t k = 0; k < count; ++k) total += std::exp(logits[k * step] - largest);
  merge(largest, total, shift, sum);
}

// A tile's share of the log-sum-exps of its rows and columns, as shifts and sums.
void reduce_tile(const Tile& tile, const float* logits, const Sums& rows, const Sums& columns) {
  const float shift = largest_logit(logits, tile.num_rows);
  if (shift == kLeftOut) return;
  alignas(64) float row_sums[kRowTile];
  alignas(64) float column_sums[kColumnTile] = {};
  for (int64_t i = 0; i < tile.num_rows; ++i) {
    const float* line = logits + i * kColumnTile;
    Floats total = {};
    for (int64_t j = 0; j < kColumnTile; j += kWidth) {
      const Floats value = exponential(load(line + j) - shift);
      total += value;
      store(column_sums + j, load(column_sums + j) + value);
    }
    row_sums[i] = sum(total);
  }
  for (int64_t i = 0; i < tile.num_rows; ++i) {
    if (row_sums[i] >= kSmallestSum) {
      merge(shift, row_sums[i], rows.shift[i], rows.sum[i]);
    } else {
      merge_exactly(logits + i * kColumnTile, 1, tile.num_columns, rows.shift[i], rows.sum[i]);
    }
  }
  for (int64_t j = 0; j < tile.num_columns; ++j) {
    if (column_sums[j] >= kSmallestSum) {
      merge(shift, column_sums[j], columns.shift[j], columns.sum[j]);
    } else {
      merge_exactly(logits + j, kColumnTile, tile.num_rows, columns.shift[j], columns.sum[j]);
    }
  }
}

// Sums of the logits that are not left out.
void add_plain_sums(const Tile& tile, const float* logits, float* rows, float* columns) {
  for (int64_t i = 0; i < tile.num_rows; ++i) {
    for (int64_t j = 0; j < tile.num_columns; ++j) {
      const float logit = logits[i * kColumnTile + j];
      if (logit == kLeftOut) continue;
      rows[i] += logit;
      columns[j] += logit;
    }
  }
}

// Sum over columns of softplus(-z l), for one row of a tile: z is -1 but for its match.
// log(1 + u) = 2 atanh(u / (2 + u)), whose series converges fast for u = exp(-|l|) <= 1.
float sigmoid_row(const Tile& tile, float* line, int64_t i) {
  const int64_t match = tile.match(i);
  if (match >= 0) line[match] = -line[match];
  Floats total = {};
  for (int64_t j = 0; j < kColumnTile; j += kWidth) {
    const Floats logit = load(line + j);
    const Floats u = exponential(-larger(logit, -logit));
    const Floats y = u / (u + 2.0f);
    const Floats square = y * y;
    Floats series = broadcast(1.0f / 13);
    series = series * square + 1.0f / 11;
    series = series * square + 1.0f / 9;
    series = series * square + 1.0f / 7;
    series = series * square + 1.0f / 5;
    series = series * square + 1.0f / 3;
    series = series * square + 1.0f;
    total += larger(logit, Floats{}) + 2.0f * y * series;
  }
  return sum(total);
}

// Rows past the last have no weight; their logits were left out.
void clear_edge(const Tile& tile, float* weights) {
  std::fill(weights + tile.num_rows * kColumnTile, weights + kRowTile * kColumnTile, 0.0f);
}

// Turns logits into the loss's derivative by each, softmax form; returns the sum of that times l.
float softmax_weights(const Tile& tile, float* logits, const Gradients& by) {
  const float shift = largest_logit(logits, tile.num_rows);
  bool shared = shift != kLeftOut;
  alignas(64) float row_factor[kRowTile] = {};
  alignas(64) float column_factor[kColumnTile] = {};
  for (int64_t i = 0; i < tile.num_rows && shared; ++i) {
    if (by.row_lse[i] == kLeftOut) continue;  // so are all its logits: the two must not meet
    shared = std::abs(shift - by.row_lse[i]) <= kWidestShift;
    row_factor[i] = by.row_lse_grad[i] * std::exp(shift - by.row_lse[i]);
  }
  for (int64_t j = 0; j < tile.num_columns && shared; ++j) {
    if (by.column_lse[j] == kLeftOut) continue;
    shared = std::abs(shift - by.column_lse[j]) <= kWidestShift;
    column_factor[j] = by.column_lse_grad[j] * std::exp(shift - by.column_lse[j]);
  }
  alignas(64) float column_lse[kColumnTile];
  alignas(64) float column_grad[kColumnTile] = {};
  if (!shared) {
    for (int64_t j = 0; j < kColumnTile; ++j) {
      const bool used = j < tile.num_columns && by.column_lse[j] != kLeftOut;
      column_lse[j] = used ? by.column_lse[j] : 0.0f;
      column_grad[j] = used ? by.column_lse_grad[j] : 0.0f;
    }
  }
  clear_edge(tile, logits);
  double weighted = 0.0;
  for (int64_t i = 0; i < tile.num_rows; ++i) {
    float* line = logits + i * kColumnTile;
    const int64_t match = tile.match(i);
    const float match_logit = match >= 0 ? line[match] : 0.0f;
    const bool used = by.row_lse[i] != kLeftOut;
    const float row_lse = used ? by.row_lse[i] : 0.0f;
    const float row_grad = used ? by.row_lse_grad[i] : 0.0f;
    Floats total = {};
    for (int64_t j = 0; j < kColumnTile; j += kWidth) {
      const Floats logit = load(line + j);
      Floats weight;
      if (shared) {
        weight = exponential(logit - shift) * (row_factor[i] + load(column_factor + j));
      } else {
        // What is not used may have any logit: its exponent is cut, its gradient is zero.
        const Floats limit = broadcast(80.0f);
        const Floats by_row = logit - row_lse;
        const Floats by_column = logit - load(column_lse + j);
        weight = exponential(by_row > limit ? limit : by_row) * row_grad +
                 exponential(by_column > limit ? limit : by_column) * load(column_grad + j);
      }
      if (by.row_sum_grad != nullptr) {
        const Floats plain = broadcast(by.row_sum_grad[i]) + load(by.column_sum_grad + j);
        weight = logit == kLeftOut ? Floats{} : weight + plain;
      }
      // What is left out has the logit -inf and the weight 0, whose product is not wanted.
      total += logit == kLeftOut ? Floats{} : weight * logit;
      store(line + j, weight);
    }
    weighted += static_cast<double>(sum(total));
    if (match >= 0) {
      line[match] += by.positive_grad[i];
      weighted += static_cast<double>(by.positive_grad[i]) * match_logit;
    }
  }
  return static_cast<float>(weighted);
}

// The same for the sigmoid form; adds the sum of the weights, the derivative by the bias.
float sigmoid_weights(const Tile& tile, float* logits, const float* row_loss_grad, double& bias) {
  clear_edge(tile, logits);
  double weighted = 0.0;
  for (int64_t i = 0; i < tile.num_rows; ++i) {
    float* line = logits + i * kColumnTile;
    const int64_t match = tile.match(i);
    const float match_logit = match >= 0 ? line[match] : 0.0f;
    if (match >= 0) line[match] = kLeftOut;  // its sign differs: it is done on its own, below
    const Floats grad = broadcast(row_loss_grad[i]);
    Floats total = {}, total_weight = {};
    for (int64_t j = 0; j < kColumnTile; j += kWidth) {
      const Floats logit = load(line + j);
      const Floats limit = broadcast(87.0f);
      const Floats weight = grad / (1.0f + exponential(-logit > limit ? limit : -logit));
      const Floats kept = logit == kLeftOut ? Floats{} : weight;
      total_weight += kept;
      total += logit == kLeftOut ? Floats{} : kept * (logit - tile.bias);
      store(line + j, kept);
    }
    weighted += static_cast<double>(sum(total));
    bias += static_cast<double>(sum(total_weight));
    if (match >= 0) {
      line[match] = -row_loss_grad[i] / (1.0f + std::exp(match_logit));
      bias += line[match];
      weighted += static_cast<double>(line[match]) * (match_logit - tile.bias);
    }
  }
  return static_cast<float>(weighted);
}

// Weights as the left factors of the two products that give the gradients, in bfloat16: by rows,
// and by columns with neighbouring rows in one unit. Rows past the last must be zeros.
void split_weights(const float* weights, int64_t num_rows, float* by_row, float* by_column) {
  auto* halves = reinterpret_cast<uint16_t*>(by_row);
  for (int64_t i = 0; i < num_rows; i += 2) {
    for (int64_t j = 0; j < kColumnTile; j += kWidth) {
      const Halves even = to_halves(load(weights + i * kColumnTile + j));
      const Halves odd = to_halves(load(weights + (i + 1) * kColumnTile + j));
      store(halves + i * kColumnTile + j, even);
      store(halves + (i + 1) * kColumnTile + j, odd);
      store(by_column + (i / 2) * kColumnTile + j, pair(even, odd));
    }
  }
}

// Adds a tile's share to the gradients: of its rows, weights x columns; of its columns, the
// transposed weights x rows.
template <bool kPairs>
void add_gradients(const Tile& tile, const TileGradients& to, const float* weights) {
  const int64_t row_units = units_of<kPairs>(tile.num_rows);
  const int64_t column_units = units_of<kPairs>(tile.num_columns);
  Left by_row{weights, kColumnTile, 1}, by_column{weights, 1, kColumnTile};
  if constexpr (kPairs) {
    split_weights(weights, tile.num_rows, to.by_row, to.by_column);
    by_row = {to.by_row, kColumnTile / 2, 1};
    by_column = {to.by_column, 1, kColumnTile};
  }
  multiply<kPairs>(by_row, {const_cast<float*>(to.columns), column_units, to.width}, tile.num_rows,
                   column_units, to.width, to.rows_grad, to.width, true);
  multiply<kPairs>(by_column, {const_cast<float*>(to.rows), row_units, to.width}, tile.num_columns,
                   row_units, to.width, to.columns_grad, to.width, true);
}

template <typename Element, bool kPairs>
constexpr Products kProducts = {
    &units_of<kPairs>,
    &pack_tile_rows<Element, kPairs>,
    &pack_tile_columns<Element, kPairs>,
    &pack_tile_steps<Element, kPairs>,
    &fill_tile<kPairs>,
    &add_gradients<kPairs>,
};

constexpr Loops kTable = {
    kWidth,       kProducts<float, false>, kProducts<uint16_t, CARILLON_PAIRS>,
    &reduce_tile, &add_plain_sums,         &sigmoid_row,
    &softmax_weights, &sigmoid_weights,
};
