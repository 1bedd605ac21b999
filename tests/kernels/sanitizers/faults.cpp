// Faults on purpose, for prove_sanitizers.py: a part of the sanitized module only (CMakeLists.txt),
// by the same flags, loops and tensors as the operators.
#include "cpu_dispatch.h"
#include "instruction_set.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace carillon::faults {
namespace {

using VectorSum = float (*)(const float*, int64_t, int64_t);

#define CARILLON_LOOPS "../tests/kernels/sanitizers/fault_loops.h"
#include "cpu_targets.h"

CARILLON_CPU_CLONES
float add_up(const float* from, int64_t first, int64_t last) {
  float sum = 0;
  for (int64_t i = first; i < last; ++i) sum += from[i];
  return sum;
}

// The sum of x's values [first, last), by a loop that the compiler clones.
double sum_between(const at::Tensor& x, int64_t first, int64_t last) {
  return add_up(x.const_data_ptr<float>(), first, last);
}

// The same by the vectors of the instruction set that runs.
double vector_sum_between(const at::Tensor& x, int64_t first, int64_t last) {
  return best_table()(x.const_data_ptr<float>(), first, last);
}

void write_at(const at::Tensor& x, int64_t index) { x.mutable_data_ptr<float>()[index] = 1.0f; }

int64_t add_int32(int64_t a, int64_t b) {
  return static_cast<int32_t>(a) + static_cast<int32_t>(b);
}

}  // namespace
}  // namespace carillon::faults

TORCH_LIBRARY(carillon_faults, m) {
  m.def("sum_between(Tensor x, int first, int last) -> float", &carillon::faults::sum_between);
  m.def("vector_sum_between(Tensor x, int first, int last) -> float",
        &carillon::faults::vector_sum_between);
  m.def("write_at(Tensor(a!) x, int index) -> ()", &carillon::faults::write_at);
  m.def("add_int32(int a, int b) -> int", &carillon::faults::add_int32);
}
