// All of packed_attention's CPU kernels, compiled once per instruction set (cpu_targets.h).

#include "forward.h"

#include "backward.h"

constexpr Kernels kTable = {
    &forward<float, false>,
    &forward<uint16_t, CARILLON_PAIRS>,
    &backward<float, false>,
    &backward<uint16_t, CARILLON_PAIRS>,
    &forward_scratch,
    &backward_scratch,
};
