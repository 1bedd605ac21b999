// Forward pass, sigmoid form: per row the sum of softplus(-z l), z being -1 but for its match.
#pragma once

#include "cuda_lanes.h"
#include "cuda_tile.h"

namespace carillon::contrastive {

struct SigmoidArguments {
  PairArguments pairs;
  ForwardPlan plan;
  float* row_losses;  // (column groups, N), every one written
};

template <class Threads>
class SigmoidLosses {
 public:
  using Arguments = SigmoidArguments;

  CARILLON_HOST_DEVICE SigmoidLosses(Threads& threads, const Arguments& arguments, int, int)
      : threads_(threads),
        of_(arguments),
        scale_(arguments.pairs.scale[0]),
        bias_(arguments.pairs.bias[0]) {}

  CARILLON_HOST_DEVICE void start_unit(int unit) {
    unit_ = unit;
    losses_[0] = losses_[1] = 0.0f;
  }

  // A tile is summed by itself first: one sum of all columns' losses would round away the last.
  CARILLON_HOST_DEVICE void add_tile(float (&dots)[kRegisters], int64_t row, int64_t column) {
    float losses[2] = {0.0f, 0.0f};
    sum_tile(dots, TileAt(of_.pairs, row, column), losses);
    losses_[0] += losses[0];
    losses_[1] += losses[1];
  }

  CARILLON_HOST_DEVICE void end_unit(int64_t row) {
    CARILLON_UNROLL
    for (int k = 0; k < 2; ++k) {
      const float loss = over_quad(threads_, losses_[k], Add{});
      const int64_t at = row + hopper::row_of(threads_.thread, 2 * k);
      if (threads_.thread % 4 != 0 || at >= of_.pairs.num_rows) continue;
      of_.row_losses[of_.plan.column_group(unit_) * of_.pairs.num_rows + at] = loss;
    }
  }

  CARILLON_HOST_DEVICE void finish() {}

 private:
  CARILLON_HOST_DEVICE void sum_tile(const float (&dots)[kRegisters], const TileAt& tile,
                                     float (&losses)[2]) {
    if (tile.is_whole() && tile.match == kNoMatch) {
      CARILLON_UNROLL
      for (int r = 0; r < kRegisters; ++r) {
        losses[r / 2 % 2] += softplus(dots[r] * scale_ + bias_);
      }
      return;
    }
    const int64_t ids[2] = {tile.row_id(hopper::row_of(threads_.thread, 0)),
                            tile.row_id(hopper::row_of(threads_.thread, 2))};
    CARILLON_UNROLL
    for (int r = 0; r < kRegisters; ++r) {
      const int i = hopper::row_of(threads_.thread, r), j = hopper::column_of(threads_.thread, r);
      const float logit = dots[r] * scale_ + bias_;
      const float loss = softplus(tile.matches(i, j) ? -logit : logit);
      losses[r / 2 % 2] += tile.is_kept(i, j, ids[r / 2 % 2]) ? loss : 0.0f;
    }
  }

  Threads& threads_;
  const Arguments& of_;
  float scale_;
  float bias_;
  int unit_ = 0;
  float losses_[2] = {0.0f, 0.0f};
};

}  // namespace carillon::contrastive
