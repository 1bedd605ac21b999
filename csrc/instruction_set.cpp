// The choice of an instruction set, once a process, and its limit.
#include "instruction_set.h"

#include <ATen/Version.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <string>

namespace carillon {
namespace {

constexpr std::array kNames = {"portable", "avx2", "avx512", "avx512_bf16"};
std::atomic<InstructionSet> limit{InstructionSet::kAvx512Bfloat16};

InstructionSet widest() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const std::string allowed = at::get_cpu_capability();
  const bool wide = allowed == "AVX512" && __builtin_cpu_supports("avx512f") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
  if (wide) {
    return __builtin_cpu_supports("avx512bf16") ? InstructionSet::kAvx512Bfloat16
                                                : InstructionSet::kAvx512;
  }
  if ((allowed == "AVX512" || allowed == "AVX2") && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma")) {
    return InstructionSet::kAvx2;
  }
#endif
  return InstructionSet::kPortable;
}

// Returns the set that runs from here on, which may be narrower than the limit.
std::string limit_instruction_set(std::string name) {
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  TORCH_CHECK_VALUE(found != kNames.end(),
                    "limit_instruction_set: portable, avx2, avx512 or avx512_bf16 is allowed, got ",
                    name);
  limit = static_cast<InstructionSet>(found - kNames.begin());
  return kNames[static_cast<size_t>(instruction_set())];
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet here = widest();
  return std::min(here, limit.load());
}

}  // namespace carillon

TORCH_LIBRARY_IMPL(carillon, CompositeImplicitAutograd, m) {
  m.impl("limit_instruction_set", &carillon::limit_instruction_set);
}
