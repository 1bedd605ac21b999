// The contrastive ops' loops, compiled once per instruction set (csrc/cpu_targets.h).
//
// A tile is kRowTile rows x kColumnTile columns of logits, computed by one product into a buffer
// that stays in cache, reduced or turned into weights there, and never kept. Its exponentials share
// one shift, the tile's largest logit, so that a row's and a column's sums need one exponential of
// a pair between them. Where that shift is so far above a row's or a column's own logits that their
// sums lose precision, the tile is done again with a shift of their own.

// Row-major words (count x depth) into panels for a product over the depth; zeros past `count`, up
// to `padded_count`, a multiple of kPanel.
void pack_columns(const uint32_t* from, int64_t count, int64_t depth, uint32_t* to,
                  int64_t padded_count) {
  constexpr int64_t kLine = 16;  // words of a cache line, read at once
  for (int64_t first = 0; first < padded_count; first += kPanel) {
    uint32_t* panel = to + first * depth;
    for (int64_t from_k = 0; from_k < depth; from_k += kLine) {
      const int64_t end_k = std::min(depth, from_k + kLine);
      for (int64_t j = 0; j < kPanel; ++j) {
        for (int64_t k = from_k; k < end_k; ++k) {
          panel[k * kPanel + j] = first + j < count ? from[(first + j) * depth + k] : 0;
        }
      }
    }
  }
}

// Row-major features (count x dims) into panels for a product over the rows; zeros past the edges.
void pack_rows(const float* from, int64_t count, int64_t dims, uint32_t* to, int64_t padded_count,
               int64_t padded_dims) {
  for (int64_t first = 0; first < padded_dims; first += kPanel) {
    auto* panel = reinterpret_cast<float*>(to + first * padded_count);
    for (int64_t k = 0; k < padded_count; ++k) {
      for (int64_t j = 0; j < kPanel; ++j) {
        const bool present = k < count && first + j < dims;
        panel[k * kPanel + j] = present ? from[k * dims + first + j] : 0.0f;
      }
    }
  }
}

// The same for bfloat16: a word holds the values of two neighbouring rows.
void pack_rows(const uint16_t* from, int64_t count, int64_t dims, uint32_t* to,
               int64_t padded_count, int64_t padded_dims) {
  for (int64_t first = 0; first < padded_dims; first += kPanel) {
    uint32_t* panel = to + first * (padded_count / 2);
    for (int64_t k = 0; k < padded_count; k += 2) {
      for (int64_t j = 0; j < kPanel; ++j) {
        const bool in_dims = first + j < dims;
        const uint32_t even = in_dims && k < count ? from[k * dims + first + j] : 0;
        const uint32_t odd = in_dims && k + 1 < count ? from[(k + 1) * dims + first + j] : 0;
        panel[(k / 2) * kPanel + j] = even | (odd << 16);
      }
    }
  }
}

