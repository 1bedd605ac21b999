// The contrastive ops' CUDA provider: checks, allocates, and calls the launchers on torch's stream.
//
// Backward: per block of pairs a kernel writes the derivative by the logits in the features' type
// (128 MiB at most), and two plain products by torch turn it into gradients: three products in all,
// and cuBLAS runs plain ones at the chip's rate. A kernel that fed the weights from registers to
// the products would have to add to both sides' gradients, N x D and M x D in float32, at every
// tile, which is more memory traffic than the weights are. Blocks are square, so that each gradient
// is added to a few times only. Nothing waits for the GPU, no sum depends on timing.
// float32 products are torch's: with its setting for TF32 on they are as exact as that.
#include "check.h"
#include "cuda.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <tuple>

namespace carillon::contrastive {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Reductions = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr int64_t kBlockRows = 8192;
constexpr int64_t kBlockBytes = int64_t{128} << 20;
constexpr int64_t kMostPairs = int64_t{1} << 30;  // of a side: the copy engine counts in int32
constexpr int64_t kCopyBytes = 16;

int attribute(cudaDeviceAttr which, const at::Device& device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device.index()));
  return value;
}

void check_device(const char* op, const at::Tensor& rows,
                  std::initializer_list<const at::Tensor*> others) {
  const at::Device device = rows.device();
  for (const at::Tensor* other : others) {
    TORCH_CHECK_VALUE(other == nullptr || other->device() == device, op,
                      ": all tensors must be on one device, got ", device, " and ",
                      other->device());
  }
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  TORCH_CHECK_NOT_IMPLEMENTED(
      major == 9 && minor == 0, op,
      ": the native provider is written for compute capability 9.0 (H100, H200, GH200), and ",
      device, " has ", major, ".", minor, "; choose the provider 'triton' or 'reference'");
}

const at::Tensor* pointer(const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; }

const float* floats(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
}

// The arguments that all four ops share, as the kernels want them.
class Pairs {
 public:
  Pairs(const char* op, const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& scale,
        const OptionalTensor& bias, int64_t first_column, const OptionalTensor& row_ids,
        const OptionalTensor& column_ids)
      : num_rows(rows.size(0)),
        num_columns(columns.size(0)),
        is_bfloat16(rows.scalar_type() == at::kBFloat16),
        options(rows.options().dtype(at::kFloat)),
        num_processors(attribute(cudaDevAttrMultiProcessorCount, rows.device())),
        stream(c10::cuda::getCurrentCUDAStream()),
        first_column_(std::clamp(first_column, -num_rows, num_columns)) {
    TORCH_CHECK_VALUE(num_rows <= kMostPairs && num_columns <= kMostPairs, op,
                      ": rows and columns may be at most ", kMostPairs, " each, got ", num_rows,
                      " and ", num_columns);
    this->rows = copyable(rows);
    this->columns = copyable(columns);
    scale_ = scale.contiguous();
    if (bias) bias_ = bias->contiguous();
    if (row_ids) row_ids_ = row_ids->contiguous();
    if (column_ids) column_ids_ = column_ids->contiguous();
  }

  int64_t num_rows, num_columns;
  bool is_bfloat16;
  at::TensorOptions options;  // float32 on the features' device
  int num_processors;
  cudaStream_t stream;
  at::Tensor rows, columns;  // contiguous, perhaps with dims of zeros behind

  bool is_empty() const { return num_rows == 0 || num_columns == 0; }

  FeaturePair features() const {
    return {rows.const_data_ptr(), columns.const_data_ptr(), rows.size(1), is_bfloat16};
  }
  PairArguments arguments() const {
    return {num_rows,       num_columns,    first_column_,      floats(scale_),
            floats(bias_),  ids(row_ids_),  ids(column_ids_)};
  }

 private:
  static const int64_t* ids(const at::Tensor& ids) {
    return ids.defined() ? ids.const_data_ptr<int64_t>() : nullptr;
  }

  // The copy engine wants rows of bfloat16 in whole 16 bytes, at addresses that are.
  at::Tensor copyable(const at::Tensor& features) const {
    if (!is_bfloat16) return features.contiguous();
    constexpr int64_t step = kCopyBytes / 2;
    const int64_t dims = features.size(1);
    const int64_t whole = std::max(step, (dims + step - 1) / step * step);
    if (whole != dims) return at::constant_pad_nd(features, {0, whole - dims});
    const at::Tensor dense = features.contiguous();
    const bool is_aligned = reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % kCopyBytes == 0;
    return is_aligned ? dense : dense.clone();
  }

