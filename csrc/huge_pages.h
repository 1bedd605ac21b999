// Large results on 2 MiB pages: a fresh buffer of hundreds of megabytes costs a page fault every
// 4 KiB otherwise, which is as long as filling it takes.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace carillon {

inline constexpr int64_t kHugePageBytes = int64_t{2} << 20;

// at::empty, with the kernel asked for huge pages where the buffer spans several; a refusal (huge
// pages switched off) changes nothing but the time.
inline at::Tensor empty_on_huge_pages(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor out = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto begin = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const uintptr_t last = (begin + out.nbytes()) / kHugePageBytes * kHugePageBytes;
  if (out.nbytes() >= 4 * kHugePageBytes && last > first) {
    static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE));
  }
#endif
  return out;
}

}  // namespace carillon
