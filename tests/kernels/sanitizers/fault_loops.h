// Compiled once per instruction set by cpu_targets.h.

inline float sum_between(const float* from, int64_t first, int64_t last) {
  Floats total{};
  for (int64_t i = first; i < last; i += kWidth) total = total + load_part(from + i, last - i);
  return sum(total);
}

constexpr VectorSum kTable = sum_between;
