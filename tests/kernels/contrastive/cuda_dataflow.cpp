// The CUDA kernels' whole data flow on the CPU: the plan's tiles in its order, boxes copied with
// the swizzle, products through descriptors, what follows in the registers of 128 threads, and the
// sums of what they left; against the definition in double precision.
#include "contrastive/cuda_product.h"
#include "contrastive/cuda_reduce.h"
#include "contrastive/cuda_sigmoid.h"
#include "contrastive/cuda_weights.h"
#include "contrastive/tensor_core.h"
#include "contrastive/warpgroup.h"
#include "expect.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <tuple>
#include <type_traits>
#include <vector>

using namespace carillon;
using namespace carillon::contrastive;

namespace {

constexpr int kProcessors = 2;
constexpr int kStepDims = 64;

struct Problem {
  int64_t n, m, d;
  int64_t first_column = 0;
  float scale = 14.0f;
  float bias = -3.0f;
  bool with_ids = false;
  bool with_sums = false;
  float spread = 1.0f;  // of the rows' sizes: row i is `spread`^(i % 3) long
  bool opposed = false;
};

struct Data {
  Problem of;
  std::vector<uint16_t> rows_bits, columns_bits;
  std::vector<float> rows, columns;
  std::vector<int64_t> row_ids, column_ids;
  std::vector<float> row_grad, column_grad, positive_grad, row_sum_grad, column_sum_grad;
  // Products by either path, which all kernels start from: by path, group, row and column.
  mutable std::map<std::tuple<bool, int, int64_t, int64_t>, std::vector<float>> products;

  explicit Data(const Problem& problem) : of(problem) {
    std::mt19937 random(static_cast<unsigned>(of.n * 1000 + of.m));
    std::normal_distribution<float> normal;
    const auto fill = [&](int64_t count, std::vector<uint16_t>& bits, std::vector<float>& values,
                          float spread) {
      for (int64_t i = 0; i < count; ++i) {
        const float size = std::pow(spread, static_cast<float>(i % 3)) / std::sqrt(float(of.d));
        for (int64_t k = 0; k < of.d; ++k) {
          bits.push_back(static_cast<uint16_t>(pack_bfloat16(normal(random) * size, 0.0f)));
          values.push_back(test::from_bfloat16(bits.back()));
        }
      }
    };
    fill(of.n, rows_bits, rows, of.spread);
    fill(of.m, columns_bits, columns, 1.0f);
    if (of.opposed) {  // all rows one way, all columns the other
      const auto set = [](std::vector<uint16_t>& bits, std::vector<float>& values, float value) {
        const auto one = static_cast<uint16_t>(pack_bfloat16(value, 0.0f));
        std::fill(bits.begin(), bits.end(), one);
        std::fill(values.begin(), values.end(), test::from_bfloat16(one));
      };
      set(rows_bits, rows, 0.35f);
      set(columns_bits, columns, -0.35f);
    }
    const auto grads = [&](int64_t count) {
      std::vector<float> values(count);
      for (float& value : values) value = normal(random);
      return values;
    };
    row_grad = grads(of.n);
    column_grad = grads(of.m);
    positive_grad = grads(of.n);
    row_sum_grad = grads(of.n);
    column_sum_grad = grads(of.m);
    for (int64_t i = 0; i < of.n; ++i) row_ids.push_back(int64_t(random() % 40) - 2);
    for (int64_t j = 0; j < of.m; ++j) column_ids.push_back(int64_t(random() % 40) - 2);
  }

  PairArguments pairs(bool with_bias) const {
    return {of.n,
            of.m,
            of.first_column,
            &of.scale,
            with_bias ? &of.bias : nullptr,
            of.with_ids ? row_ids.data() : nullptr,
            of.with_ids ? column_ids.data() : nullptr};
  }

