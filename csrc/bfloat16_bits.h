// bfloat16 to and from float32 by integer arithmetic, in forms that loops vectorise over.
#pragma once

#include "cpu_dispatch.h"

#include <bit>
#include <cstdint>

namespace carillon {

CARILLON_INLINE float load_as_float(float value) { return value; }
CARILLON_INLINE float load_as_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Rounds to nearest even; a NaN stays one.
CARILLON_INLINE void store_from_float(float value, float& out) { out = value; }
CARILLON_INLINE void store_from_float(float value, uint16_t& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40;
  out = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
}

}  // namespace carillon
