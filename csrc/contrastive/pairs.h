// All pairs of two sides, tile by tile: strips of columns packed once, rows shared out to threads.
// Included by cpu.cpp once the loops are there.

constexpr int64_t kTilesPerStrip = 5;
constexpr int64_t kStrip = kTilesPerStrip * kColumnTile;

using Values = std::vector<float>;

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

// The arguments that all four ops share, contiguous.
class Pairs {
 public:
  Pairs(const at::Tensor& rows, const at::Tensor& columns, float scale, float bias,
        int64_t first_column, const std::optional<at::Tensor>& row_ids,
        const std::optional<at::Tensor>& column_ids)
      : loops(best_table()),
        products(rows.scalar_type() == at::kFloat ? loops.of_float : loops.of_bfloat16),
        num_rows(rows.size(0)),
        num_columns(columns.size(0)),
        scale_(scale),
        bias_(bias),
        // Further away there is no match either, and sums with it could overflow.
        first_column_(std::clamp(first_column, -num_rows, num_columns)) {
    rows_ = whole_units(rows);
    columns_ = whole_units(columns);
    dims = rows_.size(1);
    width = round_up(std::max<int64_t>(dims, 1), loops.width);
    if (row_ids) {
      row_ids_ = row_ids->contiguous();
      column_ids_ = column_ids->contiguous();
    }
  }

  const Loops& loops;
  const Products& products;
  int64_t num_rows, num_columns;
  int64_t dims;   // even for bfloat16
  int64_t width;  // of a gradient's row: dims, rounded up to a vector

  int64_t num_row_tiles() const { return (num_rows + kRowTile - 1) / kRowTile; }
  int64_t num_tasks() const {
    return std::min<int64_t>(at::get_num_threads(), num_row_tiles());
  }
  int64_t columns_of(int64_t column) const { return std::min(kColumnTile, num_columns - column); }

  Features rows() const { return {rows_.const_data_ptr(), dims}; }
  Features columns() const { return {columns_.const_data_ptr(), dims}; }

  // Calls pack(first column, count, number of the tile) for each column tile of a strip.
  template <typename Pack>
  void for_each_column_tile(int64_t strip, const Pack& pack) const {
    at::parallel_for(0, kTilesPerStrip, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = strip + t * kColumnTile;
        if (first < num_columns) pack(first, columns_of(first), t);
      }
    });
  }

  // Calls visit(task, tile, logits, first row, first column) for every tile of a strip, tiles of
  // one task in order. `logits` is the task's own.
  template <typename Visit>
  void for_each_tile(int64_t strip, Values& packed, const Visit& visit) const {
    const int64_t units = products.units(dims);
    packed.resize(kStrip * units);
    for_each_column_tile(strip, [&](int64_t first, int64_t count, int64_t number) {
      products.pack_columns(columns(), first, count, packed.data() + number * kColumnTile * units);
    });
    for_each_thread(num_row_tiles(), [&](int64_t task, int64_t begin, int64_t end) {
      Values logits(kRowTile * kColumnTile), packed_rows(kRowTile * units);
      for (int64_t row = begin * kRowTile; row < std::min(end * kRowTile, num_rows);
           row += kRowTile) {
        const int64_t count = std::min(kRowTile, num_rows - row);
        products.pack_rows(rows(), row, count, packed_rows.data());
        for (int64_t t = 0; t < kTilesPerStrip; ++t) {
          const int64_t column = strip + t * kColumnTile;
          if (column >= num_columns) break;
          const Tile tile{
              .rows = packed_rows.data(),
              .columns = packed.data() + t * kColumnTile * units,
              .dims = dims,
              .num_rows = count,
              .num_columns = columns_of(column),
              .scale = scale_,
              .bias = bias_,
              .first_match = first_column_ + row - column,
              .row_ids = ids(row_ids_, row),
              .column_ids = ids(column_ids_, column),
          };
          products.fill_tile(tile, logits.data());
          visit(task, tile, logits.data(), row, column);
        }
      }
    });
  }

 private:
  // bfloat16 is read by twos.
  static at::Tensor whole_units(const at::Tensor& features) {
    const bool odd = features.scalar_type() == at::kBFloat16 && features.size(1) % 2 != 0;
    return odd ? at::constant_pad_nd(features, {0, 1}) : features.contiguous();
  }
  static const int64_t* ids(const at::Tensor& ids, int64_t at) {
    return ids.defined() ? ids.const_data_ptr<int64_t>() + at : nullptr;
  }

  at::Tensor rows_, columns_, row_ids_, column_ids_;
  float scale_, bias_;
  int64_t first_column_;
};
