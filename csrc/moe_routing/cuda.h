// Launchers of the moe ops' CUDA kernels: raw pointers and a stream, no torch, so that nvcc
// compiles them without a CUDA torch. All tensors are dense and on the stream's device. No value
// of an index or a map leads outside a buffer.
// Status: compiled for sm_80 and sm_90a, their arithmetic tested on the CPU; not run on a GPU yet.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace carillon::moe_routing {

inline constexpr int64_t kMaxExperts = 512;  // of route and route_backward

struct Route {
  const void* logits;  // (T, E) float32, or bfloat16 where it says so
  bool bfloat16;
  int64_t num_tokens;
  int32_t num_experts;
  int32_t k;
  bool sigmoid;
  bool renormalize;
  float scale;
};

struct RouteOutputs {
  float* weights;    // (T, k)
  int32_t* indices;  // (T, k)
  int32_t* counts;   // (E,)
  float* means;      // (E,)
  float* z_loss;     // ()
  float* part_sums;      // (route_blocks, E + 1): scores, and the square for z_loss, of a block
  int32_t* part_counts;  // (route_blocks, E)
};

struct RouteGradients {
  const float* weights;    // (T, k)
  const float* means;      // (E,)
  const float* z_loss;     // ()
  const int32_t* indices;  // (T, k)
};

// Blocks of route, each of which writes partial sums.
int64_t route_blocks(int64_t num_tokens, int64_t num_experts);

// bias: (E,) or null.
cudaError_t route(const Route& of, const float* bias, const RouteOutputs& to, cudaStream_t stream);

// grad_logits: (T, E) of the logits' type.
cudaError_t route_backward(const Route& of, const RouteGradients& grads, void* grad_logits,
                           cudaStream_t stream);

struct Plan {
  const int32_t* experts;  // (S,)
  int64_t num_slots;
  int64_t num_experts;
  int64_t alignment;
  int64_t most;  // slots that an expert keeps
  int64_t num_rows;
  int32_t* offsets;      // (E + 1,)
  int32_t* row_to_slot;  // (R,)
  int32_t* slot_to_row;  // (S,)
  int32_t* chunk_ranks;  // (plan_chunks, E): scratch
  int32_t* totals;       // (E,): scratch
};

int64_t plan_chunks(int64_t num_slots);

cudaError_t make_plan(const Plan& plan, cudaStream_t stream);

// Rows of one type, and the maps of a plan.
struct Rows {
  bool bfloat16;
  int64_t num_tokens;
  int64_t num_rows;
  int64_t k;
  int64_t width;
  const int32_t* row_to_slot;  // (R,)
  const int32_t* slot_to_row;  // (T, k)
};

// x: (T, D) -> rows: (R, D).
cudaError_t permute(const Rows& of, const void* x, void* rows, cudaStream_t stream);

// rows: (R, D), weights: (T, k) or null for ones -> out: (T, D).
cudaError_t sum_rows(const Rows& of, const void* rows, const float* weights, void* out,
                     cudaStream_t stream);

// grad: (T, D), rows: (R, D), weights: (T, k) -> grad_rows: (R, D), grad_weights: (T, k).
cudaError_t unpermute_backward(const Rows& of, const void* grad, const void* rows,
                               const float* weights, void* grad_rows, float* grad_weights,
                               cudaStream_t stream);

}  // namespace carillon::moe_routing