  double dot(int64_t i, int64_t j) const {
    double sum = 0.0;
    for (int64_t k = 0; k < of.d; ++k) sum += double{rows[i * of.d + k]} * columns[j * of.d + k];
    return sum;
  }
  bool matches(int64_t i, int64_t j) const { return j == i + of.first_column; }
  bool is_kept(int64_t i, int64_t j) const {
    return !of.with_ids || row_ids[i] < 0 || row_ids[i] != column_ids[j] || matches(i, j);
  }
};

// Accumulators of both warpgroups' tiles at (row, column), by bfloat16's path.
std::vector<float> tensor_core_products(const Data& data, int64_t row, int64_t column, int group) {
  constexpr uint32_t rows_at = 1024, columns_at = rows_at + kTileRows * 128;
  test::SharedBytes shared{std::vector<uint8_t>(columns_at + kTileColumns * 128)};
  std::vector<float> registers(128 * kRegisters, 1e30f);
  for (int64_t dim = 0; dim < data.of.d; dim += kStepDims) {
    shared.copy_box(rows_at, data.rows_bits, data.of.n, data.of.d, dim, row, kStepDims, kTileRows);
    shared.copy_box(columns_at, data.columns_bits, data.of.m, data.of.d, dim, column, kStepDims,
                    kTileColumns);
    for (int k = 0; k < kStepDims / hopper::kInstructionDims; ++k) {
      const uint32_t offset = k * hopper::kInstructionDims * 2;
      const uint32_t group_at = group * hopper::kGroupRows * hopper::kSwizzleBytes;
      test::multiply_64x256x16(shared, hopper::operand_descriptor(rows_at + group_at + offset),
                               hopper::operand_descriptor(columns_at + offset), dim > 0 || k > 0,
                               registers);
    }
  }
  return registers;
}

// The same by float32's path.
std::vector<float> float_products(const Data& data, int64_t row, int64_t column, int group) {
  std::vector<float> registers(128 * kRegisters, 0.0f);
  FloatStep step;
  for (int64_t dim = 0; dim < data.of.d; dim += kFloatStepDims) {
    for (int thread = 0; thread < 256; ++thread) {
      load_step(data.rows.data(), row, data.of.n, dim, data.of.d, kTileRows, kRowLine, step.rows,
                thread, 256);
      load_step(data.columns.data(), column, data.of.m, dim, data.of.d, kTileColumns, kColumnLine,
                step.columns, thread, 256);
    }
    for (int thread = 0; thread < 128; ++thread) {
      float sums[kRegisters];
      std::copy_n(&registers[thread * kRegisters], kRegisters, sums);
      multiply_step(step, group, thread, sums);
      std::copy_n(sums, kRegisters, &registers[thread * kRegisters]);
    }
  }
  return registers;
}

// What wgmma_tiles and ffma_tiles do, all blocks one after another.
template <template <class> class Epilogue, class Element, class Arguments>
void run_kernel(const Data& data, const Arguments& arguments) {
  using Threads = test::HostThreads<Element>;
  for (int block = 0; block < arguments.plan.grid; ++block) {
    for (int group = 0; group < kGroups; ++group) {
      test::GroupMemory memory;
      memory.values.assign(kSharedValues, std::nanf(""));
      memory.scheduler.run([&](int thread) {
        Threads threads{thread, memory};
        Epilogue<Threads> epilogue(threads, arguments, block, group);
        for_each_tile(
            arguments.plan, block, [&](int unit) { epilogue.start_unit(unit); },
            [&](int64_t row, int64_t column) {
              constexpr bool is_float = std::is_same_v<Element, float>;
              std::vector<float>& all = data.products[{is_float, group, row, column}];
              if (all.empty()) {
                all = is_float ? float_products(data, row, column, group)
                               : tensor_core_products(data, row, column, group);
              }
              float sums[kRegisters];
              std::copy_n(&all[thread * kRegisters], kRegisters, sums);
              epilogue.add_tile(sums, row + group * hopper::kGroupRows, column);
            },
            [&](int64_t row) { epilogue.end_unit(row + group * hopper::kGroupRows); });
        epilogue.finish();
      });
    }
  }
}

void expect_close(const char* what, const std::vector<float>& got,
                  const std::vector<double>& wanted, double tolerance) {
  double largest = 0.0;
  for (const double value : wanted) {
    if (std::isfinite(value)) largest = std::max(largest, std::abs(value));
  }
  for (size_t k = 0; k < wanted.size(); ++k) {
    const bool is_right = std::isfinite(wanted[k])
                              ? std::abs(got[k] - wanted[k]) <= tolerance * largest + 1e-6
                              : got[k] == wanted[k];
    if (is_right) continue;
    std::cerr << what << "[" << k << "]: ";
    EXPECT_EQUAL(got[k], wanted[k]);
    return;
  }
}

// As kernels/tolerances.py has it for float32 results, of either type's features.
constexpr double kTolerance = 1e-5;
constexpr double kNone = -std::numeric_limits<double>::infinity();

struct Wanted {
  std::vector<double> row_lse, column_lse, positive, row_sum, column_sum, losses;
  double largest_logit = 0.0;

