// What kernels are made for, where their predicates in select.cpp have to know it too.
#pragma once

#include "cpu/packed/call.h"

namespace bqnn {

constexpr int kFewRows = 8;  // rows of a matrix that the gemv kernels take

// A rectangle of output pixels whose tables of sums are made together, and the input pixels that it sees.
struct LookupTile {
  int64_t out_height, out_width, height, width;
};

inline LookupTile lookup_tile(const PackedCall& call) {
  constexpr int64_t kPixels = 32, kWidth = 16;  // as many as are transposed together
  const PackedLayout& layout = *call.weight;
  LookupTile t;
  t.out_width = call.out_width < kWidth ? call.out_width : kWidth;
  t.out_height = kPixels / t.out_width < call.out_height ? kPixels / t.out_width : call.out_height;
  t.height = (t.out_height - 1) * call.stride_h + (layout.kernel_h - 1) * call.dilation_h + 1;
  t.width = (t.out_width - 1) * call.stride_w + (layout.kernel_w - 1) * layout.dilation_w + 1;
  return t;
}

}  // namespace bqnn
