// What a backward pass adds up: the rows' gradients in place, a strip's columns by each task apart.
// Included by cpu.cpp behind pairs.h.

class GradientSums {
 public:
  explicit GradientSums(const Pairs& pairs) : pairs_(pairs), tasks_(pairs.num_tasks()) {
    rows_ = at::zeros({pairs.num_rows, pairs.width}, at::kFloat);
    columns_ = at::empty({pairs.num_columns, pairs.dims}, at::kFloat);
    packed_columns_.resize(kTilesPerStrip * tile_size(kColumnTile));
  }

  void start_strip(int64_t strip) {
    strip_ = strip;
    pairs_.for_each_column_tile(strip, [&](int64_t first, int64_t count, int64_t number) {
      pairs_.products.pack_steps(pairs_.columns(), first, count, pairs_.width,
                                 packed_columns_.data() + number * tile_size(kColumnTile));
    });
    for (auto& task : tasks_) {
      task.columns.assign(kStrip * pairs_.width, 0.0f);
      task.packed_row = -1;
    }
  }

  // Adds a tile's share; `weights` are the loss's derivatives by its logits.
  void add(int64_t number, const Tile& tile, const float* weights, int64_t row, int64_t column) {
    Task& task = tasks_[number];
    if (task.packed_row != row) {
      task.packed_rows.resize(tile_size(kRowTile));
      pairs_.products.pack_steps(pairs_.rows(), row, tile.num_rows, pairs_.width,
                                 task.packed_rows.data());
      task.packed_row = row;
      task.by_row.resize(kRowTile * kColumnTile / 2);
      task.by_column.resize(kRowTile * kColumnTile / 2);
    }
    const int64_t at = column - strip_;
    const TileGradients to{
        .rows = task.packed_rows.data(),
        .columns = packed_columns_.data() + at / kColumnTile * tile_size(kColumnTile),
        .rows_grad = rows_.mutable_data_ptr<float>() + row * pairs_.width,
        .columns_grad = task.columns.data() + at * pairs_.width,
        .width = pairs_.width,
        .by_row = task.by_row.data(),
        .by_column = task.by_column.data(),
    };
    pairs_.products.add_gradients(tile, to, weights);
  }

  void end_strip() {
    const int64_t count = std::min(kStrip, pairs_.num_columns - strip_);
    const int64_t dims = pairs_.dims, width = pairs_.width;
    float* to = columns_.mutable_data_ptr<float>() + strip_ * dims;
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        for (int64_t d = 0; d < dims; ++d) {
          float sum = 0.0f;
          for (const auto& task : tasks_) sum += task.columns[k * width + d];
          to[k * dims + d] = sum;
        }
      }
    });
  }

  // (N, D) and (M, D), without padding.
  at::Tensor rows(int64_t dims) const { return rows_.narrow(1, 0, dims); }
  at::Tensor columns(int64_t dims) const { return columns_.narrow(1, 0, dims); }

 private:
  struct Task {
    Values columns, packed_rows, by_row, by_column;
    int64_t packed_row = -1;
  };

  // Floats of a packed tile of so many steps.
  int64_t tile_size(int64_t steps) const { return pairs_.products.units(steps) * pairs_.width; }

  const Pairs& pairs_;
  std::vector<Task> tasks_;
  at::Tensor rows_, columns_;
  Values packed_columns_;
  int64_t strip_ = 0;
};
