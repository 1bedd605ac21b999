// Small dense products on the CPU, on tiles that stay in cache: the inner loops of fused operators.
//
// Included by csrc/cpu_targets.h once per instruction set, each time into a namespace of its own
// and between pragmas that let the compiler use that set. It must include nothing itself.
//
// A product here is C (rows x columns, float32) = or += A x B. The depth runs over 32-bit words: one
// float32, or two neighbouring bfloat16 values whose products are summed as one (vdpbf16ps). A is
// read where it lies, one word broadcast at a time; B is packed in panels of kPanel columns, [depth]
// [kPanel] words each. A block of kRows x kPanel accumulators stays in registers over the depth.

constexpr int kRows = CARILLON_TILE_ROWS;       // a block's rows
constexpr int kPanel = 2 * CARILLON_VECTOR;     // a panel's columns: two vectors

typedef float Floats __attribute__((vector_size(4 * CARILLON_VECTOR), aligned(4), may_alias));
typedef int32_t Words __attribute__((vector_size(4 * CARILLON_VECTOR), aligned(4), may_alias));

#define CARILLON_INLINE inline __attribute__((always_inline))

CARILLON_INLINE Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
CARILLON_INLINE void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }
CARILLON_INLINE Floats splat(float value) { return Floats{} + value; }
CARILLON_INLINE Words splat_word(int32_t value) { return Words{} + value; }

// How A's words reach the vector unit and are multiplied into an accumulator.
struct Float32Products {
  using Vector = Floats;
  static CARILLON_INLINE Vector broadcast(const uint32_t* word) {
    return splat(*reinterpret_cast<const float*>(word));
  }
  static CARILLON_INLINE Vector panel(const uint32_t* words) {
    return load(reinterpret_cast<const float*>(words));
  }
  static CARILLON_INLINE Floats add(Floats sum, Vector a, Vector b) { return sum + a * b; }
};

// Without an instruction for it: the two halves of a word widened and multiplied as float32.
struct WidenedBFloat16Products {
  using Vector = Words;
  static CARILLON_INLINE Vector broadcast(const uint32_t* word) {
    return splat_word(static_cast<int32_t>(*word));
  }
  static CARILLON_INLINE Vector panel(const uint32_t* words) {
    return *reinterpret_cast<const Words*>(words);
  }
  static CARILLON_INLINE Floats add(Floats sum, Vector a, Vector b) {
    const Words high = splat_word(static_cast<int32_t>(0xffff0000));
    sum += reinterpret_cast<Floats>(a << 16) * reinterpret_cast<Floats>(b << 16);
    return sum + reinterpret_cast<Floats>(a & high) * reinterpret_cast<Floats>(b & high);
  }
};

#ifdef CARILLON_HAS_BFLOAT16
struct NativeBFloat16Products {
  using Vector = __m512bh;
  static CARILLON_INLINE Vector broadcast(const uint32_t* word) {
    return reinterpret_cast<Vector>(_mm512_set1_epi32(static_cast<int>(*word)));
  }
  static CARILLON_INLINE Vector panel(const uint32_t* words) {
    return reinterpret_cast<Vector>(_mm512_loadu_si512(words));
  }
  static CARILLON_INLINE Floats add(Floats sum, Vector a, Vector b) {
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), a, b));
  }
};
using BFloat16Products = NativeBFloat16Products;
#else
using BFloat16Products = WidenedBFloat16Products;
#endif

// One block: C[kRows][kPanel] = (or +=) A[kRows][depth] x B[depth][kPanel].
// A's word (r, k) is at a[r * a_row + k * a_depth]; C's rows are c_row floats apart.
template <typename Products, bool kAdd>
CARILLON_INLINE void block_product(const uint32_t* a, int64_t a_row, int64_t a_depth,
                                   const uint32_t* b, int64_t depth, float* c, int64_t c_row) {
  Floats sums[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = kAdd ? load(c + r * c_row) : Floats{};
    sums[r][1] = kAdd ? load(c + r * c_row + CARILLON_VECTOR) : Floats{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const auto left = Products::panel(b + k * kPanel);
    const auto right = Products::panel(b + k * kPanel + CARILLON_VECTOR);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const auto word = Products::broadcast(a + r * a_row + k * a_depth);
      sums[r][0] = Products::add(sums[r][0], word, left);
      sums[r][1] = Products::add(sums[r][1], word, right);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    store(c + r * c_row, sums[r][0]);
    store(c + r * c_row + CARILLON_VECTOR, sums[r][1]);
  }
}

// C (num_rows x num_columns) = or += A x B; num_rows a multiple of kRows, num_columns of kPanel.
// B's panels follow each other, depth * kPanel words apart.
template <typename Products, bool kAdd>
void product(const uint32_t* a, int64_t a_row, int64_t a_depth, const uint32_t* b, int64_t depth,
             float* c, int64_t c_row, int64_t num_rows, int64_t num_columns) {
  for (int64_t j = 0; j < num_columns; j += kPanel) {
    const uint32_t* panel = b + (j / kPanel) * depth * kPanel;
    for (int64_t i = 0; i < num_rows; i += kRows) {
      block_product<Products, kAdd>(a + i * a_row, a_row, a_depth, panel, depth, c + i * c_row + j,
                                    c_row);
    }
  }
}

// exp(x) for x <= 88, flushing to zero below -87; relative error under 2^-22.
// Cody and Waite's reduction by log(2) in two parts, then a polynomial of degree 6 (Cephes, expf).
CARILLON_INLINE Floats exp_of(Floats x) {
  const Words underflows = x < splat(-87.0f);
  const Floats scaled = x * splat(1.44269504088896341f);
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats whole = (scaled + magic) - magic;
  Floats r = x - whole * splat(0.693359375f);
  r = r - whole * splat(-2.12194440e-4f);
  Floats p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  const Words exponent = (__builtin_convertvector(whole, Words) + splat_word(127)) << 23;
  const Floats value = p * reinterpret_cast<Floats>(exponent);
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(value) & ~underflows);
}

CARILLON_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

CARILLON_INLINE float sum_of(Floats value) {
  float sum = 0.0f;
  for (int lane = 0; lane < CARILLON_VECTOR; ++lane) sum += value[lane];
  return sum;
}

CARILLON_INLINE float largest_of(Floats value) {
  float largest = value[0];
  for (int lane = 1; lane < CARILLON_VECTOR; ++lane) {
    largest = value[lane] > largest ? value[lane] : largest;
  }
  return largest;
}

// float32 to bfloat16 bits in the upper half of each word, to nearest even; NaN stays NaN.
CARILLON_INLINE Words rounded_up_half(Floats value) {
  const Words bits = reinterpret_cast<Words>(value);
  const Words rounded = bits + splat_word(0x7fff) + ((bits >> 16) & splat_word(1));
  const Words is_nan = value != value;
  const Words nan = splat_word(0x7fc00000);
  return ((rounded & ~is_nan) | (nan & is_nan)) & splat_word(static_cast<int32_t>(0xffff0000));
}
