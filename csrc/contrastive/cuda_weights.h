// Backward pass: the derivative of the loss by each logit of a block of pairs, in the features'
// type, and its sums with the products, which are the derivatives by scale and bias.
//
// Softmax form: 2^(p - row_lse) * g_row + 2^(p - column_lse) * g_column. Where all log-sum-exps lie
// in kWidestRange of each other one shift stands in for them: 2^(p - shift) * (row_factor +
// column_factor), one exponential a pair; `fill_factors` (cuda_backward.cu) computes the factors.
#pragma once

#include "cuda_lanes.h"
#include "cuda_tile.h"

namespace carillon::contrastive {

// Where the weights of a block of pairs go.
struct WeightsTo {
  void* weights;    // whole tiles, `width` values a row; past the edges zeros
  int64_t width;    // a multiple of the tile
  float* weighted;  // sums of weight * product, one of each multiplying warp of the grid
  float* total;     // sums of weights likewise; null in the softmax form
};

// The shift of all log-sum-exps, in powers of two, or whether there is none.
struct SharedShift {
  float shift;
  int is_shared;
};

struct SoftmaxWeightsArguments {
  PairArguments pairs;
  BackwardPlan plan;
  WeightsTo to;
  const SharedShift* shared;
  const float* row_factor;
  const float* column_factor;
  const float* row_lse;
  const float* column_lse;
  const float* row_lse_grad;
  const float* column_lse_grad;
  const float* positive_grad;
  const float* row_sum_grad;  // null where no sums were asked for
  const float* column_sum_grad;
};

struct SigmoidWeightsArguments {
  PairArguments pairs;
  BackwardPlan plan;
  WeightsTo to;
  const float* row_loss_grad;
};

// A log-sum-exp in powers of two, if its sum has a gradient and any terms.
CARILLON_HOST_DEVICE bool has_power(float lse, float grad) {
  return grad != 0.0f && lse - lse == 0.0f;
}

// Of all log-sum-exps with a gradient, in powers of two; where there are none any shift will do.
CARILLON_HOST_DEVICE SharedShift shared_shift_of(float least, float most) {
  if (most < least) return {0.0f, 1};
  return {(least + most) / 2, most - least <= kWidestRange};
}

// A row's or a column's factor beside 2^(p - shift). One whose terms are all left out has none.
CARILLON_HOST_DEVICE float factor_of(float lse, float grad, float shift) {
  if (grad == 0.0f || lse == kNothing) return 0.0f;
  return grad * power_of_two(shift - lse * kLog2E);
}

// The same term without a shared shift. Only what has no gradient can be far above its sum: it is
// cut, so that nothing becomes infinite.
CARILLON_HOST_DEVICE float term_of(float power, float lse, float grad) {
  if (grad == 0.0f || lse == kNothing) return 0.0f;
  const float above = power - lse * kLog2E;
  return grad * power_of_two(above > kLargestPower ? kLargestPower : above);
}

// Weights are computed and written by groups of 32 columns, so that few are in registers beside the
// products that are still to come.
constexpr int kGroupColumns = 32;
constexpr int kGroupRegisters = kRegisters * kGroupColumns / kTileColumns;

// Writes one group. bfloat16 goes by 16 bytes, which a quad's four lanes first hand each other: 64
// bytes of a row at once, whole sectors.
template <class Threads>
CARILLON_HOST_DEVICE void write_group(Threads& threads, int group,
                                      const float (&weights)[kGroupRegisters],
                                      const BackwardPlan& plan, const WeightsTo& to, int64_t row,
                                      int64_t column) {
  CARILLON_UNROLL
  for (int k = 0; k < 2; ++k) {
    const int64_t line = row - plan.row_begin + hopper::row_of(threads.thread, 2 * k);
    auto* values = static_cast<typename Threads::Element*>(to.weights) + line * to.width +
                   (column - plan.column_begin) + group * kGroupColumns;
    if constexpr (sizeof(typename Threads::Element) == 2) {
      uint32_t words[4];
      CARILLON_UNROLL
      for (int i = 0; i < 4; ++i) {
        words[i] = pack_bfloat16(weights[i * 4 + 2 * k], weights[i * 4 + 2 * k + 1]);
      }
      transpose_quad(threads, words);
      threads.store(values + threads.thread % 4 * 8, words);
    } else {
      CARILLON_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int r = i * 4 + 2 * k;
        threads.store(values + hopper::column_of(threads.thread, r), weights[r], weights[r + 1]);
      }
    }
  }
}

// What both forms have in common: a unit is one tile, whose weights Form::weigh computes, and a
// warp's sums are written once.
template <class Threads, class Form>
class PairWeights {
 public:
  using Arguments = typename Form::Arguments;

  CARILLON_HOST_DEVICE PairWeights(Threads& threads, const Arguments& arguments, int block,
                                   int group)
      : threads_(threads),
        of_(arguments),
        warp_((block * kGroups + group) * kWarps + threads.thread / 32) {}

  CARILLON_HOST_DEVICE void start_unit(int) {}
  CARILLON_HOST_DEVICE void end_unit(int64_t) {}

