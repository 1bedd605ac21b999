// The arithmetic of fp8_cast on one value: scales from magnitudes, and codes from values.
//
// Everything is branch-free on 32-bit lanes, so that loops over these functions vectorise for
// whatever instruction set they are compiled.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace carillon::fp8_cast {

// Formats of arXiv 2209.05433. kMagic + |value| rounds a value below kMinNormal to a multiple of
// the smallest subnormal: kMagic's last bit is worth just that.
struct E4m3 {
  static constexpr int kMantissaBits = 3;
  static constexpr int kBias = 7;
  static constexpr float kMax = 448.0f;
  static constexpr float kMinNormal = 0x1p-6f;
  static constexpr float kMagic = 0x1p14f;
};

struct E5m2 {
  static constexpr int kMantissaBits = 2;
  static constexpr int kBias = 15;
  static constexpr float kMax = 57344.0f;
  static constexpr float kMinNormal = 0x1p-14f;
  static constexpr float kMagic = 0x1p7f;
};

inline constexpr uint32_t kInfinity = 0x7f800000;

// Bits of an input value: bfloat16 is the upper half of a float.
inline float to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
inline float to_float(uint32_t bits) { return std::bit_cast<float>(bits); }

template <typename Bits>
inline constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
template <typename Bits>
inline constexpr Bits kInfiniteBits = static_cast<Bits>(kInfinity >> (32 - 8 * sizeof(Bits)));

// Magnitudes of floats order as their bits do, NaN above infinity above all others.
template <typename Bits>
inline Bits magnitude(Bits bits) {
  return static_cast<Bits>(bits & kMagnitude<Bits>);
}

template <typename Bits>
inline Bits finite_magnitude(Bits bits) {
  const Bits value = magnitude(bits);
  return value < kInfiniteBits<Bits> ? value : Bits{0};
}

// Comparisons are of bits and not of floats: they become one minimum or one mask, and NaN, whose bits
// are above all others, is put right at the end.
template <typename Format>
inline uint8_t encode(float value) {
  constexpr int kShift = 23 - Format::kMantissaBits;
  constexpr uint32_t kRebias = uint32_t{127 - Format::kBias} << 23;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t unlimited = bits & 0x7fffffff;
  const uint32_t size = std::min(unlimited, std::bit_cast<uint32_t>(Format::kMax));
  const uint32_t odd = (size >> kShift) & 1;
  const uint32_t normal = (size - kRebias + (1u << (kShift - 1)) - 1 + odd) >> kShift;
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(size) + Format::kMagic) -
      std::bit_cast<uint32_t>(Format::kMagic);
  uint32_t code = size < std::bit_cast<uint32_t>(Format::kMinNormal) ? subnormal : normal;
  code = unlimited > kInfinity ? 0x7f : code;
  return static_cast<uint8_t>(code | ((bits >> 24) & 0x80));
}

// The scale of a group whose largest finite magnitude is amax.
inline float scale_from_amax(float amax, float fp8_max, bool power_of_two) {
  if (amax == 0.0f) return 1.0f;
  float scale = amax / fp8_max;
  if (scale < 0x1p-126f) scale = 0x1p-126f;
  if (!power_of_two) return scale;
  return std::bit_cast<float>((std::bit_cast<uint32_t>(scale) + 0x7fffff) & kInfinity);
}

}  // namespace carillon::fp8_cast
