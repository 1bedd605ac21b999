// Compiles a header of loops (CARILLON_LOOPS) once per instruction set, on top of cpu_tiles.h, and
// picks one at run time: carillon::<...>::avx512_bf16, avx512, avx2 and portable are namespaces with
// the same names in them. Include it where those namespaces shall stand, after every other header:
// what is defined between the pragmas may use the widest instructions.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CARILLON_X86_TARGETS 1

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#define CARILLON_VECTOR 16
#define CARILLON_TILE_ROWS 12
#define CARILLON_HAS_BFLOAT16
namespace avx512_bf16 {
#include "cpu_tiles.h"
#include CARILLON_LOOPS
}  // namespace avx512_bf16
#undef CARILLON_HAS_BFLOAT16
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
#include "cpu_tiles.h"
#include CARILLON_LOOPS
}  // namespace avx512
#undef CARILLON_TILE_ROWS
#undef CARILLON_VECTOR
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define CARILLON_VECTOR 8
#define CARILLON_TILE_ROWS 6
namespace avx2 {
#include "cpu_tiles.h"
#include CARILLON_LOOPS
}  // namespace avx2
#undef CARILLON_TILE_ROWS
#undef CARILLON_VECTOR
#pragma GCC pop_options
#endif

#define CARILLON_VECTOR 4
#define CARILLON_TILE_ROWS 4
namespace portable {
#include "cpu_tiles.h"
#include CARILLON_LOOPS
}  // namespace portable
#undef CARILLON_TILE_ROWS
#undef CARILLON_VECTOR
#undef CARILLON_INLINE
