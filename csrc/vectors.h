// Vectors of floats. Included once per instruction set by cpu_targets.h, which sets CARILLON_WIDTH
// (floats a vector) and CARILLON_PAIRS (whether there are products of bfloat16 pairs); so there is
// no #pragma once.

constexpr int64_t kWidth = CARILLON_WIDTH;
// Columns of a product that are computed together, in vectors: accumulators fill the registers.
constexpr int64_t kTileVectors = kWidth == 16 ? 4 : 2;
constexpr int64_t kTileRows = 6;
constexpr int64_t kPanel = kTileVectors * kWidth;

typedef float Floats __attribute__((vector_size(CARILLON_WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(CARILLON_WIDTH * 4)));
typedef uint32_t Words __attribute__((vector_size(CARILLON_WIDTH * 4)));
typedef uint16_t Halves __attribute__((vector_size(CARILLON_WIDTH * 2)));

CARILLON_INLINE Floats load(const float* from) {
  Floats v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

CARILLON_INLINE void store(float* to, Floats v) { __builtin_memcpy(to, &v, sizeof v); }

// By integers: the bits may be those of a bfloat16 pair, which no float operation may touch.
CARILLON_INLINE Floats broadcast(const float* from) {
  int32_t bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return (Floats)(bits + Ints{});
}

CARILLON_INLINE Floats broadcast(float x) { return broadcast(&x); }

// bfloat16 is kept as its 16 bits. Reading it is a shift.
CARILLON_INLINE Floats load(const uint16_t* from) {
  Halves v;
  __builtin_memcpy(&v, from, sizeof v);
  return (Floats)(__builtin_convertvector(v, Words) << 16);
}

// The first `count` values, zeros after them.
CARILLON_INLINE Halves load_halves(const uint16_t* from, int64_t count) {
  Halves v{};
  if (count >= kWidth) {
    __builtin_memcpy(&v, from, sizeof v);
  } else if (count > 0) {  // rows of no values may have no memory
    __builtin_memcpy(&v, from, count * sizeof(uint16_t));
  }
  return v;
}

// Rounds to nearest even, NaN stays NaN; by integer arithmetic where there is no instruction.
CARILLON_INLINE Halves to_halves(Floats v) {
#if CARILLON_PAIRS
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  const Words bits = (Words)v;
  const Words even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words number = (Words)(v == v);
  return __builtin_convertvector((even & number) | (0x7fc0 & ~number), Halves);
#endif
}

CARILLON_INLINE void store(uint16_t* to, Halves half) { __builtin_memcpy(to, &half, sizeof half); }

CARILLON_INLINE void store(uint16_t* to, Floats v) { store(to, to_halves(v)); }

// Two bfloat16 that are summed over together: `first` in the low half.
CARILLON_INLINE Floats pair(Halves first, Halves second) {
  return (Floats)(__builtin_convertvector(first, Words) |
                  __builtin_convertvector(second, Words) << 16);
}

// The first `count` values, zeros after them.
template <typename Element>
CARILLON_INLINE Floats load_part(const Element* from, int64_t count) {
  if (count >= kWidth) return load(from);
  Element values[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = from[i];
  return load(values);
}

template <typename Element>
CARILLON_INLINE void store_part(Element* to, Floats v, int64_t count) {
  if (count >= kWidth) return store(to, v);
  Element values[kWidth];
  store(values, v);
  for (int64_t i = 0; i < count; ++i) to[i] = values[i];
}

CARILLON_INLINE Ints lanes() {
  Ints v;
  for (int32_t i = 0; i < kWidth; ++i) v[i] = i;
  return v;
}

CARILLON_INLINE Floats choose(Ints mask, Floats a, Floats b) {
  return (Floats)(((Ints)a & mask) | ((Ints)b & ~mask));
}

CARILLON_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

CARILLON_INLINE float sum(Floats v) {
  float values[kWidth];
  store(values, v);
  for (int64_t half = kWidth / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) values[i] += values[i + half];
  }
  return values[0];
}

CARILLON_INLINE float largest(Floats v) {
  float values[kWidth];
  store(values, v);
  for (int64_t half = kWidth / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      values[i] = values[i + half] > values[i] ? values[i + half] : values[i];
    }
  }
  return values[0];
}

// e^x for x of at most 88, within 2 units in the last place; 0 below e^-87, where float32 would
// become denormal; NaN of NaN. x = n ln 2 + r, |r| <= ln 2 / 2,
// a polynomial in r (Cephes expf), and n added to the exponent.
CARILLON_INLINE Floats exponential(Floats x) {
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds, n in the low bits
  const Floats n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Floats power = (Floats)((Words)p + ((Words)shifted << 23));  // below -87 it wraps
  return choose(x < -87.0f, Floats{}, power);
}
