// Rounding of sizes.
#pragma once

#include <cstdint>

namespace carillon {

inline constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace carillon
