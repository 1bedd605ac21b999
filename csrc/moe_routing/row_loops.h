// The inner loops over rows, compiled once per instruction set by cpu_targets.h.
//
// What is prefetched is read a whole row later: rows of other tokens lie elsewhere, and the
// processor's own prefetching starts anew at each row.

// Vectors that are summed together, so that a row's address is read once for them.
constexpr int64_t kRowVectors = 4;
constexpr int64_t kStepLines = 2;  // of a row of gradients, written past the caches

CARILLON_INLINE void prefetch_row(const char* row, int64_t size) {
  for (int64_t b = 0; b < size; b += kLineBytes) prefetch(row + b);
}

// Sums kVectors vectors of columns over the token's rows, in the order of its slots.
template <int64_t kVectors, typename Element>
CARILLON_INLINE void sum_columns(const RowsOfToken& token, int64_t first, Element* out) {
  Floats sums[kVectors] = {};
  for (int64_t i = 0; i < token.count; ++i) {
    const Element* row = reinterpret_cast<const Element*>(token.rows[i]) + first;
    const Floats factor = broadcast(token.factors[i]);
    for (int64_t v = 0; v < kVectors; ++v) sums[v] += factor * load(row + v * kWidth);
  }
  alignas(kLineBytes) Element rounded[kVectors * kWidth];
  for (int64_t v = 0; v < kVectors; ++v) store(rounded + v * kWidth, sums[v]);
  constexpr bool kWholeLines = sizeof(rounded) % kLineBytes == 0;
  write_bytes(rounded, out + first, sizeof(rounded), kWholeLines && token.streams);
}

template <typename Element>
void sum_rows(const RowsOfToken& token, void* target) {
  Element* out = static_cast<Element*>(target);
  for (int64_t j = 0; j < token.num_next; ++j) {
    prefetch_row(token.next[j], token.width * static_cast<int64_t>(sizeof(Element)));
  }
  int64_t d = 0;
  for (; d + kRowVectors * kWidth <= token.width; d += kRowVectors * kWidth) {
    sum_columns<kRowVectors>(token, d, out);
  }
  for (; d + kWidth <= token.width; d += kWidth) sum_columns<1>(token, d, out);
  if (d == token.width) return;
  Floats sums{};
  for (int64_t i = 0; i < token.count; ++i) {
    const Element* row = reinterpret_cast<const Element*>(token.rows[i]) + d;
    sums += broadcast(token.factors[i]) * load_part(row, token.width - d);
  }
  store_part(out + d, sums, token.width - d);
}

// out = factor * grad; returns the dot product of grad and row.
template <typename Element>
float scale_and_dot(const ScaledRow& of) {
  constexpr int64_t kStep = kStepLines * kLineBytes / static_cast<int64_t>(sizeof(Element));
  constexpr int64_t kVectors = kStep / kWidth;
  const Element* grad = static_cast<const Element*>(of.grad);
  const Element* row = static_cast<const Element*>(of.row);
  Element* out = static_cast<Element*>(of.out);
  prefetch_row(of.next, of.width * static_cast<int64_t>(sizeof(Element)));
  const Floats factor = broadcast(of.factor);
  Floats dots[kVectors] = {};
  int64_t d = 0;
  for (; d + kStep <= of.width; d += kStep) {
    alignas(kLineBytes) Element scaled[kStep];
    for (int64_t v = 0; v < kVectors; ++v) {
      const Floats g = load(grad + d + v * kWidth);
      dots[v] += g * load(row + d + v * kWidth);
      store(scaled + v * kWidth, factor * g);
    }
    write_bytes(scaled, out + d, sizeof(scaled), of.streams);
  }
  for (int64_t v = 0; d < of.width; d += kWidth, ++v) {
    const int64_t count = of.width - d;
    const Floats g = load_part(grad + d, count);
    dots[v] += g * load_part(row + d, count);
    store_part(out + d, factor * g, count);
  }
  for (int64_t v = 1; v < kVectors; ++v) dots[0] += dots[v];
  return sum(dots[0]);
}

constexpr RowTable kTable = {
    {&sum_rows<float>, &scale_and_dot<float>},
    {&sum_rows<uint16_t>, &scale_and_dot<uint16_t>},
};
