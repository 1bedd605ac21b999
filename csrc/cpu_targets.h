// Compiles CARILLON_LOOPS, a header of loops on vectors.h, products.h and packing.h, once for each
// instruction set, into namespaces of those names, and picks one when it runs. Each set has the
// same names in it, kTable among them: the functions that others call.
//
// Include it inside the namespace where those shall stand, after every other header: what is
// defined between the pragmas may use the widest instructions. Vectors are the compiler's own, so
// one source serves every width (CARILLON_WIDTH, floats a vector) and processor; CARILLON_PAIRS
// says whether there are products of bfloat16 pairs.

#define CARILLON_NOINLINE __attribute__((noinline))

// Any processor: 16-byte vectors are part of x86-64 and of 64-bit ARM.
namespace portable {
#define CARILLON_WIDTH 4
#define CARILLON_PAIRS false
#include "vectors.h"
#include "products.h"
#include "packing.h"
#include CARILLON_LOOPS
#undef CARILLON_WIDTH
#undef CARILLON_PAIRS
}  // namespace portable

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define CARILLON_WIDTH 8
#define CARILLON_PAIRS false
#include "vectors.h"
#include "products.h"
#include "packing.h"
#include CARILLON_LOOPS
#undef CARILLON_WIDTH
#undef CARILLON_PAIRS
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#define CARILLON_WIDTH 16
#define CARILLON_PAIRS false
#include "vectors.h"
#include "products.h"
#include "packing.h"
#include CARILLON_LOOPS
#undef CARILLON_WIDTH
#undef CARILLON_PAIRS
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
namespace avx512_bf16 {
#define CARILLON_WIDTH 16
#define CARILLON_PAIRS true
#include "vectors.h"
#include "products.h"
#include "packing.h"
#include CARILLON_LOOPS
#undef CARILLON_WIDTH
#undef CARILLON_PAIRS
}  // namespace avx512_bf16
#pragma GCC pop_options

inline const auto& best_table() {
  switch (instruction_set()) {
    case InstructionSet::kAvx512Bfloat16:
      return avx512_bf16::kTable;
    case InstructionSet::kAvx512:
      return avx512::kTable;
    case InstructionSet::kAvx2:
      return avx2::kTable;
    default:
      return portable::kTable;
  }
}

#else
inline const auto& best_table() { return portable::kTable; }
#endif
