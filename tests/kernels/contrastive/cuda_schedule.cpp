// Every tile is computed once, and every slot of a sum is written first and read after.
#include "contrastive/cuda_arithmetic.h"
#include "contrastive/cuda_schedule.h"
#include "contrastive/cuda_tile.h"
#include "expect.h"

#include <map>
#include <set>
#include <utility>
#include <vector>

using namespace carillon;
using namespace carillon::contrastive;

namespace {

template <class Plan>
void expect_every_tile_once(const Plan& plan) {
  std::map<std::pair<int64_t, int64_t>, int> times;
  for (int block = 0; block < plan.grid; ++block) {
    for_each_tile(
        plan, block, [](int) {},
        [&](int64_t row, int64_t column) { ++times[{row, column}]; }, [](int64_t) {});
  }
  EXPECT_EQUAL(times.size(), size_t(plan.row_tiles) * size_t(plan.column_tiles));
  for (const auto& [at, count] : times) {
    EXPECT_EQUAL(count, 1);
    EXPECT_EQUAL((at.first - plan.first_row()) % kTileRows, 0);
    EXPECT_EQUAL(at.first < plan.first_row() + int64_t{plan.row_tiles} * kTileRows, true);
    EXPECT_EQUAL(at.second < plan.first_column() + int64_t{plan.column_tiles} * kTileColumns, true);
  }
}

// What a block writes first to a slot of column sums it says to be first; what is never written it
// says not to touch.
void expect_slots_start_and_end_right(const ForwardPlan& plan) {
  std::set<std::pair<int, int64_t>> written;
  std::set<std::pair<int, int64_t>> row_slots;
  for (int block = 0; block < plan.grid; ++block) {
    int unit = 0;
    for_each_tile(
        plan, block, [&](int number) { unit = number; },
        [&](int64_t, int64_t column) {
          const bool is_new = written.insert({plan.column_slot(block, 0), column}).second;
          EXPECT_EQUAL(plan.is_first(unit), is_new);
          EXPECT_EQUAL(plan.column_group_of(column), plan.column_group(unit));
        },
        [&](int64_t row) {
          EXPECT_EQUAL(row_slots.insert({plan.column_group(unit), row}).second, true);
        });
  }
  EXPECT_EQUAL(row_slots.size(), size_t(plan.row_tiles) * size_t(plan.column_groups));
  std::set<int> slots;
  for (int block = 0; block < plan.grid; ++block) {
    for (int group = 0; group < kGroups; ++group) slots.insert(plan.column_slot(block, group));
    for (int tile = 0; tile < plan.column_tiles; ++tile) {
      const int64_t column = int64_t{tile} * kTileColumns;
      const bool touches = plan.touches(block, plan.column_group_of(column));
      EXPECT_EQUAL(touches, written.count({plan.column_slot(block, 0), column}) == 1);
    }
  }
  EXPECT_EQUAL(int(slots.size()), plan.num_column_slots());
  EXPECT_EQUAL(*slots.rbegin(), plan.num_column_slots() - 1);
}

void sizes() {
  for (const int64_t n : {1, 127, 128, 129, 700, 2000, 5000}) {
    for (const int64_t m : {1, 255, 257, 1000, 9000}) {
      for (const int processors : {1, 3, 7, 132}) {
        const ForwardPlan plan = plan_forward(n, m, processors);
        EXPECT_EQUAL(plan.grid <= processors && plan.grid >= 1, true);
        expect_every_tile_once(plan);
        expect_slots_start_and_end_right(plan);
        expect_every_tile_once(plan_backward(256, n, 512, m, processors));
      }
    }
  }
}

// The size of the bar: rows fill the chip, so columns stay whole; few rows are split by columns.
void work_is_even() {
  const ForwardPlan square = plan_forward(32768, 32768, 132);
  EXPECT_EQUAL(square.column_groups, 1);
  EXPECT_EQUAL(square.grid, 132);
  EXPECT_EQUAL(plan_forward(128, 1 << 20, 132).grid >= 120, true);
  const ForwardPlan odd = plan_forward(20000, 20000, 132);
  const int64_t units = odd.num_units();
  const int64_t longest = (units + odd.grid - 1) / odd.grid * odd.group_tiles;
  EXPECT_EQUAL(longest * odd.grid * 9 < int64_t{odd.row_tiles} * odd.column_tiles * 10, true);
}

void matches_and_edges() {
  std::vector<int64_t> row_ids(100, 7), column_ids(300, 7);
  for (const int64_t first_column : {-100, -40, 0, 3, 250, 299, 300}) {
    const PairArguments pairs{100, 300, first_column, nullptr, nullptr, row_ids.data(),
                              column_ids.data()};
    int num_matches = 0, num_kept = 0;
    for (int64_t row = 0; row < 128; row += 64) {
      for (int64_t column = 0; column < 512; column += 256) {
        const TileAt tile(pairs, row, column);
        for (int i = 0; i < 64; ++i) {
          for (int j = 0; j < kTileColumns; ++j) {
            const bool is_match = tile.match != kNoMatch && tile.matches(i, j) &&
                                  tile.is_inside(i, j);
            const bool is_wanted = column + j == row + i + first_column && row + i < 100 &&
                                   column + j < 300;
            EXPECT_EQUAL(is_match, is_wanted);
            num_matches += is_match;
            num_kept += tile.is_kept(i, j, tile.row_id(i));
          }
        }
      }
    }
    int64_t wanted = 0;
    for (int64_t i = 0; i < 100; ++i) wanted += i + first_column >= 0 && i + first_column < 300;
    EXPECT_EQUAL(num_matches, wanted);
    EXPECT_EQUAL(num_kept, wanted);  // all ids are equal: only matches are kept
  }
}

void totals_merge_as_sums_do() {
  long double exact = 0.0L;
  Total all;
  for (int k = 0; k < 200; ++k) {
    const Total one{static_cast<float>(k * 37 % 101 - 50), 1.0f + static_cast<float>(k % 7)};
    exact += std::exp2(static_cast<long double>(one.shift)) * one.total;
    all = merge(all, one);
    all = merge(Total{}, all);
  }
  const float wanted = static_cast<float>(std::log(exact));
  EXPECT_EQUAL(std::abs(log_of(all) - wanted) < 1e-5f * wanted, true);
  EXPECT_EQUAL(log_of(merge(Total{}, Total{})), kNothing);
  for (const Total& one : {merge({0.0f, 0.0f}, {-200.0f, 1.0f}), merge({-200.0f, 1.0f}, {})}) {
    EXPECT_EQUAL(one.shift, -200.0f);
    EXPECT_EQUAL(one.total, 1.0f);
  }
  const Total odd = merge(all, {std::nanf(""), 1.0f});
  EXPECT_EQUAL(std::isnan(log_of(odd)), true);
}

void softplus_is_exact() {
  for (float x = -60.0f; x < 60.0f; x += 0.37f) {
    const double wanted = std::log1p(std::exp(-std::abs(double{x}))) + std::max(double{x}, 0.0);
    // exp inherits the rounding of an argument of up to 60 * log2(e).
    EXPECT_EQUAL(std::abs(softplus(x) - wanted) <= 1e-5 * wanted, true);
  }
}

}  // namespace

int main() {
  sizes();
  work_is_even();
  matches_and_edges();
  totals_merge_as_sums_do();
  softplus_is_exact();
  return test::report();
}
