// packed_attention on the CPU: a task is a sequence and key head (and a span of queries, forward);
// threads take the next task from a counter, since lengths differ. A task's arithmetic does not
// depend on who computes it, so results are the same for any number of threads.
#include "check.h"
#include "problem.h"

#include "cpu_dispatch.h"
#include "instruction_set.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace carillon::packed_attention {

#define CARILLON_LOOPS "packed_attention/kernels.h"
#include "cpu_targets.h"

namespace {

at::Tensor with_dense_rows(const at::Tensor& tensor) {
  return tensor.stride(2) == 1 ? tensor : tensor.contiguous();
}

Rows rows_of(const at::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

Problem problem_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const Lengths& lengths, bool causal, std::optional<double> scale) {
  Problem problem{};
  problem.q = rows_of(q);
  problem.k = rows_of(k);
  problem.v = rows_of(v);
  problem.starts_q = lengths.starts_q.data();
  problem.starts_k = lengths.starts_k.data();
  problem.prefixes = lengths.prefixes.empty() ? nullptr : lengths.prefixes.data();
  problem.num_heads = q.size(1);
  problem.num_kv_heads = k.size(1);
  problem.head_dim = q.size(2);
  problem.total_q = q.size(0);
  problem.causal = causal;
  problem.scale =
      static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(2)))));
  return problem;
}

int64_t longest(const std::vector<int64_t>& starts) {
  int64_t most = 0;
  for (size_t i = 0; i + 1 < starts.size(); ++i) most = std::max(most, starts[i + 1] - starts[i]);
  return most;
}

// Tasks of every sequence and key head, each of at most `span` queries (0: all of them, and a
// sequence without queries too).
std::vector<Task> tasks_of(const Problem& problem, int64_t num_sequences, int64_t span) {
  std::vector<Task> tasks;
  for (int64_t s = 0; s < num_sequences; ++s) {
    const int64_t queries = problem.num_queries(s);
    for (int64_t head = 0; head < problem.num_kv_heads; ++head) {
      if (span == 0) {
        tasks.push_back({s, head, 0, queries});
        continue;
      }
      for (int64_t first = 0; first < queries; first += span) {
        tasks.push_back({s, head, first, std::min(queries - first, span)});
      }
    }
  }
  return tasks;
}

void run(void (*kernel)(const Problem&, const Task&, float*), const Problem& problem,
         const std::vector<Task>& tasks, int64_t scratch_size) {
  std::atomic<int64_t> next{0};
  const auto num_tasks = std::ssize(tasks);
  const auto workers = std::min<int64_t>(at::get_num_threads(), num_tasks);
  // Neighbouring heads go to one thread where there are enough: each asks for the next one's rows.
  const int64_t share = std::clamp<int64_t>(num_tasks / (workers * 8 + 1), 1, problem.num_kv_heads);
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    const at::Tensor scratch = at::empty({scratch_size}, at::kFloat);  // 64-byte aligned
    for (int64_t first = next.fetch_add(share); first < num_tasks; first = next.fetch_add(share)) {
      for (int64_t i = first; i < std::min(first + share, num_tasks); ++i) {
        kernel(problem, tasks[i], scratch.mutable_data_ptr<float>());
      }
    }
  });
}

std::tuple<at::Tensor, at::Tensor> packed_attention(
    const at::Tensor& q_given, const at::Tensor& k_given, const at::Tensor& v_given,
    const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, int64_t max_seqlen_q,
    int64_t max_seqlen_k, bool causal, const std::optional<at::Tensor>& prefix_lengths,
    std::optional<double> scale) {
  const Lengths lengths = check(q_given, k_given, v_given, cu_seqlens_q, cu_seqlens_k,
                                max_seqlen_q, max_seqlen_k, causal, prefix_lengths, scale);
  const at::Tensor q = with_dense_rows(q_given);
  const at::Tensor k = with_dense_rows(k_given);
  const at::Tensor v = with_dense_rows(v_given);
  at::Tensor out = at::empty(q.sizes(), q.options());
  at::Tensor lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
  Problem problem = problem_of(q, k, v, lengths, causal, scale);
  problem.out = rows_of(out);
  problem.lse = lse.mutable_data_ptr<float>();
  const Kernels& best = best_table();
  const auto num_sequences = std::ssize(lengths.starts_q) - 1;
  run(q.scalar_type() == at::kFloat ? best.forward_float : best.forward_bfloat16, problem,
      tasks_of(problem, num_sequences, kForwardSpan),
      best.forward_scratch(problem.head_dim, longest(lengths.starts_k)));
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_attention_backward(
    const at::Tensor& grad_out_given, const std::optional<at::Tensor>& grad_lse_given,
    const at::Tensor& q_given, const at::Tensor& k_given, const at::Tensor& v_given,
    const at::Tensor& out_given, const at::Tensor& lse_given, const at::Tensor& cu_seqlens_q,
    const at::Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal,
    const std::optional<at::Tensor>& prefix_lengths, std::optional<double> scale) {
  const Lengths lengths = check(q_given, k_given, v_given, cu_seqlens_q, cu_seqlens_k,
                                max_seqlen_q, max_seqlen_k, causal, prefix_lengths, scale);
  check_like_q("grad_out", grad_out_given, q_given);
  check_like_q("out", out_given, q_given);
  check_lse("lse", lse_given, q_given);
  if (grad_lse_given) check_lse("grad_lse", *grad_lse_given, q_given);
  const at::Tensor q = with_dense_rows(q_given);
  const at::Tensor k = with_dense_rows(k_given);
  const at::Tensor v = with_dense_rows(v_given);
  const at::Tensor out = with_dense_rows(out_given);
  const at::Tensor grad_out = with_dense_rows(grad_out_given);
  const at::Tensor lse = lse_given.contiguous();
  const at::Tensor grad_lse = grad_lse_given ? grad_lse_given->contiguous() : at::Tensor();
  at::Tensor grad_q = at::empty(q.sizes(), q.options());
  at::Tensor grad_k = at::empty(k.sizes(), k.options());
  at::Tensor grad_v = at::empty(v.sizes(), v.options());
  Problem problem = problem_of(q, k, v, lengths, causal, scale);
  problem.out = rows_of(out);
  problem.lse = const_cast<float*>(lse.const_data_ptr<float>());
  problem.grad_out = rows_of(grad_out);
  problem.grad_lse = grad_lse.defined() ? grad_lse.const_data_ptr<float>() : nullptr;
  problem.grad_q = rows_of(grad_q);
  problem.grad_k = rows_of(grad_k);
  problem.grad_v = rows_of(grad_v);
  const Kernels& best = best_table();
  const auto num_sequences = std::ssize(lengths.starts_q) - 1;
  run(q.scalar_type() == at::kFloat ? best.backward_float : best.backward_bfloat16, problem,
      tasks_of(problem, num_sequences, 0),
      best.backward_scratch(problem.head_dim, problem.group() * longest(lengths.starts_q),
                            longest(lengths.starts_k)));
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace carillon::packed_attention

TORCH_LIBRARY_IMPL(carillon, CPU, m) {
  m.impl("packed_attention", &carillon::packed_attention::packed_attention);
  m.impl("packed_attention_backward", &carillon::packed_attention::packed_attention_backward);
}
