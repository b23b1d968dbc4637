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

// --- what kernels are made for, where the table has to know it too ------------------------------------------------

constexpr int kFewRows = 8;  // rows of a matrix that the gemv kernels take

// A rectangle of output pixels whose tables of sums are made together, and the input pixels that it sees.
struct LookupTile {
  int64_t out_height, out_width, height, width;
};

inline LookupTile lookup_tile(const PackedCall& call) {
  constexpr int64_t kPixels = 32, kWidth = 16;  // 16 pixels are transposed together
  const PackedLayout& layout = *call.weight;
  LookupTile t;
  t.out_width = call.out_width < kWidth ? call.out_width : kWidth;
  t.out_height = kPixels / t.out_width < call.out_height ? kPixels / t.out_width : call.out_height;
  t.height = (t.out_height - 1) * call.stride_h + (layout.kernel_h - 1) * call.dilation_h + 1;
  t.width = (t.out_width - 1) * call.stride_w + (layout.kernel_w - 1) * layout.dilation_w + 1;
  return t;
}

}  // namespace bqnn