  int64_t first_column_;
  at::Tensor scale_, bias_, row_ids_, column_ids_;
};

Reductions contrastive(const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& scale,
                       int64_t first_column, const OptionalTensor& row_ids,
                       const OptionalTensor& column_ids, bool with_sums) {
  constexpr const char* op = "contrastive";
  check_pairs(op, rows, columns, scale, row_ids, column_ids);
  check_device(op, rows, {&columns, &scale, pointer(row_ids), pointer(column_ids)});
  const c10::cuda::CUDAGuard guard(rows.device());
  const Pairs pairs(op, rows, columns, scale, std::nullopt, first_column, row_ids, column_ids);
  const int64_t n = pairs.num_rows, m = pairs.num_columns;
  at::Tensor row_lse = at::full({n}, kNothing, pairs.options);
  at::Tensor column_lse = at::full({m}, kNothing, pairs.options);
  at::Tensor positive = at::zeros({n}, pairs.options);
  at::Tensor row_sum = at::zeros({with_sums ? n : 0}, pairs.options);
  at::Tensor column_sum = at::zeros({with_sums ? m : 0}, pairs.options);
  if (pairs.is_empty()) return {row_lse, column_lse, positive, row_sum, column_sum};
  const ForwardPlan plan = plan_forward(n, m, pairs.num_processors);
  const int64_t row_slots = plan.column_groups, column_slots = plan.num_column_slots();
  at::Tensor row_totals = at::empty({row_slots, n, 2}, pairs.options);
  at::Tensor column_totals = at::empty({column_slots, m, 2}, pairs.options);
  at::Tensor row_sums, column_sums;
  if (with_sums) {
    row_sums = at::empty({row_slots, n}, pairs.options);
    column_sums = at::empty({column_slots, m}, pairs.options);
  }
  const auto written = [](at::Tensor& to) {
    return to.defined() && to.numel() > 0 ? to.mutable_data_ptr<float>() : nullptr;
  };
  const ReduceArguments arguments{
      .pairs = pairs.arguments(),
      .plan = plan,
      .row_totals = reinterpret_cast<Total*>(written(row_totals)),
      .column_totals = reinterpret_cast<Total*>(written(column_totals)),
      .row_sums = written(row_sums),
      .column_sums = written(column_sums),
      .positive = written(positive),
  };
  C10_CUDA_CHECK(launch_reduce(pairs.features(), arguments, pairs.stream));
  C10_CUDA_CHECK(launch_finish(arguments, written(row_lse), written(column_lse), written(row_sum),
                               written(column_sum), pairs.stream));
  return {row_lse, column_lse, positive, row_sum, column_sum};
}

at::Tensor contrastive_sigmoid(const at::Tensor& rows, const at::Tensor& columns,
                               const at::Tensor& scale, const at::Tensor& bias,
                               int64_t first_column, const OptionalTensor& row_ids,
                               const OptionalTensor& column_ids) {
  constexpr const char* op = "contrastive_sigmoid";
  check_pairs(op, rows, columns, scale, row_ids, column_ids);
  check_one(op, "bias", bias);
  check_device(op, rows, {&columns, &scale, &bias, pointer(row_ids), pointer(column_ids)});
  const c10::cuda::CUDAGuard guard(rows.device());
  const Pairs pairs(op, rows, columns, scale, bias, first_column, row_ids, column_ids);
  if (pairs.is_empty()) return at::zeros({pairs.num_rows}, pairs.options);
  const ForwardPlan plan =
      plan_forward(pairs.num_rows, pairs.num_columns, pairs.num_processors);
  at::Tensor losses = at::empty({plan.column_groups, pairs.num_rows}, pairs.options);
  C10_CUDA_CHECK(launch_sigmoid_losses(
      pairs.features(), {pairs.arguments(), plan, losses.mutable_data_ptr<float>()},
      pairs.stream));
  return losses.sum(0);
}

// to (+)= left @ right, summed in float32; `is_first` where nothing stands there yet.
void add_product(at::Tensor to, const at::Tensor& left, const at::Tensor& right, bool is_first) {
  const bool is_wide = left.scalar_type() == at::kFloat;
  if (is_first && is_wide) {
    at::mm_out(to, left, right);
  } else if (is_first) {
    at::mm_out(to, left, right, at::kFloat);
  } else if (is_wide) {
    to.addmm_(left, right);
  } else {
    to.add_(at::mm(left, right, at::kFloat));
  }
}

