// Which of a CPU provider's instruction sets runs: the widest that the processor has.
#pragma once

namespace carillon {

enum class InstructionSet { kPortable, kAvx2, kAvx512, kAvx512Bfloat16 };

// At most what torch itself uses (its ATEN_CPU_CAPABILITY limits both), and at most the limit that
// torch.ops.carillon.limit_instruction_set has set: tests run the narrower sets by it.
InstructionSet instruction_set();

}  // namespace carillon