  explicit Wanted(const Data& data)
      : row_lse(data.of.n),
        column_lse(data.of.m),
        positive(data.of.n),
        row_sum(data.of.n),
        column_sum(data.of.m),
        losses(data.of.n) {
    const auto& of = data.of;
    std::vector<double> logits(of.n * of.m);
    std::vector<double> row_top(of.n, kNone), column_top(of.m, kNone);
    for (int64_t i = 0; i < of.n; ++i) {
      for (int64_t j = 0; j < of.m; ++j) {
        const double logit = of.scale * data.dot(i, j);
        largest_logit = std::max(largest_logit, std::abs(logit));
        logits[i * of.m + j] = data.is_kept(i, j) ? logit : kNone;
        if (data.matches(i, j)) positive[i] = logit;
        if (!data.is_kept(i, j)) continue;
        row_top[i] = std::max(row_top[i], logit);
        column_top[j] = std::max(column_top[j], logit);
        row_sum[i] += logit;
        column_sum[j] += logit;
        const double signed_logit = (logit + of.bias) * (data.matches(i, j) ? -1 : 1);
        losses[i] += std::log1p(std::exp(-std::abs(signed_logit))) + std::max(signed_logit, 0.0);
      }
    }
    for (int64_t i = 0; i < of.n; ++i) {
      for (int64_t j = 0; j < of.m; ++j) {
        if (logits[i * of.m + j] == kNone) continue;
        row_lse[i] += std::exp(logits[i * of.m + j] - row_top[i]);
        column_lse[j] += std::exp(logits[i * of.m + j] - column_top[j]);
      }
    }
    for (int64_t i = 0; i < of.n; ++i) row_lse[i] = std::log(row_lse[i]) + row_top[i];
    for (int64_t j = 0; j < of.m; ++j) column_lse[j] = std::log(column_lse[j]) + column_top[j];
    for (double& value : row_lse) value = std::isnan(value) ? kNone : value;
    for (double& value : column_lse) value = std::isnan(value) ? kNone : value;
  }
};

template <class Element>
void forward(const Data& data, const Wanted& wanted) {
  const auto& of = data.of;
  const ForwardPlan plan = plan_forward(of.n, of.m, kProcessors);
  const float unset = std::nanf("");
  std::vector<Total> row_totals(plan.column_groups * of.n, {unset, unset});
  std::vector<Total> column_totals(plan.num_column_slots() * of.m, {unset, unset});
  std::vector<float> row_sums(row_totals.size(), unset), column_sums(column_totals.size(), unset);
  std::vector<float> positive(of.n, 0.0f), row_lse(of.n), column_lse(of.m), row_sum(of.n),
      column_sum(of.m);
  ReduceArguments arguments{data.pairs(false), plan, row_totals.data(), column_totals.data(),
                            nullptr, nullptr, positive.data()};
  if (of.with_sums) {
    arguments.row_sums = row_sums.data();
    arguments.column_sums = column_sums.data();
  }
  run_kernel<ReducePairs, Element>(data, arguments);
  float* to_rows = of.with_sums ? row_sum.data() : nullptr;
  float* to_columns = of.with_sums ? column_sum.data() : nullptr;
  for (int64_t i = 0; i < of.n; ++i) finish_row(arguments, i, row_lse.data(), to_rows);
  for (int64_t j = 0; j < of.m; ++j) finish_column(arguments, j, column_lse.data(), to_columns);
  expect_close("row_lse", row_lse, wanted.row_lse, kTolerance);
  expect_close("column_lse", column_lse, wanted.column_lse, kTolerance);
  expect_close("positive", positive, wanted.positive, kTolerance);
  if (of.with_sums) {
    expect_close("row_sum", row_sum, wanted.row_sum, kTolerance);
    expect_close("column_sum", column_sum, wanted.column_sum, kTolerance);
  }

  std::vector<float> losses(plan.column_groups * of.n, unset), sums(of.n, 0.0f);
  run_kernel<SigmoidLosses, Element>(data, SigmoidArguments{data.pairs(true), plan, losses.data()});
  for (size_t k = 0; k < losses.size(); ++k) sums[k % of.n] += losses[k];
  expect_close("losses", sums, wanted.losses, kTolerance);
}

// Weights of all pairs, block by block of the given size, and the two sums.
struct Weights {
  std::vector<float> values;
  std::vector<float> sums{0.0f, 0.0f};