// Both sides' gradients over all blocks of pairs, and the sums of the weights.
class Gradients {
 public:
  explicit Gradients(const Pairs& pairs)
      : pairs_(pairs),
        by_rows_(at::zeros(pairs.rows.sizes(), pairs.options)),
        by_columns_(at::zeros(pairs.columns.sizes(), pairs.options)),
        sums_(at::zeros({2}, pairs.options)) {}

  // Calls launch(plan, where the weights go) for each block.
  template <class Launch>
  void compute(const Launch& launch) {
    if (pairs_.is_empty()) return;
    const int64_t item_bytes = pairs_.is_bfloat16 ? 2 : 4;
    const int64_t most_columns = kBlockBytes / kBlockRows / item_bytes;
    const int64_t height = std::min(kBlockRows, whole(pairs_.num_rows, kTileRows));
    const int64_t width = std::min(most_columns, whole(pairs_.num_columns, kTileColumns));
    at::Tensor weights = at::empty({height, width}, pairs_.rows.options());
    const int64_t num_blocks = ceiling(pairs_.num_rows, height) *
                               ceiling(pairs_.num_columns, width);
    const int64_t num_warps = int64_t{pairs_.num_processors} * kGroups * kWarps;
    // Of weights times products, and of weights; a grid of fewer blocks leaves zeros.
    at::Tensor parts = at::zeros({num_blocks, 2, num_warps}, pairs_.options);
    float* part = parts.mutable_data_ptr<float>();
    for (int64_t column = 0; column < pairs_.num_columns; column += width) {
      for (int64_t row = 0; row < pairs_.num_rows; row += height) {
        const int64_t num_rows = std::min(height, pairs_.num_rows - row);
        const int64_t num_columns = std::min(width, pairs_.num_columns - column);
        const BackwardPlan plan =
            plan_backward(row, num_rows, column, num_columns, pairs_.num_processors);
        C10_CUDA_CHECK(
            launch(plan, WeightsTo{weights.mutable_data_ptr(), width, part, part + num_warps}));
        part += 2 * num_warps;
        const at::Tensor block = weights.narrow(0, 0, num_rows).narrow(1, 0, num_columns);
        add_product(by_rows_.narrow(0, row, num_rows), block,
                    pairs_.columns.narrow(0, column, num_columns), column == 0);
        add_product(by_columns_.narrow(0, column, num_columns), block.t(),
                    pairs_.rows.narrow(0, row, num_rows), row == 0);
      }
    }
    sums_ = parts.sum(at::IntArrayRef{0, 2});
  }

  // In the features' type and sizes: weights are derivatives by logits, which are scaled products.
  at::Tensor of_rows(const at::Tensor& like, const at::Tensor& scale) const {
    return finish(by_rows_, like, scale);
  }
  at::Tensor of_columns(const at::Tensor& like, const at::Tensor& scale) const {
    return finish(by_columns_, like, scale);
  }
  at::Tensor of_scale() const { return sums_.narrow(0, 0, 1).clone(); }
  at::Tensor of_bias() const { return sums_.narrow(0, 1, 1).clone(); }

 private:
  static int64_t ceiling(int64_t length, int64_t part) { return (length + part - 1) / part; }
  static int64_t whole(int64_t length, int64_t tile) { return ceiling(length, tile) * tile; }

  static at::Tensor finish(const at::Tensor& gradient, const at::Tensor& like,
                           const at::Tensor& scale) {
    at::Tensor out = at::empty(like.sizes(), like.options());
    return at::mul_out(out, gradient.narrow(1, 0, like.size(1)), scale);
  }

  const Pairs& pairs_;
  at::Tensor by_rows_, by_columns_, sums_;
};

using SoftmaxGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

