// The choice of experts by a group of lanes, lane by lane and step by step as the kernel does it,
// against a stable sort.
#include "expect.h"
#include "moe_routing/topk_lane.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

namespace {

using namespace carillon::moe_routing;

// Every lane passes its best on: the exchange with lane ^ step that the shuffles make.
std::vector<int64_t> exchanged(std::vector<int64_t> keys) {
  const int lanes = static_cast<int>(keys.size());
  for (int step = lanes / 2; step > 0; step /= 2) {
    std::vector<int64_t> other(keys.size());
    for (int lane = 0; lane < lanes; ++lane) other[lane] = keys[lane ^ step];
    for (int lane = 0; lane < lanes; ++lane) keys[lane] = std::max(keys[lane], other[lane]);
  }
  return keys;
}

template <int kLanes, int kValues>
std::vector<int> chosen_by_lanes(const std::vector<float>& values, int k) {
  const int num_experts = static_cast<int>(values.size());
  std::vector<TopkLane<kLanes, kValues>> lanes(kLanes);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int v = 0; v < kValues; ++v) {
      const int expert = TopkLane<kLanes, kValues>::expert(lane, v);
      const bool is_expert = expert < num_experts;
      lanes[lane].set(v, is_expert, is_expert ? values[expert] : 0.0f);
    }
  }
  for (int j = 0; j < k; ++j) {
    std::vector<int64_t> keys(kLanes);
    for (int lane = 0; lane < kLanes; ++lane) keys[lane] = lanes[lane].best(lane);
    keys = exchanged(keys);
    for (int lane = 0; lane < kLanes; ++lane) {
      EXPECT_EQUAL(keys[lane], keys[0]);
      lanes[lane].take(lane, expert_of(keys[lane]), j);
    }
  }
  // What a lane holds says where it writes: each of the k places once.
  std::vector<int> chosen(k, -1);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int v = 0; v < kValues; ++v) {
      const int rank = lanes[lane].ranks[v];
      if (rank < 0) continue;
      EXPECT_EQUAL(chosen.at(rank), -1);
      chosen.at(rank) = TopkLane<kLanes, kValues>::expert(lane, v);
    }
  }
  return chosen;
}

std::vector<int> chosen_by_sort(const std::vector<float>& values, int k) {
  std::vector<int> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    if (std::isnan(values[a]) || std::isnan(values[b])) {
      return !std::isnan(values[a]) && std::isnan(values[b]);
    }
    return values[a] > values[b];
  });
  order.resize(k);
  return order;
}

template <int kLanes, int kValues>
void check_group(std::mt19937& generator) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float special[] = {0.0f,     -0.0f,     1.0f, 1.0f, -1.0f,
                           infinity, -infinity, std::nanf(""), 1e-40f, -3e38f};
  const int most = kLanes * kValues;
  for (const int num_experts : {1, 2, most / 2 + 1, most - 1, most}) {
    if (num_experts < 1) continue;
    for (int trial = 0; trial < 6; ++trial) {
      std::vector<float> values(num_experts);
      for (float& value : values) {
        value = trial % 2 == 0 ? special[generator() % std::size(special)]
                               : static_cast<float>(generator() % 1000) - 500.0f;
      }
      for (const int k : {1, std::min(3, num_experts), num_experts}) {
        const std::vector<int> got = chosen_by_lanes<kLanes, kValues>(values, k);
        const std::vector<int> wanted = chosen_by_sort(values, k);
        for (int j = 0; j < k; ++j) EXPECT_EQUAL(got[j], wanted[j]);
      }
    }
  }
}

}  // namespace

int main() {
  std::mt19937 generator(0);
  check_group<8, 1>(generator);
  check_group<16, 4>(generator);
  check_group<32, 8>(generator);
  check_group<32, 16>(generator);
  return carillon::test::report();
}
