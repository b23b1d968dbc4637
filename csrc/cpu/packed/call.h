// What the packed kernels are called with; each instruction set has its own pair of functions.
#pragma once

#include <cstdint>

#include "cpu/train/codebook.h"
#include "cpu/base/isa.h"
#include "cpu/packed/layout.h"
#include "cpu/base/parallel.h"

namespace bqnn {

// Elements of activations and outputs: float, or bfloat16 as its 16 bits.
using Bf16 = uint16_t;

struct LinearCall {
  const PackedLayout* weight;
  const void* x;      // [rows, columns], contiguous
  void* y;            // [rows, channels], contiguous
  const float* bias;  // [channels] or null
  int64_t rows;
  bool half;  // x and y are bfloat16
  bool relu;  // negative outputs become 0
};

struct Conv2dCall {
  const PackedLayout* weight;
  const void* x;  // [images, inputs * groups, height, width]
  void* y;        // [images, channels, out_height, out_width]
  const float* bias;
  int64_t images, height, width, out_height, out_width;
  int stride_h, stride_w, padding_h, padding_w, dilation_h;
  bool channels_last;  // both x and y, else both contiguous
  bool half;
  bool relu;
};

struct PackedKernels {
  void (*linear)(const LinearCall&, const Parallel&);
  void (*conv2d)(const Conv2dCall&, const Parallel&);
};

const PackedKernels& packed_kernels(Isa isa);

}  // namespace bqnn