// Logits of a tile from the features: the product, then the scale and shift, then what is left out.
template <typename Products>
void fill_tile(const Tile& tile, float* logits) {
  product<Products, false>(tile.rows, tile.depth, 1, tile.columns, tile.depth, logits, kColumnTile,
                           kRowTile, kColumnTile);
  for (int64_t i = 0; i < tile.num_rows; ++i) {
    float* line = logits + i * kColumnTile;
    for (int64_t j = 0; j < kColumnTile; j += CARILLON_VECTOR) {
      store(line + j, load(line + j) * splat(tile.scale) + splat(tile.bias));
    }
    for (int64_t j = tile.num_columns; j < kColumnTile; ++j) line[j] = kLeftOut;
  }
  for (int64_t i = tile.num_rows; i < kRowTile; ++i) {
    for (int64_t j = 0; j < kColumnTile; ++j) logits[i * kColumnTile + j] = kLeftOut;
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
float largest_logit(const float* logits) {
  Floats largest = splat(kLeftOut), sum = {};
  for (int64_t at = 0; at < kRowTile * kColumnTile; at += CARILLON_VECTOR) {
    const Floats logit = load(logits + at);
    largest = larger(logit, largest);
    sum += logit * splat(0.0f) == splat(0.0f) ? splat(0.0f) : logit;  // -inf and NaN alone
  }
  const float odd = sum_of(sum);
  return odd != odd ? odd : largest_of(largest);
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
  const float shift = largest_logit(logits);
  if (shift == kLeftOut) return;
  alignas(64) float row_sums[kRowTile];
  alignas(64) float column_sums[kColumnTile] = {};
  for (int64_t i = 0; i < tile.num_rows; ++i) {
    const float* line = logits + i * kColumnTile;
    Floats sum = {};
    for (int64_t j = 0; j < kColumnTile; j += CARILLON_VECTOR) {
      const Floats value = exp_of(load(line + j) - splat(shift));
      sum += value;
      store(column_sums + j, load(column_sums + j) + value);
    }
    row_sums[i] = sum_of(sum);
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
  Floats sum = {};
  for (int64_t j = 0; j < kColumnTile; j += CARILLON_VECTOR) {
    const Floats logit = load(line + j);
    const Floats u = exp_of(-larger(logit, -logit));
    const Floats y = u / (u + splat(2.0f));
    const Floats square = y * y;
    Floats series = splat(1.0f / 13);
    series = series * square + splat(1.0f / 11);
    series = series * square + splat(1.0f / 9);
    series = series * square + splat(1.0f / 7);
    series = series * square + splat(1.0f / 5);
    series = series * square + splat(1.0f / 3);
    series = series * square + splat(1.0f);
    sum += larger(logit, splat(0.0f)) + splat(2.0f) * y * series;
  }
  return sum_of(sum);
}

// Rows past the last have no weight; their logits were left out.
void clear_edge(const Tile& tile, float* weights) {
  std::fill(weights + tile.num_rows * kColumnTile, weights + kRowTile * kColumnTile, 0.0f);
}

// Turns logits into the loss's derivative by each, softmax form; returns the sum of that times l.
float softmax_weights(const Tile& tile, float* logits, const Gradients& by) {
  const float shift = largest_logit(logits);
  bool shared = shift != kLeftOut;
  alignas(64) float row_factor[kRowTile];
  alignas(64) float column_factor[kColumnTile] = {};
  for (int64_t i = 0; i < tile.num_rows && shared; ++i) {
    shared = std::abs(shift - by.row_lse[i]) <= kWidestShift;
    row_factor[i] = by.row_lse_grad[i] * std::exp(shift - by.row_lse[i]);
  }
  for (int64_t j = 0; j < tile.num_columns && shared; ++j) {
    if (by.column_lse_grad[j] == 0.0f) continue;
    shared = std::abs(shift - by.column_lse[j]) <= kWidestShift;
    column_factor[j] = by.column_lse_grad[j] * std::exp(shift - by.column_lse[j]);
  }
  alignas(64) float column_lse[kColumnTile];
  alignas(64) float column_grad[kColumnTile] = {};
  if (!shared) {
    for (int64_t j = 0; j < kColumnTile; ++j) {
      const bool used = j < tile.num_columns && by.column_lse_grad[j] != 0.0f;
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
    Floats sum = {};
    for (int64_t j = 0; j < kColumnTile; j += CARILLON_VECTOR) {
      const Floats logit = load(line + j);
      Floats weight;
      if (shared) {
        weight = exp_of(logit - splat(shift)) * (splat(row_factor[i]) + load(column_factor + j));
      } else {
        // A column that is not used may have any logit: its exponent is cut, its gradient is zero.
        const Floats limit = splat(80.0f);
        const Floats by_row = logit - splat(by.row_lse[i]);
        const Floats by_column = logit - load(column_lse + j);
        weight = exp_of(by_row > limit ? limit : by_row) * splat(by.row_lse_grad[i]) +
                 exp_of(by_column > limit ? limit : by_column) * load(column_grad + j);
      }
      if (by.row_sum_grad != nullptr) {
        const Floats plain = splat(by.row_sum_grad[i]) + load(by.column_sum_grad + j);
        weight = logit == splat(kLeftOut) ? splat(0.0f) : weight + plain;
      }
      // What is left out has the logit -inf and the weight 0, whose product is not wanted.
      sum += logit == splat(kLeftOut) ? splat(0.0f) : weight * logit;
      store(line + j, weight);
    }
    weighted += static_cast<double>(sum_of(sum));
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
    const Floats grad = splat(row_loss_grad[i]);
    Floats sum = {}, sum_of_weights = {};
    for (int64_t j = 0; j < kColumnTile; j += CARILLON_VECTOR) {
      const Floats logit = load(line + j);
      const Floats limit = splat(87.0f);
      const Floats weight = grad / (splat(1.0f) + exp_of(-logit > limit ? limit : -logit));
      const Floats kept = logit == splat(kLeftOut) ? splat(0.0f) : weight;
      sum_of_weights += kept;
      sum += logit == splat(kLeftOut) ? splat(0.0f) : kept * (logit - splat(tile.bias));
      store(line + j, kept);
    }
    weighted += static_cast<double>(sum_of(sum));
    bias += static_cast<double>(sum_of(sum_of_weights));
    if (match >= 0) {
      line[match] = -row_loss_grad[i] / (1.0f + std::exp(match_logit));
      bias += line[match];
      weighted += static_cast<double>(line[match]) * (match_logit - tile.bias);
    }
  }
  return static_cast<float>(weighted);
}

// Weights (a full tile, zeros at the edges) as the left factor of the two products that give the
// gradients: by rows, and by columns with neighbouring rows in one word.
void split_weights(const float* weights, uint32_t* by_row, uint32_t* by_column) {
  for (int64_t i = 0; i < kRowTile; i += 2) {
    const float* even = weights + i * kColumnTile;
    const float* odd = even + kColumnTile;
    for (int64_t j = 0; j < kColumnTile; j += CARILLON_VECTOR) {
      const Words top = rounded_up_half(load(even + j));
      const Words bottom = rounded_up_half(load(odd + j));
      const Words low = splat_word(0xffff);
      *reinterpret_cast<Words*>(by_column + (i / 2) * kColumnTile + j) =
          ((top >> 16) & low) | bottom;
      for (int64_t lane = 0; lane < CARILLON_VECTOR; lane += 2) {
        const int64_t word = (j + lane) / 2;
        by_row[i * (kColumnTile / 2) + word] =
            (static_cast<uint32_t>(top[lane]) >> 16) | static_cast<uint32_t>(top[lane + 1]);
        by_row[(i + 1) * (kColumnTile / 2) + word] =
            (static_cast<uint32_t>(bottom[lane]) >> 16) | static_cast<uint32_t>(bottom[lane + 1]);
      }
    }
  }
}

// Adds a tile's share to the gradients: of its rows, weights x columns; of its columns, the
// transposed weights x rows. Both are kRowTile x dims and kColumnTile x dims, padded, unscaled.
void add_gradients(const TileGradients& tile, const float* weights, bool is_bfloat16) {
  if (!is_bfloat16) {
    const auto* words = reinterpret_cast<const uint32_t*>(weights);
    product<Float32Products, true>(words, kColumnTile, 1, tile.columns, kColumnTile, tile.rows_grad,
                                   tile.padded_dims, kRowTile, tile.padded_dims);
    product<Float32Products, true>(words, 1, kColumnTile, tile.rows, kRowTile, tile.columns_grad,
                                   tile.padded_dims, kColumnTile, tile.padded_dims);
    return;
  }
  split_weights(weights, tile.by_row, tile.by_column);
  product<BFloat16Products, true>(tile.by_row, kColumnTile / 2, 1, tile.columns, kColumnTile / 2,
                                  tile.rows_grad, tile.padded_dims, kRowTile, tile.padded_dims);
  product<BFloat16Products, true>(tile.by_column, 1, kColumnTile, tile.rows, kRowTile / 2,
                                  tile.columns_grad, tile.padded_dims, kColumnTile,
                                  tile.padded_dims);
}

constexpr Loops kLoops = {
    .panel = kPanel,
    .pack_columns = pack_columns,
    .pack_rows_float = pack_rows,
    .pack_rows_bfloat16 = pack_rows,
    .fill_float = fill_tile<Float32Products>,
    .fill_bfloat16 = fill_tile<BFloat16Products>,
    .reduce_tile = reduce_tile,
    .add_plain_sums = add_plain_sums,
    .sigmoid_row = sigmoid_row,
    .softmax_weights = softmax_weights,
    .sigmoid_weights = sigmoid_weights,
    .add_gradients = add_gradients,
};
