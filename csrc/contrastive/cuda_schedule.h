// Which tiles of the logits a thread block computes, in which order, and where its sums go.
//
// Forward: a unit is one row tile by a group of column tiles. Blocks take units in turn, row tiles
// first, so that all of them read the same columns at about one time, from the second-level cache.
// What a unit's rows sum to is written once; what columns sum to is kept per block and warpgroup,
// in memory that nobody else writes, so there are no atomics and results repeat.
// Backward: a block of pairs is tiles in bands of kBandTiles row tiles, column by column.
#pragma once

#include "host_device.h"
#include "hopper_layout.h"

#include <algorithm>
#include <cstdint>

namespace carillon::contrastive {

constexpr int kGroups = 2;  // warpgroups that multiply, one above the other
constexpr int kTileRows = kGroups * hopper::kGroupRows;
constexpr int kTileColumns = 256;
constexpr int kRegisters = hopper::kGroupRows * kTileColumns / hopper::kGroupThreads;
constexpr int kBandTiles = 12;  // 132 tiles at once are about 12 row tiles by 11 column tiles

// Column tiles [column_begin, column_end) of one row tile.
struct Unit {
  int row_tile;
  int column_begin;
  int column_end;
};

struct ForwardPlan {
  int row_tiles;
  int column_tiles;
  int group_tiles;  // column tiles of a group
  int column_groups;
  int grid;

  CARILLON_HOST_DEVICE int64_t first_row() const { return 0; }
  CARILLON_HOST_DEVICE int64_t first_column() const { return 0; }
  CARILLON_HOST_DEVICE int num_units() const { return row_tiles * column_groups; }
  CARILLON_HOST_DEVICE int column_group(int unit) const { return unit / row_tiles; }

  CARILLON_HOST_DEVICE Unit unit(int unit) const {
    const int begin = column_group(unit) * group_tiles;
    const int end = begin + group_tiles;
    return {unit % row_tiles, begin, end < column_tiles ? end : column_tiles};
  }

  // Whether a block's earlier units, those `grid` apart, have not come to this column group.
  CARILLON_HOST_DEVICE bool is_first(int unit) const {
    return unit - grid < column_group(unit) * row_tiles;
  }

  // Whether a block has any unit of a column group.
  CARILLON_HOST_DEVICE bool touches(int block, int column_group) const {
    const int begin = column_group * row_tiles;
    const int ahead = (block - begin % grid + grid) % grid;  // from the group's first unit
    return ahead < row_tiles;
  }

  CARILLON_HOST_DEVICE int num_column_slots() const { return grid * kGroups; }
  CARILLON_HOST_DEVICE int column_slot(int block, int group) const {
    return block * kGroups + group;
  }
  CARILLON_HOST_DEVICE int column_group_of(int64_t column) const {
    return static_cast<int>(column / kTileColumns / group_tiles);
  }
};

inline int num_tiles(int64_t length, int64_t tile) {
  return static_cast<int>((length + tile - 1) / tile);
}

// Columns are split into groups only as far as that evens out the blocks' work: a group more is
// memory for the rows' sums, and shorter units, so it must save a twentieth.
inline ForwardPlan plan_forward(int64_t num_rows, int64_t num_columns, int num_processors) {
  const int row_tiles = num_tiles(num_rows, kTileRows);
  const int column_tiles = num_tiles(num_columns, kTileColumns);
  ForwardPlan best{row_tiles, column_tiles, column_tiles, 1, 0};
  int64_t least = 0;  // of no choice yet
  for (int groups = 1; groups <= std::min(column_tiles, num_processors); ++groups) {
    const int group_tiles = num_tiles(column_tiles, groups);
    const int used = num_tiles(column_tiles, group_tiles);
    const int64_t rounds = num_tiles(int64_t{row_tiles} * used, num_processors);
    const int64_t longest = rounds * group_tiles;  // tiles of the busiest block
    if (least != 0 && longest * 20 >= least * 19) continue;
    least = longest;
    best.group_tiles = group_tiles;
    best.column_groups = used;
  }
  best.grid = std::min(num_processors, best.num_units());
  return best;
}

struct BackwardPlan {
  int64_t row_begin;  // of the block of pairs, multiples of the tile
  int64_t column_begin;
  int row_tiles;
  int column_tiles;
  int grid;

  CARILLON_HOST_DEVICE int64_t first_row() const { return row_begin; }
  CARILLON_HOST_DEVICE int64_t first_column() const { return column_begin; }
  CARILLON_HOST_DEVICE int num_units() const { return row_tiles * column_tiles; }

  CARILLON_HOST_DEVICE Unit unit(int tile) const {
    const int band = tile / (kBandTiles * column_tiles);
    const int left = row_tiles - band * kBandTiles;
    const int height = left < kBandTiles ? left : kBandTiles;
    const int inside = tile - band * kBandTiles * column_tiles;
    const int column = inside / height;
    return {band * kBandTiles + inside % height, column, column + 1};
  }
};

inline BackwardPlan plan_backward(int64_t row_begin, int64_t num_rows, int64_t column_begin,
                                  int64_t num_columns, int num_processors) {
  BackwardPlan plan{row_begin, column_begin, num_tiles(num_rows, kTileRows),
                    num_tiles(num_columns, kTileColumns), 0};
  plan.grid = std::min(num_processors, plan.num_units());
  return plan;
}

// Calls visit(first row, first column) for each tile of a block, in order, and around those of a
// unit start(unit) and end(first row).
template <class Plan, class Start, class Visit, class End>
CARILLON_HOST_DEVICE void for_each_tile(const Plan& plan, int block, const Start& start,
                                        const Visit& visit, const End& end) {
  for (int number = block; number < plan.num_units(); number += plan.grid) {
    const Unit unit = plan.unit(number);
    const int64_t row = plan.first_row() + int64_t{unit.row_tile} * kTileRows;
    start(number);
    for (int tile = unit.column_begin; tile < unit.column_end; ++tile) {
      visit(row, plan.first_column() + int64_t{tile} * kTileColumns);
    }
    end(row);
  }
}

}  // namespace carillon::contrastive