  template <template <class> class Epilogue, class Element, class Arguments>
  void compute(const Data& data, Arguments arguments, int64_t block_rows, int64_t block_columns) {
    const auto& of = data.of;
    values.assign(of.n * of.m, std::nanf(""));
    for (int64_t row = 0; row < of.n; row += block_rows) {
      for (int64_t column = 0; column < of.m; column += block_columns) {
        const int64_t num_rows = std::min(block_rows, of.n - row);
        const int64_t num_columns = std::min(block_columns, of.m - column);
        arguments.plan = plan_backward(row, num_rows, column, num_columns, kProcessors);
        const int64_t width = int64_t{arguments.plan.column_tiles} * kTileColumns;
        const int64_t height = int64_t{arguments.plan.row_tiles} * kTileRows;
        std::vector<Element> written(height * width);  // new memory is aligned to 16 bytes
        std::vector<float> weighted(arguments.plan.grid * kGroups * kWarps, std::nanf(""));
        std::vector<float> total(weighted);
        arguments.to = {written.data(), width, weighted.data(), total.data()};
        run_kernel<Epilogue, Element>(data, arguments);
        for (int64_t i = 0; i < height; ++i) {
          for (int64_t j = 0; j < width; ++j) {
            const float value = as_float(written[i * width + j]);
            if (i < num_rows && j < num_columns) {
              values[(row + i) * of.m + column + j] = value;
            } else {
              EXPECT_EQUAL(value, 0.0f);
            }
          }
        }
        for (const float part : weighted) sums[0] += part;
        for (const float part : total) sums[1] += part;
      }
    }
  }

