// Copies of rows in the layouts that products.h reads. Included once per instruction set.
//
// Element is the tensors' type (float, or uint16_t for bfloat16's bits). Without kPairs a bfloat16
// becomes a float here, so that processors without its products run the float32 kernels.
//
// An attention head's rows lie a token apart, which no hardware prefetcher follows, and waiting for
// them took two thirds of a short sequence's forward pass: so each copy asks for the same rows of
// the next head, which the next task reads.

// Rows from one on, such as a head's from one token on, `stride` elements apart. `next_head` is how
// much further what is read next lies; it may lead past the end: asking for it is harmless.
template <typename Element>
struct Head {
  const Element* rows;
  int64_t stride;
  int64_t next_head;

  CARILLON_INLINE void prefetch(int64_t row, int64_t first) const {
    __builtin_prefetch(rows + row * stride + next_head + first, 0, 2);
  }
};

// Units of so many values of a row.
template <bool kPairs>
constexpr int64_t units_of(int64_t values) {
  return kPairs ? (values + 1) / 2 : values;
}

// Units [first, first + kWidth) of a row, zeros past its end.
template <typename Element, bool kPairs>
CARILLON_INLINE Floats load_units(const Element* row, int64_t first, int64_t num_units) {
  if constexpr (kPairs) {
    Floats v{};
    const int64_t count = std::min(num_units - first, kWidth);
    if (count == kWidth) {
      __builtin_memcpy(&v, row + 2 * first, sizeof v);
    } else {
      __builtin_memcpy(&v, row + 2 * first, count * sizeof(float));
    }
    return v;
  } else {
    return load_part(row + first, num_units - first);
  }
}

// Rows as they are, for the left operand: [num_rows, num_units], num_units a row apart.
template <typename Element, bool kPairs>
inline void pack_rows(const Head<Element>& from, int64_t num_rows, int64_t num_units, float* to) {
  for (int64_t r = 0; r < num_rows; ++r, to += num_units) {
    const Element* row = from.rows + r * from.stride;
    for (int64_t u = 0; u < num_units; u += kWidth) {
      from.prefetch(r, kPairs ? 2 * u : u);
      store_part(to + u, load_units<Element, kPairs>(row, u, num_units), num_units - u);
    }
  }
}

// kWidth x kWidth in registers: log2(kWidth) rounds, each swapping blocks of doubling size.
CARILLON_INLINE void transpose(Floats (&rows)[kWidth]) {
#pragma GCC unroll 4
  for (int size = 1; size < kWidth; size *= 2) {
    Ints low, high;
    for (int32_t i = 0; i < kWidth; ++i) {
      low[i] = (i & size) ? int32_t(kWidth) + i - size : i;
      high[i] = (i & size) ? int32_t(kWidth) + i : i + size;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kWidth; ++r) {
      if (r & size) continue;
      const Floats a = rows[r];
      const Floats b = rows[r + size];
      rows[r] = __builtin_shuffle(a, b, low);
      rows[r + size] = __builtin_shuffle(a, b, high);
    }
  }
}

// Right operand whose columns are the rows: products that sum over head_dim.
template <typename Element, bool kPairs>
inline void pack_transposed(const Head<Element>& from, int64_t num_rows, int64_t num_units,
                            const Right& to) {
  for (int64_t column = 0; column < to.columns; column += kWidth) {
    for (int64_t u = 0; u < num_units; u += kWidth) {
      Floats block[kWidth];
      for (int64_t r = 0; r < kWidth; ++r) {
        block[r] = Floats{};
        if (column + r >= num_rows) continue;
        from.prefetch(column + r, kPairs ? 2 * u : u);
        block[r] = load_units<Element, kPairs>(from.rows + (column + r) * from.stride, u,
                                               num_units);
      }
      transpose(block);
      float* target = to.at(u, column);
      const int64_t width = to.panel_width(column);
      for (int64_t i = 0; i < std::min(num_units - u, kWidth); ++i) {
        store(target + i * width, block[i]);
      }
    }
  }
}

// Right operand whose steps are the rows: products that sum over tokens. With kPairs a step is two
// rows, and a last single row is paired with zeros.
template <typename Element, bool kPairs>
inline void pack_steps(const Head<Element>& from, int64_t num_rows, int64_t head_dim,
                       const Right& to) {
  constexpr int64_t kRows = kPairs ? 2 : 1;
  for (int64_t r = 0; r < num_rows; r += kRows) {
    const Element* row = from.rows + r * from.stride;
    const Element* next = row + from.stride;
    const bool alone = r + 1 == num_rows;
    for (int64_t column = 0; column < to.columns; column += kWidth) {
      const int64_t count = head_dim - column;
      from.prefetch(r, column);
      Floats units;
      if constexpr (kPairs) {
        from.prefetch(r + 1, column);
        const Halves second = alone ? Halves{} : load_halves(next + column, count);
        units = pair(load_halves(row + column, count), second);
      } else {
        units = load_part(row + column, count);
      }
      store(to.at(r / kRows, column), units);
    }
  }
}

// Float32 rows to a tensor's rows, each value times `factor`.
template <typename Element>
CARILLON_INLINE void write_row(const float* from, float factor, int64_t head_dim, Element* to) {
  for (int64_t d = 0; d < head_dim; d += kWidth) {
    store_part(to + d, load(from + d) * factor, head_dim - d);
  }
}

CARILLON_INLINE void fill(float* to, int64_t size, float value) {
  for (int64_t i = 0; i < size; ++i) to[i] = value;
}
