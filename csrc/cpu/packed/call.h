// What the packed kernels are called with: one description for packed_linear and packed_conv2d.
#pragma once

#include <cstdint>

#include "cpu/base/parallel.h"
#include "cpu/packed/layout.h"

namespace bqnn {

using Bfloat16 = uint16_t;  // a bfloat16 number as its bits

enum class Dtype : int32_t { float32, bfloat16 };
enum class Format : int32_t { contiguous, channels_last };
enum class Activation : int32_t { none, relu };

// Images [images, channels, height, width] in memory, perhaps some channels of a tensor that has more. The planes of a
// contiguous image lie one after the other; the channels of a channels-last pixel likewise. A matrix is channels-last:
// its rows are images of one pixel.
struct View {
  void* data;  // kernels only read that of an input
  Dtype dtype;
  Format format;
  int64_t image_stride;  // elements from an image, or a row of a matrix, to the next
  int64_t pixel_stride;  // elements from a channels-last pixel to the next
  int64_t offset;        // elements from `data` to the first channel
};

struct PackedCall {
  const PackedLayout* weight;
  View x;             // [images, inputs * groups, height, width]
  View y;             // [images, channels, out_height, out_width]
  const float* bias;  // [channels] or null
  Activation activation;
  int64_t images, height, width, out_height, out_width;
  int stride_h, stride_w, padding_h, padding_w, dilation_h;
};

// The call of a linear layer: x and y are matrices of so many rows.
inline PackedCall linear_call(const PackedLayout* weight, const View& x, const View& y, const float* bias,
                              Activation activation, int64_t rows) {
  return {weight, x, y, bias, activation, rows, 1, 1, 1, 1, 1, 1, 0, 0, 1};
}

// Runs a call. False where the kernel can not multiply one of the activations: then y holds nothing of use.
using PackedKernel = bool(const PackedCall& call, const Parallel& parallel);

}  // namespace bqnn