  static float as_float(float value) { return value; }
  static float as_float(uint16_t bits) { return test::from_bfloat16(bits); }
};

template <class Element>
void backward(const Data& data, const Wanted& wanted, bool without_gradients) {
  const auto& of = data.of;
  // Exponentials inherit the rounding of logits, for which kTolerance allows sizes up to 100; and
  // half a unit of the last of bfloat16's 8 bits.
  const double exact = kTolerance * std::max(1.0, wanted.largest_logit / 100);
  const double tolerance = exact + (std::is_same_v<Element, float> ? 0.0 : 0x1p-8);
  std::vector<float> row_lse(wanted.row_lse.begin(), wanted.row_lse.end());
  std::vector<float> column_lse(wanted.column_lse.begin(), wanted.column_lse.end());
  std::vector<float> row_grad = data.row_grad, column_grad = data.column_grad;
  for (size_t i = 0; i < row_grad.size(); ++i) {
    if (wanted.row_lse[i] == kNone || (without_gradients && i % 2 == 0)) row_grad[i] = 0.0f;
  }
  for (size_t j = 0; j < column_grad.size(); ++j) {
    if (wanted.column_lse[j] != kNone && !(without_gradients && j % 2 == 0)) continue;
    column_grad[j] = 0.0f;
    column_lse[j] = -400.0f;  // any value at all
  }
  float least = -kNothing, most = kNothing;
  const auto widen = [&](const std::vector<float>& lse, const std::vector<float>& grad) {
    for (size_t k = 0; k < lse.size(); ++k) {
      if (!has_power(lse[k], grad[k])) continue;
      least = smaller(least, lse[k] * kLog2E);
      most = larger(most, lse[k] * kLog2E);
    }
  };
  widen(row_lse, row_grad);
  widen(column_lse, column_grad);
  const SharedShift shared = shared_shift_of(least, most);
  EXPECT_EQUAL(shared.is_shared != 0, of.spread == 1.0f);
  std::vector<float> row_factor, column_factor;
  for (size_t i = 0; i < row_lse.size(); ++i) {
    row_factor.push_back(factor_of(row_lse[i], row_grad[i], shared.shift));
  }
  for (size_t j = 0; j < column_lse.size(); ++j) {
    column_factor.push_back(factor_of(column_lse[j], column_grad[j], shared.shift));
  }

  std::vector<double> softmax(of.n * of.m), sigmoids(of.n * of.m);
  std::vector<double> softmax_sums(2), sigmoid_sums(2);
  double size = 0.0, sigmoid_size = 0.0;
  for (int64_t i = 0; i < of.n; ++i) {
    for (int64_t j = 0; j < of.m; ++j) {
      if (!data.is_kept(i, j)) continue;
      const double dot = data.dot(i, j), logit = of.scale * dot;
      double& weight = softmax[i * of.m + j];
      if (row_grad[i] != 0) weight += std::exp(logit - wanted.row_lse[i]) * row_grad[i];
      if (column_grad[j] != 0) weight += std::exp(logit - wanted.column_lse[j]) * column_grad[j];
      if (of.with_sums) weight += double{data.row_sum_grad[i]} + data.column_sum_grad[j];
      if (data.matches(i, j)) weight += data.positive_grad[i];
      softmax_sums[0] += weight * dot;
      softmax_sums[1] += weight;
      size += std::abs(weight * dot) + std::abs(weight);
      const double sign = data.matches(i, j) ? 1 : -1;
      double& share = sigmoids[i * of.m + j];
      share = -sign * data.row_grad[i] / (1 + std::exp(sign * (logit + of.bias)));
      sigmoid_sums[0] += share * dot;
      sigmoid_sums[1] += share;
      sigmoid_size += std::abs(share * dot) + std::abs(share);
    }
  }
  const auto expect_sums = [exact](const std::vector<float>& got, const std::vector<double>& of,
                                   double size) {
    // Sums of many terms of both signs: relative to the sum of their sizes.
    for (int k = 0; k < 2; ++k) EXPECT_EQUAL(std::abs(got[k] - of[k]) <= exact * size, true);
  };
  SoftmaxWeightsArguments softmax_arguments{};
  softmax_arguments.pairs = data.pairs(false);
  softmax_arguments.shared = &shared;
  softmax_arguments.row_factor = row_factor.data();
  softmax_arguments.column_factor = column_factor.data();
  softmax_arguments.row_lse = row_lse.data();
  softmax_arguments.column_lse = column_lse.data();
  softmax_arguments.row_lse_grad = row_grad.data();
  softmax_arguments.column_lse_grad = column_grad.data();
  softmax_arguments.positive_grad = data.positive_grad.data();
  if (of.with_sums) {
    softmax_arguments.row_sum_grad = data.row_sum_grad.data();
    softmax_arguments.column_sum_grad = data.column_sum_grad.data();
  }
  Weights weights;
  weights.compute<SoftmaxWeights, Element>(data, softmax_arguments, 256, 512);
  expect_close("softmax weights", weights.values, softmax, tolerance);
  expect_sums(weights.sums, softmax_sums, size);

  SigmoidWeightsArguments sigmoid_arguments{};
  sigmoid_arguments.pairs = data.pairs(true);
  sigmoid_arguments.row_loss_grad = data.row_grad.data();
  Weights of_sigmoid;
  of_sigmoid.compute<SigmoidWeights, Element>(data, sigmoid_arguments, 256, 256);
  expect_close("sigmoid weights", of_sigmoid.values, sigmoids, tolerance);
  expect_sums(of_sigmoid.sums, sigmoid_sums, sigmoid_size);
}

}  // namespace

int main() {
  // Odd sizes over several tiles of both sides and more than one unit a block; ids and sums; all
  // rows matched, some, none; one pair; a scale of 0 and below; logits so far apart that a shared
  // shift loses rows and columns (e^-300 is none in float32).
  const Problem problems[] = {
      {.n = 1, .m = 1, .d = 8},
      {.n = 137, .m = 530, .d = 72, .first_column = 200},
      {.n = 70, .m = 300, .d = 16, .first_column = -20, .with_ids = true, .with_sums = true},
      {.n = 300, .m = 130, .d = 8, .first_column = 130, .scale = -30.0f},
      {.n = 65, .m = 257, .d = 8, .scale = 0.0f, .with_sums = true},
      {.n = 130, .m = 260, .d = 16, .scale = 12.0f, .spread = 10.0f},
      // A group without rows beside one whose sums are far below 1.
      {.n = 40, .m = 300, .d = 8, .scale = 200.0f, .opposed = true},
      {.n = 130, .m = 300, .d = 8, .scale = 200.0f, .opposed = true},
  };
  bool without_gradients = false;
  for (const Problem& problem : problems) {
    std::cerr << "n " << problem.n << ", m " << problem.m << ", d " << problem.d << "\n";
    const Data data(problem);
    const Wanted wanted(data);
    forward<uint16_t>(data, wanted);
    forward<float>(data, wanted);
    backward<uint16_t>(data, wanted, without_gradients);
    backward<float>(data, wanted, without_gradients);
    without_gradients = !without_gradients;
  }
  return test::report();
}
