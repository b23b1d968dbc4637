// Which packed kernel runs: one table for packed_linear and one for packed_conv2d.
#pragma once

#include "cpu/base/isa.h"
#include "cpu/packed/call.h"

namespace bqnn {

enum class PackedOp { linear, conv2d };

// Runs a call by the first kernel of its table that fits it and can multiply its activations. Returns the kernel's
// name: the instruction set, what multiplies, the family.
const char* run_packed(PackedOp op, Isa isa, const PackedCall& call, const Parallel& parallel);

// The form that any kernel of this instruction set would read of the layout of `weight`, whose form does not count.
LayoutForm form_read(PackedOp op, Isa isa, const PackedWeight& weight);

}  // namespace bqnn
