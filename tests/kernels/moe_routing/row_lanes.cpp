// Which thread of which block touches which vector of which row: each once, none outside.
#include "expect.h"
#include "moe_routing/row_lanes.h"

#include <cstdint>
#include <vector>

namespace {

using namespace carillon::moe_routing;

void check_cover(int64_t num_rows, int64_t num_vectors) {
  const int lanes = lanes_of_row(num_vectors);
  EXPECT_EQUAL(lanes >= 1 && lanes <= kRowThreads && (lanes & (lanes - 1)) == 0, true);
  EXPECT_EQUAL(num_vectors <= 1 || lanes < 2 * num_vectors, true);
  std::vector<int> touched(num_rows * num_vectors, 0);
  for (int64_t block = 0; block < blocks_of_rows(num_rows, lanes); ++block) {
    for (int thread = 0; thread < kRowThreads; ++thread) {
      const int64_t row = row_of_thread(block, thread, lanes);
      if (row >= num_rows) continue;
      for (int64_t v = thread % lanes; v < num_vectors; v += lanes) {
        ++touched.at(row * num_vectors + v);
      }
    }
  }
  for (const int times : touched) EXPECT_EQUAL(times, 1);
}

}  // namespace

int main() {
  for (const int64_t num_rows : {0, 1, 3, 64, 257}) {
    for (const int64_t num_vectors : {0, 1, 2, 3, 31, 64, 100, 256, 300, 1000}) {
      check_cover(num_rows, num_vectors);
    }
  }
  EXPECT_EQUAL(row_or_none(-1, 4), -1);
  EXPECT_EQUAL(row_or_none(INT32_MIN, 4), -1);
  EXPECT_EQUAL(row_or_none(4, 4), -1);
  EXPECT_EQUAL(row_or_none(3, 4), 3);
  EXPECT_EQUAL(row_or_none(0, 0), -1);
  EXPECT_EQUAL(is_padding(-1), true);
  EXPECT_EQUAL(is_padding(0), false);
  // float32 and bfloat16: whole rows and aligned pointers, or one value at a time.
  EXPECT_EQUAL(values_of_vector(12, 4, 0x40), 4);
  EXPECT_EQUAL(values_of_vector(12, 2, 0x40), 1);
  EXPECT_EQUAL(values_of_vector(16, 2, 0x40), 8);
  EXPECT_EQUAL(values_of_vector(16, 2, 0x40 | 0x48), 1);
  EXPECT_EQUAL(values_of_vector(13, 4, 0x40), 1);
  return carillon::test::report();
}
