// exp of float32 as plain arithmetic, which loops vectorise over (libm's is a call a value).
#pragma once

#include "cpu_dispatch.h"

#include <bit>
#include <cstdint>

namespace carillon {

// exp(x) for x <= 0, to 2 units in the last place; 0 below -87.3, where results are subnormal.
// x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for exp(r) (Cephes expf), and 2^n by its bits.
CARILLON_INLINE float exp_of_nonpositive(float x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x < -87.3f ? -87.3f : x;
  const float shifted = clamped * kLog2E + kRounder;
  const float n = shifted - kRounder;
  const float r = (clamped - n * kLn2High) - n * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float mantissa = p * r * r + r + 1.0f;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRounder);
  const float scaled =
      mantissa * std::bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23);
  return x < -87.3f ? 0.0f : scaled;
}

}  // namespace carillon
