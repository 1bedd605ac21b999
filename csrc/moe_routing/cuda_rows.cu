// moe_permute, moe_unpermute and their gradients on CUDA. All are bound by memory: a power of two
// of lanes walks a token's row in vectors of 16 bytes, its k rows are read or written from there,
// and the last blocks write zeros to the rows of no slot. A row outside 0..R-1 counts as dropped.
#include "cuda.h"
#include "row_lanes.h"

#include <cuda_bf16.h>

namespace carillon::moe_routing {
namespace {

constexpr int kWarp = 32;
constexpr int kBatch = 4;  // rows of a token that are loaded before the first is used

__device__ float to_float(float value) { return value; }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ void round_to(float value, float& to) { to = value; }
__device__ void round_to(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }

template <typename Element, int kValues>
struct alignas(sizeof(Element) * kValues) Vector {
  Element values[kValues];
};

template <typename Element, int kValues>
__device__ Vector<Element, kValues> zeros() {
  Vector<Element, kValues> vector;
#pragma unroll
  for (int i = 0; i < kValues; ++i) round_to(0.0f, vector.values[i]);
  return vector;
}

// What a launch works on, in vectors: blocks that take tokens, then blocks that write padding.
struct Shape {
  int64_t num_tokens, num_rows, num_vectors;
  int32_t k, lanes;
  unsigned token_blocks, padding_blocks;
};

__device__ bool is_token_block(const Shape& shape) { return blockIdx.x < shape.token_blocks; }

template <typename Element, int kValues>
__device__ void zero_padding(const Shape& shape, const int32_t* row_to_slot,
                             Vector<Element, kValues>* rows) {
  const int64_t row = row_of_thread(int64_t{blockIdx.x} - shape.token_blocks, threadIdx.x,
                                    shape.lanes);
  if (row >= shape.num_rows || !is_padding(row_to_slot[row])) return;
  for (int64_t v = threadIdx.x % shape.lanes; v < shape.num_vectors; v += shape.lanes) {
    rows[row * shape.num_vectors + v] = zeros<Element, kValues>();
  }
}

template <typename Element, int kValues>
__global__ void __launch_bounds__(kRowThreads)
    permute_rows(Shape shape, const Vector<Element, kValues>* __restrict__ x,
                 const int32_t* __restrict__ row_to_slot, const int32_t* __restrict__ slot_to_row,
                 Vector<Element, kValues>* __restrict__ rows) {
  if (!is_token_block(shape)) return zero_padding(shape, row_to_slot, rows);
  const int64_t token = row_of_thread(blockIdx.x, threadIdx.x, shape.lanes);
  if (token >= shape.num_tokens) return;
#pragma unroll 2
  for (int64_t v = threadIdx.x % shape.lanes; v < shape.num_vectors; v += shape.lanes) {
    const Vector<Element, kValues> values = x[token * shape.num_vectors + v];
    for (int j = 0; j < shape.k; ++j) {
      const int64_t row = row_or_none(slot_to_row[token * shape.k + j], shape.num_rows);
      if (row >= 0) rows[row * shape.num_vectors + v] = values;
    }
  }
}

template <typename Element, int kValues>
__global__ void __launch_bounds__(kRowThreads, 4)
    sum_rows_of_tokens(Shape shape, const Vector<Element, kValues>* __restrict__ rows,
                       const float* __restrict__ weights,
                       const int32_t* __restrict__ slot_to_row,
                       Vector<Element, kValues>* __restrict__ out) {
  const int64_t token = row_of_thread(blockIdx.x, threadIdx.x, shape.lanes);
  if (token >= shape.num_tokens) return;
  for (int64_t v = threadIdx.x % shape.lanes; v < shape.num_vectors; v += shape.lanes) {
    float sums[kValues] = {};
    // Slots are added in their order; the rows of a batch are on their way together.
    for (int first = 0; first < shape.k; first += kBatch) {
      int64_t from[kBatch];
      float factors[kBatch];
      Vector<Element, kValues> taken[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const bool is_slot = first + i < shape.k;
        const int64_t slot = token * shape.k + (is_slot ? first + i : 0);
        from[i] = row_or_none(slot_to_row[slot], is_slot ? shape.num_rows : 0);
        factors[i] = weights == nullptr ? 1.0f : weights[slot];
      }
      // Row 0 stands in for one that is dropped, so that no load waits for a branch.
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        taken[i] = rows[(from[i] < 0 ? 0 : from[i]) * shape.num_vectors + v];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int c = 0; c < kValues; ++c) {
          sums[c] += from[i] < 0 ? 0.0f : factors[i] * to_float(taken[i].values[c]);
        }
      }
    }
    Vector<Element, kValues> rounded;
#pragma unroll
    for (int i = 0; i < kValues; ++i) round_to(sums[i], rounded.values[i]);
    out[token * shape.num_vectors + v] = rounded;
  }
}