  CARILLON_HOST_DEVICE void add_tile(float (&dots)[kRegisters], int64_t row, int64_t column) {
    const Form form(of_, TileAt(of_.pairs, row, column), threads_.thread);
    CARILLON_UNROLL
    for (int group = 0; group < kTileColumns / kGroupColumns; ++group) {
      float weights[kGroupRegisters];
      if (form.is_plain) {
        CARILLON_UNROLL
        for (int r = 0; r < kGroupRegisters; ++r) {
          const int reg = group * kGroupRegisters + r;
          weights[r] = form.weigh_plainly(dots[reg], reg);
        }
      } else {
        CARILLON_UNROLL
        for (int r = 0; r < kGroupRegisters; ++r) {
          const int reg = group * kGroupRegisters + r;
          weights[r] = form.weigh(dots[reg], reg);
        }
      }
      float weighted = 0.0f, total = 0.0f;
      CARILLON_UNROLL
      for (int r = 0; r < kGroupRegisters; ++r) {
        weighted += weights[r] * dots[group * kGroupRegisters + r];
        total += weights[r];
      }
      weighted_ += weighted;
      total_ += total;
      write_group(threads_, group, weights, of_.plan, of_.to, row, column);
    }
  }

  CARILLON_HOST_DEVICE void finish() {
    const float weighted = over_warp(threads_, weighted_, Add{});
    const float total = over_warp(threads_, total_, Add{});
    if (threads_.thread % 32 != 0) return;
    of_.to.weighted[warp_] = weighted;
    if (of_.to.total != nullptr) of_.to.total[warp_] = total;
  }

 private:
  Threads& threads_;
  const Arguments& of_;
  int warp_;
  float weighted_ = 0.0f;
  float total_ = 0.0f;
};

// The weights of one tile, as one thread computes them; `weigh_plainly` where nothing is left out,
// nothing matches and log-sum-exps share a shift.
struct SoftmaxForm {
  using Arguments = SoftmaxWeightsArguments;

  CARILLON_HOST_DEVICE SoftmaxForm(const Arguments& arguments, const TileAt& at, int number)
      : of(arguments),
        tile(at),
        thread(number),
        shared(*arguments.shared),
        factor(arguments.pairs.scale[0] * kLog2E) {
    is_plain = tile.is_whole() && tile.match == kNoMatch && shared.is_shared &&
               of.row_sum_grad == nullptr;
    for (int k = 0; k < 2; ++k) {
      const int i = hopper::row_of(thread, 2 * k);
      row_factors[k] = i < tile.num_rows ? of.row_factor[tile.row + i] : 0.0f;
    }
  }

  CARILLON_HOST_DEVICE float weigh_plainly(float dot, int reg) const {
    const float of_column = of.column_factor[tile.column + hopper::column_of(thread, reg)];
    return power_of_two(smaller(dot * factor - shared.shift, kLargestPower)) *
           (row_factors[reg / 2 % 2] + of_column);
  }

  CARILLON_HOST_DEVICE float weigh(float dot, int reg) const {
    const int i = hopper::row_of(thread, reg), j = hopper::column_of(thread, reg);
    if (!tile.is_kept(i, j, tile.row_id(i))) return 0.0f;
    if (shared.is_shared) return weigh_plainly(dot, reg) + other_terms(i, j);
    const int64_t row = tile.row + i, column = tile.column + j;
    return term_of(dot * factor, of.row_lse[row], of.row_lse_grad[row]) +
           term_of(dot * factor, of.column_lse[column], of.column_lse_grad[column]) +
           other_terms(i, j);
  }

  CARILLON_HOST_DEVICE float other_terms(int i, int j) const {
    const float match = tile.matches(i, j) ? of.positive_grad[tile.row + i] : 0.0f;
    if (of.row_sum_grad == nullptr) return match;
    return of.row_sum_grad[tile.row + i] + of.column_sum_grad[tile.column + j] + match;
  }

  const Arguments& of;
  TileAt tile;
  int thread;
  SharedShift shared;
  float factor;
  float row_factors[2];
  bool is_plain;
};

struct SigmoidForm {
  using Arguments = SigmoidWeightsArguments;

  CARILLON_HOST_DEVICE SigmoidForm(const Arguments& arguments, const TileAt& at, int number)
      : tile(at),
        thread(number),
        scale(arguments.pairs.scale[0]),
        bias(arguments.pairs.bias[0]),
        is_plain(at.is_whole() && at.match == kNoMatch) {
    for (int k = 0; k < 2; ++k) {
      const int i = hopper::row_of(thread, 2 * k);
      grads[k] = i < tile.num_rows ? arguments.row_loss_grad[tile.row + i] : 0.0f;
    }
  }

  CARILLON_HOST_DEVICE float weigh_plainly(float dot, int reg) const {
    return grads[reg / 2 % 2] * sigmoid(dot * scale + bias);
  }

  CARILLON_HOST_DEVICE float weigh(float dot, int reg) const {
    const int i = hopper::row_of(thread, reg), j = hopper::column_of(thread, reg);
    if (!tile.is_kept(i, j, tile.row_id(i))) return 0.0f;
    if (!tile.matches(i, j)) return weigh_plainly(dot, reg);
    return -grads[reg / 2 % 2] * sigmoid(-(dot * scale + bias));
  }

  TileAt tile;
  int thread;
  float scale;
  float bias;
  float grads[2];
  bool is_plain;
};

template <class Threads>
using SoftmaxWeights = PairWeights<Threads, SoftmaxForm>;
template <class Threads>
using SigmoidWeights = PairWeights<Threads, SigmoidForm>;

}  // namespace carillon::contrastive