SoftmaxGradients contrastive_backward(
    const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& scale,
    int64_t first_column, const OptionalTensor& row_ids, const OptionalTensor& column_ids,
    const at::Tensor& row_lse, const at::Tensor& column_lse, const at::Tensor& row_lse_grad,
    const at::Tensor& column_lse_grad, const at::Tensor& positive_grad,
    const OptionalTensor& row_sum_grad, const OptionalTensor& column_sum_grad) {
  constexpr const char* op = "contrastive_backward";
  check_pairs(op, rows, columns, scale, row_ids, column_ids);
  const int64_t n = rows.size(0), m = columns.size(0);
  check_vector(op, "row_lse", row_lse, n);
  check_vector(op, "column_lse", column_lse, m);
  check_vector(op, "row_lse_grad", row_lse_grad, n);
  check_vector(op, "column_lse_grad", column_lse_grad, m);
  check_vector(op, "positive_grad", positive_grad, n);
  if (row_sum_grad) check_vector(op, "row_sum_grad", *row_sum_grad, n);
  if (column_sum_grad) check_vector(op, "column_sum_grad", *column_sum_grad, m);
  TORCH_CHECK_VALUE(row_sum_grad.has_value() == column_sum_grad.has_value(), op,
                    ": give row_sum_grad and column_sum_grad, or neither");
  check_device(op, rows,
               {&columns, &scale, pointer(row_ids), pointer(column_ids), &row_lse, &column_lse,
                &row_lse_grad, &column_lse_grad, &positive_grad, pointer(row_sum_grad),
                pointer(column_sum_grad)});
  const c10::cuda::CUDAGuard guard(rows.device());
  const Pairs pairs(op, rows, columns, scale, std::nullopt, first_column, row_ids, column_ids);
  Gradients gradients(pairs);
  if (!pairs.is_empty()) {
    const at::Tensor lse_N = row_lse.contiguous(), lse_M = column_lse.contiguous();
    const at::Tensor grad_N = row_lse_grad.contiguous(), grad_M = column_lse_grad.contiguous();
    const at::Tensor match_N = positive_grad.contiguous();
    at::Tensor sum_N, sum_M;
    if (row_sum_grad) sum_N = row_sum_grad->contiguous();
    if (column_sum_grad) sum_M = column_sum_grad->contiguous();
    at::Tensor factors = at::empty({n + m}, pairs.options);
    at::Tensor shared = at::empty({sizeof(SharedShift) / sizeof(float)}, pairs.options);
    float* row_factor = factors.mutable_data_ptr<float>();
    auto* shift = reinterpret_cast<SharedShift*>(shared.mutable_data_ptr<float>());
    C10_CUDA_CHECK(launch_factors({n, m, floats(lse_N), floats(grad_N), floats(lse_M),
                                   floats(grad_M), shift, row_factor, row_factor + n},
                                  pairs.stream));
    gradients.compute([&](const BackwardPlan& plan, WeightsTo to) {
      to.total = nullptr;
      const SoftmaxWeightsArguments arguments{
          .pairs = pairs.arguments(),
          .plan = plan,
          .to = to,
          .shared = shift,
          .row_factor = row_factor,
          .column_factor = row_factor + n,
          .row_lse = floats(lse_N),
          .column_lse = floats(lse_M),
          .row_lse_grad = floats(grad_N),
          .column_lse_grad = floats(grad_M),
          .positive_grad = floats(match_N),
          .row_sum_grad = floats(sum_N),
          .column_sum_grad = floats(sum_M),
      };
      return launch_softmax_weights(pairs.features(), arguments, pairs.stream);
    });
  }
  return {gradients.of_rows(rows, scale), gradients.of_columns(columns, scale),
          gradients.of_scale()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_sigmoid_backward(
    const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& scale,
    const at::Tensor& bias, int64_t first_column, const OptionalTensor& row_ids,
    const OptionalTensor& column_ids, const at::Tensor& row_loss_grad) {
  constexpr const char* op = "contrastive_sigmoid_backward";
  check_pairs(op, rows, columns, scale, row_ids, column_ids);
  check_one(op, "bias", bias);
  check_vector(op, "row_loss_grad", row_loss_grad, rows.size(0));
  check_device(op, rows,
               {&columns, &scale, &bias, pointer(row_ids), pointer(column_ids), &row_loss_grad});
  const c10::cuda::CUDAGuard guard(rows.device());
  const Pairs pairs(op, rows, columns, scale, bias, first_column, row_ids, column_ids);
  const at::Tensor grad_N = row_loss_grad.contiguous();
  Gradients gradients(pairs);
  gradients.compute([&](const BackwardPlan& plan, const WeightsTo& to) {
    return launch_sigmoid_weights(pairs.features(), {pairs.arguments(), plan, to, floats(grad_N)},
                                  pairs.stream);
  });
  return {gradients.of_rows(rows, scale), gradients.of_columns(columns, scale),
          gradients.of_scale(), gradients.of_bias()};
}

}  // namespace
}  // namespace carillon::contrastive

TORCH_LIBRARY_IMPL(carillon, CUDA, m) {
  m.impl("contrastive", &carillon::contrastive::contrastive);
  m.impl("contrastive_backward", &carillon::contrastive::contrastive_backward);
  m.impl("contrastive_sigmoid", &carillon::contrastive::contrastive_sigmoid);
  m.impl("contrastive_sigmoid_backward", &carillon::contrastive::contrastive_sigmoid_backward);
}
