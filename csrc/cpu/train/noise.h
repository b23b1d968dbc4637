// What the training kernels take: noise, elements in memory, and the outputs of a product.
#pragma once

#include <cstdint>

#include "cpu/base/isa.h"
#include "cpu/base/parallel.h"

namespace bqnn {

// Element i of a tensor is number i % 4 of the Philox call offset + i / 4.
struct Noise {
  uint64_t seed, offset;
};

// float32 numbers, or bfloat16 ones.
struct Elements {
  void* data;
  bool bfloat16;
};

// A tensor of the outputs' shape: [batch, channels, pixels], or [batch, pixels, channels] where `interleaved`.
struct Plane {
  Elements elements;
  bool interleaved;
};

// Counts; a tensor without channels is one of one channel.
struct PlaneShape {
  int64_t batch, channels, pixels;
};

constexpr int kTileRows = 16, kTileColumns = 128;  // three float tiles of this size stay in the L1 cache
constexpr int kTileGrain = 8;                      // so many tiles repay waking a thread

// Rows are channels and columns pixels.
struct Tile {
  int64_t image, row, column, rows, columns;
};

// mean += sqrt(max(variance, 0)) * noise. Where `keep_slope`, noise / (2 sqrt(variance)), the outputs' derivative for the
// variance, takes its place; 0 where that is not positive.
void add_noise(const Parallel& parallel, Isa isa, const PlaneShape& shape, Plane mean, Plane variance, Noise noise,
               bool keep_slope);

// out = grad * noise / (2 sqrt(variance)), the gradient for the variance; 0 where that is not positive.
void noise_gradient(const Parallel& parallel, Isa isa, const PlaneShape& shape, Plane grad, Plane variance, Noise noise,
                    Plane out);

// out = grad * slope.
void multiply(const Parallel& parallel, Isa isa, const PlaneShape& shape, Plane grad, Plane slope, Plane out);

// out = x * x.
void square(const Parallel& parallel, Isa isa, const PlaneShape& shape, Plane x, Plane out);

// grad += 2 x * grad_square.
void add_square_gradient(const Parallel& parallel, Isa isa, const PlaneShape& shape, Plane grad, Plane x,
                         Plane grad_square);

}  // namespace bqnn