// A warp a token, so that the dot products are sums over its lanes; lanes is kWarp.
template <typename Element, int kValues>
__global__ void __launch_bounds__(kRowThreads)
    unpermute_gradients(Shape shape, const Vector<Element, kValues>* __restrict__ grad,
                        const Vector<Element, kValues>* __restrict__ rows,
                        const float* __restrict__ weights,
                        const int32_t* __restrict__ row_to_slot,
                        const int32_t* __restrict__ slot_to_row,
                        Vector<Element, kValues>* __restrict__ grad_rows,
                        float* __restrict__ grad_weights) {
  if (!is_token_block(shape)) return zero_padding(shape, row_to_slot, grad_rows);
  const int64_t token = row_of_thread(blockIdx.x, threadIdx.x, kWarp);
  if (token >= shape.num_tokens) return;
  const int lane = threadIdx.x % kWarp;
  for (int j = 0; j < shape.k; ++j) {
    const int64_t slot = token * shape.k + j;
    const int64_t row = row_or_none(slot_to_row[slot], shape.num_rows);
    const float weight = weights[slot];
    float dot = 0;
    // The token's gradient is read k times, from the first-level cache after the first.
#pragma unroll 2
    for (int64_t v = lane; row >= 0 && v < shape.num_vectors; v += kWarp) {
      const Vector<Element, kValues> g = grad[token * shape.num_vectors + v];
      const Vector<Element, kValues> values = rows[row * shape.num_vectors + v];
      Vector<Element, kValues> scaled;
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        dot += to_float(g.values[i]) * to_float(values.values[i]);
        round_to(weight * to_float(g.values[i]), scaled.values[i]);
      }
      grad_rows[row * shape.num_vectors + v] = scaled;
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) dot += __shfl_xor_sync(~0u, dot, step);
    if (lane == 0) grad_weights[slot] = dot;
  }
}

Shape shape_of(const Rows& of, int kValues, int lanes, bool pads) {
  Shape shape{of.num_tokens, of.num_rows, of.width / kValues, static_cast<int32_t>(of.k), 0, 0, 0};
  shape.lanes = lanes > 0 ? lanes : lanes_of_row(shape.num_vectors);
  shape.token_blocks = static_cast<unsigned>(blocks_of_rows(of.num_tokens, shape.lanes));
  if (pads && shape.num_vectors > 0) {
    shape.padding_blocks = static_cast<unsigned>(blocks_of_rows(of.num_rows, shape.lanes));
  }
  return shape;
}

// Calls body<Element, kValues>() for the rows' type and the widest vector that fits `pointers`,
// all of them or-ed together.
template <typename Body>
cudaError_t with_vectors(const Rows& of, uintptr_t pointers, const Body& body) {
  const int values = values_of_vector(of.width, of.bfloat16 ? 2 : 4, pointers);
  if (of.bfloat16) {
    values == 1 ? body.template operator()<__nv_bfloat16, 1>()
                : body.template operator()<__nv_bfloat16, 8>();
  } else {
    values == 1 ? body.template operator()<float, 1>() : body.template operator()<float, 4>();
  }
  return cudaGetLastError();
}

uintptr_t bits(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace

cudaError_t permute(const Rows& of, const void* x, void* rows, cudaStream_t stream) {
  return with_vectors(of, bits(x) | bits(rows), [&]<typename Element, int kValues>() {
    const Shape shape = shape_of(of, kValues, 0, true);
    const unsigned blocks = shape.token_blocks + shape.padding_blocks;
    if (blocks == 0) return;
    using Values = Vector<Element, kValues>;
    permute_rows<Element, kValues><<<blocks, kRowThreads, 0, stream>>>(
        shape, static_cast<const Values*>(x), of.row_to_slot, of.slot_to_row,
        static_cast<Values*>(rows));
  });
}

cudaError_t sum_rows(const Rows& of, const void* rows, const float* weights, void* out,
                     cudaStream_t stream) {
  if (of.num_rows == 0) {  // no row 0 to stand in for dropped ones
    const size_t value_bytes = of.bfloat16 ? 2 : 4;
    return cudaMemsetAsync(out, 0, of.num_tokens * of.width * value_bytes, stream);
  }
  return with_vectors(of, bits(rows) | bits(out), [&]<typename Element, int kValues>() {
    const Shape shape = shape_of(of, kValues, 0, false);
    if (shape.token_blocks == 0) return;
    using Values = Vector<Element, kValues>;
    sum_rows_of_tokens<Element, kValues><<<shape.token_blocks, kRowThreads, 0, stream>>>(
        shape, static_cast<const Values*>(rows), weights, of.slot_to_row,
        static_cast<Values*>(out));
  });
}

cudaError_t unpermute_backward(const Rows& of, const void* grad, const void* rows,
                               const float* weights, void* grad_rows, float* grad_weights,
                               cudaStream_t stream) {
  const uintptr_t pointers = bits(grad) | bits(rows) | bits(grad_rows);
  return with_vectors(of, pointers, [&]<typename Element, int kValues>() {
    const Shape shape = shape_of(of, kValues, kWarp, true);
    const unsigned blocks = shape.token_blocks + shape.padding_blocks;
    if (blocks == 0) return;
    using Values = Vector<Element, kValues>;
    unpermute_gradients<Element, kValues><<<blocks, kRowThreads, 0, stream>>>(
        shape, static_cast<const Values*>(grad), static_cast<const Values*>(rows), weights,
        of.row_to_slot, of.slot_to_row, static_cast<Values*>(grad_rows), grad_weights);
  });
}

}  // namespace carillon::moe_routing
