// What one lane of a group of lanes does to choose a token's experts, and tests on the CPU too.
//
// A group of kLanes lanes holds a token's values: lane l those of the experts l, l + kLanes, ...
// The next best is the largest key of the lanes' best ones; it is unique, so its lane knows itself.
#pragma once

#include "host_device.h"

#include <cstdint>
#include <cstring>

namespace carillon::moe_routing {

// Below every value's order; what is taken, or is no expert.
inline constexpr int32_t kNoOrder = INT32_MIN;

// Order-preserving bits of a float: -0 and 0 are one value, a NaN is below all numbers.
CARILLON_HOST_DEVICE int32_t order_of(float value) {
  if (value != value) return kNoOrder + 1;
  const float one_zero = value + 0.0f;
  int32_t bits;
  memcpy(&bits, &one_zero, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Larger for a larger value, then for a lower expert.
CARILLON_HOST_DEVICE int64_t key_of(int32_t order, int32_t expert) {
  return int64_t{order} * (int64_t{1} << 32) + (0x7fffffff - expert);
}

CARILLON_HOST_DEVICE int32_t expert_of(int64_t key) {
  return 0x7fffffff - static_cast<int32_t>(key & 0x7fffffff);
}

template <int kLanes, int kValues>
struct TopkLane {
  int32_t orders[kValues];
  int32_t ranks[kValues];  // among the chosen, -1 for the others

  static CARILLON_HOST_DEVICE int32_t expert(int lane, int value) { return value * kLanes + lane; }

  CARILLON_HOST_DEVICE void set(int value, bool is_expert, float by) {
    orders[value] = is_expert ? order_of(by) : kNoOrder;
    ranks[value] = -1;
  }

  // The key of this lane's best; below every expert's key where none is left.
  CARILLON_HOST_DEVICE int64_t best(int lane) const {
    int32_t order = orders[0], at = 0;
    for (int v = 1; v < kValues; ++v) {
      if (orders[v] > order) {
        order = orders[v];
        at = v;
      }
    }
    return key_of(order, expert(lane, at));
  }

  // Takes the expert out and notes its rank where it is this lane's.
  CARILLON_HOST_DEVICE void take(int lane, int32_t chosen, int32_t rank) {
    for (int v = 0; v < kValues; ++v) {
      if (expert(lane, v) == chosen) {
        orders[v] = kNoOrder;
        ranks[v] = rank;
      }
    }
  }
};

}  // namespace carillon::moe_routing
