// The kernels of all pairs: products of tiles, which an Epilogue (cuda_reduce.h, cuda_sigmoid.h,
// cuda_weights.h) reduces or turns into weights in the registers where they end.
//
// bfloat16: persistent blocks of one warp that copies and two warpgroups that multiply, each 64
// rows by 256 columns of a tile. The copy engine fills a ring of kStages buffers; it runs ahead
// into the next tile while this one's epilogue runs, and the two warpgroups share no barrier but
// the ring's, so that one's epilogue can hide behind the other's products. Thread block clusters
// with multicast copies are left out.
// float32: products in FFMA instructions (cuda_product.h).
// Status: compiles for sm_90a; its data flow runs in the CPU tests; not run on a GPU yet.
#pragma once

#include "cuda_lanes.h"
#include "cuda_product.h"
#include "hopper.h"

namespace carillon::contrastive {

constexpr int kStages = 4;
constexpr int kStepDims = hopper::kSwizzleBytes / 2;  // of bfloat16
constexpr int kRowsBytes = kTileRows * hopper::kSwizzleBytes;
constexpr int kColumnsBytes = kTileColumns * hopper::kSwizzleBytes;
constexpr int kThreads = (1 + kGroups) * hopper::kGroupThreads;
constexpr int kFloatThreads = kGroups * hopper::kGroupThreads;
// Of a thread, in units of 8: (128 * 40 + 256 * 232) registers are within a processor's 65,536.
constexpr int kCopyRegisters = 40;
constexpr int kMultiplyRegisters = 232;

struct alignas(1024) TensorShared {
  uint8_t rows[kStages][kRowsBytes];
  uint8_t columns[kStages][kColumnsBytes];
  float values[kGroups][kSharedValues];
  uint64_t full[kStages];
  uint64_t empty[kStages];
};
// Shared memory starts at any multiple of 16: room to align it.
constexpr int kSharedBytes = sizeof(TensorShared) + alignof(TensorShared);
static_assert(kSharedBytes <= 227 * 1024, "more shared memory than a block of sm_90 can have");

// The warpgroup, as cuda_lanes.h wants it. `Value` is float, or uint16_t for bfloat16's bits.
template <typename Value>
struct Warpgroup {
  using Element = Value;
  int thread;
  int number;  // its barrier: 0 is that of the whole block
  float* values;

  __device__ float* shared() { return values; }

  template <typename T>
  __device__ T exchange(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
  }

  __device__ void wait() {
    asm volatile("bar.sync %0, 128;" ::"r"(number + 1) : "memory");
  }

  __device__ bool any(bool flag) {
    int result;
    asm volatile(
        "{.reg .pred mine, all;\n"
        "setp.ne.s32 mine, %2, 0;\n"
        "bar.red.or.pred all, %1, 128, mine;\n"
        "selp.s32 %0, 1, 0, all;}"
        : "=r"(result)
        : "r"(number + 1), "r"(static_cast<int>(flag))
        : "memory");
    return result != 0;
  }

