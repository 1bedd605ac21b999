// All of packed_attention's CPU kernels for one instruction set. cpu.cpp includes it once for each,
// between pragmas that name the target, with these set: CARILLON_SET (the namespace),
// CARILLON_WIDTH (floats a vector) and CARILLON_PAIRS (products of bfloat16 pairs, or 0).
// Vectors are the compiler's own, so one source serves every width and processor.

namespace carillon::packed_attention::CARILLON_SET {

#include "vectors.h"

#include "products.h"

#include "packing.h"

#include "forward.h"

#include "backward.h"

constexpr Kernels kKernels = {
    &forward<float, false>,
    &forward<uint16_t, CARILLON_PAIRS>,
    &backward<float, false>,
    &backward<uint16_t, CARILLON_PAIRS>,
    &forward_scratch,
    &backward_scratch,
};

}  // namespace carillon::packed_attention::CARILLON_SET

#undef CARILLON_SET
#undef CARILLON_WIDTH
#undef CARILLON_PAIRS
