// Which instruction set the kernels of this process use: probed once, lowered by BQNN_CPU_ISA.
#pragma once

namespace bqnn {

enum class Isa { scalar, avx2, avx512, amx };

constexpr int kIsas = 4;

// The lower-case name, as BQNN_CPU_ISA takes it.
const char* isa_name(Isa isa);

// What the processor and the operating system allow; asks the system for AMX tile data where there are tiles.
Isa best_isa();

// best_isa(), or the lower one that BQNN_CPU_ISA names. Returns false where the variable holds something else, and
// then `error` says what.
bool chosen_isa(Isa* isa, const char** error);

}  // namespace bqnn
