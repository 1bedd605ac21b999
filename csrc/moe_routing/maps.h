// The two maps of a plan, checked: rows and slots name each other, so every row of an output is
// written exactly once and nothing outside is read.
#pragma once

#include "check.h"

#include <ATen/Parallel.h>

#include <atomic>

namespace carillon::moe_routing {

struct Maps {
  at::Tensor rows_kept_alive;
  at::Tensor slots_kept_alive;
  const int32_t* row_to_slot;
  const int32_t* slot_to_row;
  int64_t num_rows;
  int64_t num_tokens;
  int64_t k;
};

inline constexpr int64_t kMapGrain = 16384;

inline Maps checked_maps(const char* op, const at::Tensor& row_to_slot,
                         const at::Tensor& slot_to_row) {
  check_maps(op, row_to_slot, slot_to_row);
  Maps maps{row_to_slot.contiguous(), slot_to_row.contiguous(), nullptr, nullptr,
            row_to_slot.size(0), slot_to_row.size(0), slot_to_row.size(1)};
  maps.row_to_slot = maps.rows_kept_alive.const_data_ptr<int32_t>();
  maps.slot_to_row = maps.slots_kept_alive.const_data_ptr<int32_t>();
  std::atomic<int64_t> num_kept = 0, num_filled = 0, wrong = -1;
  std::atomic<bool> inverse = true;
  at::parallel_for(0, maps.num_tokens * maps.k, kMapGrain, [&](int64_t begin, int64_t end) {
    int64_t kept = 0;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t row = maps.slot_to_row[s];
      if (row < -1 || row >= maps.num_rows) {
        wrong = s;
        return;
      }
      if (row == -1) continue;
      ++kept;
      if (maps.row_to_slot[row] != s) inverse = false;
    }
    num_kept += kept;
  });
  TORCH_CHECK_VALUE(wrong < 0, op, ": slot_to_row must be -1 or from 0 to ", maps.num_rows - 1,
                    ", got ", maps.slot_to_row[std::max<int64_t>(wrong, 0)]);
  at::parallel_for(0, maps.num_rows, kMapGrain, [&](int64_t begin, int64_t end) {
    int64_t filled = 0;
    for (int64_t r = begin; r < end; ++r) filled += maps.row_to_slot[r] != -1;
    num_filled += filled;
  });
  TORCH_CHECK_VALUE(inverse && num_kept == num_filled, op,
                    ": row_to_slot and slot_to_row must be each other's inverse, as moe_plan "
                    "gives them");
  return maps;
}

}  // namespace carillon::moe_routing
