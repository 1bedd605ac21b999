// What the CUDA kernels compute of one logit. Exponentials are powers of two.
#pragma once

#include "host_device.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace carillon::contrastive {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kNothing = -std::numeric_limits<float>::infinity();
// Sums of powers of two inside these bounds lost nothing by their common shift: what flushed to
// zero is no loss beside the smallest, and none of 2^31 terms came near float32's end.
constexpr float kSmallestTotal = 1e-30f;
constexpr float kLargestTotal = 1e30f;
// Log-sum-exps (of powers of two) that lie so close share one shift in the backward pass.
constexpr float kWidestRange = 100.0f;
constexpr float kLargestPower = 100.0f;

CARILLON_HOST_DEVICE float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

CARILLON_HOST_DEVICE float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// A number that is not one loses against any other.
CARILLON_HOST_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
CARILLON_HOST_DEVICE float smaller(float a, float b) { return fminf(a, b); }

struct Add {
  CARILLON_HOST_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  CARILLON_HOST_DEVICE float operator()(float a, float b) const { return larger(a, b); }
};
// Of products, the one that is largest once multiplied by a factor of this sign.
struct Foremost {
  bool is_negative;
  CARILLON_HOST_DEVICE float operator()(float a, float b) const {
    return is_negative ? smaller(a, b) : larger(a, b);
  }
};

// 2^shift * total: a sum of powers of two, the largest of which are near 2^shift.
struct alignas(8) Total {
  float shift = kNothing;
  float total = 0.0f;
};

// The shift to subtract: nothing is left of a sum without terms, whose shift is -inf.
CARILLON_HOST_DEVICE float finite_shift(float shift) { return shift == kNothing ? 0.0f : shift; }

CARILLON_HOST_DEVICE Total merge(const Total& a, const Total& b) {
  // A sum without terms has no say in the shift: with its own the other could flush to zero.
  const float first = a.total == 0.0f ? kNothing : a.shift;
  const float second = b.total == 0.0f ? kNothing : b.shift;
  const float shift = larger(first, second);
  const float safe = finite_shift(shift);
  return {shift, a.total * power_of_two(first - safe) + b.total * power_of_two(second - safe)};
}

CARILLON_HOST_DEVICE float log_of(const Total& sum) {
  return sum.total == 0.0f ? kNothing : (sum.shift + log2f(sum.total)) * kLn2;
}

// False for a sum that is not a number too.
CARILLON_HOST_DEVICE bool is_safe(float total) {
  return total >= kSmallestTotal && total <= kLargestTotal;
}

// log(1 + e^x): log(1 + u) = 2 atanh(u / (2 + u)), exact for small u too, of which a row has
// thousands.
CARILLON_HOST_DEVICE float softplus(float x) {
  const float u = power_of_two(-fabsf(x) * kLog2E);
  const float y = quotient(u, u + 2.0f);
  const float square = y * y;
  float series = 1.0f / 13;
  series = series * square + 1.0f / 11;
  series = series * square + 1.0f / 9;
  series = series * square + 1.0f / 7;
  series = series * square + 1.0f / 5;
  series = series * square + 1.0f / 3;
  const float above = x < 0.0f ? 0.0f : x;  // a number that is not one stays
  return above + 2.0f * y * (series * square + 1.0f);
}

CARILLON_HOST_DEVICE float sigmoid(float x) {
  return quotient(1.0f, 1.0f + power_of_two(-x * kLog2E));
}

// Two values rounded to bfloat16, the first in the lower half.
CARILLON_HOST_DEVICE uint32_t pack_bfloat16(float first, float second) {
#ifdef __CUDA_ARCH__
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
#else
  const float values[2] = {first, second};
  uint32_t packed = 0;
  for (int i = 0; i < 2; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], sizeof(bits));
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    packed |= (is_nan ? 0x7fffu : rounded & 0xffff) << (16 * i);
  }
  return packed;
#endif
}

}  // namespace carillon::contrastive