  __device__ void store(uint16_t* to, const uint32_t (&words)[4]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
  __device__ void store(float* to, float first, float second) {
    *reinterpret_cast<float2*>(to) = make_float2(first, second);
  }
};

#ifdef CARILLON_SM90A

// One thread's work: every step of every tile into the next free buffer.
template <class Plan>
__device__ __forceinline__ void copy_tiles(const Plan& plan, const CUtensorMap* rows,
                                           const CUtensorMap* columns, int steps,
                                           TensorShared& shared) {
  hopper::prefetch_map(rows);
  hopper::prefetch_map(columns);
  hopper::RingPosition ring;
  for_each_tile(
      plan, blockIdx.x, [](int) {},
      [&](int64_t row, int64_t column) {
        for (int step = 0; step < steps; ++step) {
          uint64_t* full = &shared.full[ring.stage];
          hopper::wait(&shared.empty[ring.stage], ring.phase ^ 1);
          hopper::arrive_and_expect(full, kRowsBytes + kColumnsBytes);
          hopper::copy_box(shared.rows[ring.stage], rows, step * kStepDims, static_cast<int>(row),
                           full);
          hopper::copy_box(shared.columns[ring.stage], columns, step * kStepDims,
                           static_cast<int>(column), full);
          ring.advance(kStages);
        }
      },
      [](int64_t) {});
}

// One tile's products. A buffer is free once the products that read it are done: those of the step
// before, so that one group of products is always in flight.
__device__ __forceinline__ void multiply_tile(TensorShared& shared, int group, int steps,
                                              hopper::RingPosition& ring,
                                              float (&sums)[kRegisters]) {
  const bool signals = threadIdx.x % 32 == 0;
  uint64_t* to_free = nullptr;
  for (int step = 0; step < steps; ++step) {
    hopper::wait(&shared.full[ring.stage], ring.phase);
    const uint32_t rows = hopper::shared_address(shared.rows[ring.stage]) +
                          group * hopper::kGroupRows * hopper::kSwizzleBytes;
    const uint32_t columns = hopper::shared_address(shared.columns[ring.stage]);
    hopper::begin_products();
#pragma unroll
    for (int k = 0; k < kStepDims / hopper::kInstructionDims; ++k) {
      const int offset = k * hopper::kInstructionDims * 2;
      hopper::multiply_64x256x16(sums, hopper::operand_descriptor(rows + offset),
                                 hopper::operand_descriptor(columns + offset),
                                 step > 0 || k > 0);
    }
    hopper::commit_products();
    hopper::wait_for_products<1>();
    if (to_free != nullptr && signals) hopper::arrive(to_free);
    to_free = &shared.empty[ring.stage];
    ring.advance(kStages);
  }
  hopper::wait_for_products<0>();
  hopper::hold(sums);
  if (signals) hopper::arrive(to_free);
}

#endif

template <template <class> class Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    wgmma_tiles(const __grid_constant__ CUtensorMap rows,
                const __grid_constant__ CUtensorMap columns, int steps,
                const __grid_constant__
                typename Epilogue<Warpgroup<uint16_t>>::Arguments arguments) {
#ifdef CARILLON_SM90A
  extern __shared__ uint8_t unaligned[];
  const uint32_t past = hopper::shared_address(unaligned) % alignof(TensorShared);
  TensorShared& shared = *reinterpret_cast<TensorShared*>(
      unaligned + (past == 0 ? 0 : alignof(TensorShared) - past));
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      hopper::init_barrier(&shared.full[stage], 1);
      hopper::init_barrier(&shared.empty[stage], kGroups * kWarps);
    }
    hopper::publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < hopper::kGroupThreads) {
    hopper::give_registers<kCopyRegisters>();
    if (threadIdx.x == 0) copy_tiles(arguments.plan, &rows, &columns, steps, shared);
  } else {
    hopper::take_registers<kMultiplyRegisters>();
    const int thread = threadIdx.x % hopper::kGroupThreads;
    const int group = threadIdx.x / hopper::kGroupThreads - 1;
    Warpgroup<uint16_t> threads{thread, group, shared.values[group]};
    Epilogue<Warpgroup<uint16_t>> epilogue(threads, arguments, blockIdx.x, group);
    hopper::RingPosition ring;
    for_each_tile(
        arguments.plan, blockIdx.x, [&](int unit) { epilogue.start_unit(unit); },
        [&](int64_t row, int64_t column) {
          float sums[kRegisters];
          multiply_tile(shared, group, steps, ring, sums);
          epilogue.add_tile(sums, row + group * hopper::kGroupRows, column);
        },
        [&](int64_t row) { epilogue.end_unit(row + group * hopper::kGroupRows); });
    epilogue.finish();
  }
#endif
}

template <template <class> class Epilogue>
__global__ void __launch_bounds__(kFloatThreads, 1)
    ffma_tiles(const float* __restrict__ rows, const float* __restrict__ columns, int64_t dims,
               const __grid_constant__ typename Epilogue<Warpgroup<float>>::Arguments arguments) {
  __shared__ FloatStep step;
  __shared__ float values[kGroups][kSharedValues];
  const int thread = threadIdx.x % hopper::kGroupThreads;
  const int group = threadIdx.x / hopper::kGroupThreads;
  Warpgroup<float> threads{thread, group, values[group]};
  Epilogue<Warpgroup<float>> epilogue(threads, arguments, blockIdx.x, group);
  const PairArguments& pairs = arguments.pairs;
  for_each_tile(
      arguments.plan, blockIdx.x, [&](int unit) { epilogue.start_unit(unit); },
      [&](int64_t row, int64_t column) {
        float sums[kRegisters] = {};
        for (int64_t dim = 0; dim < dims; dim += kFloatStepDims) {
          __syncthreads();
          load_step(rows, row, pairs.num_rows, dim, dims, kTileRows, kRowLine, step.rows,
                    threadIdx.x, kFloatThreads);
          load_step(columns, column, pairs.num_columns, dim, dims, kTileColumns, kColumnLine,
                    step.columns, threadIdx.x, kFloatThreads);
          __syncthreads();
          multiply_step(step, group, thread, sums);
        }
        epilogue.add_tile(sums, row + group * hopper::kGroupRows, column);
      },
      [&](int64_t row) { epilogue.end_unit(row + group * hopper::kGroupRows); });
  epilogue.finish();
}

}  // namespace carillon::contrastive
