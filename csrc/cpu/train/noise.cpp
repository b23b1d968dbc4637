#include "cpu/train/noise.h"

#include "cpu/train/elementwise.h"

namespace bqnn {
namespace {

// Calls body(shape, tile) for every tile of the tensors; where all of them have one layout and the order of the
// elements is free, or is theirs, a tensor is a single row.
template <class F>
void for_each_tile(const Parallel& parallel, const PlaneShape& tensor, bool flat, const F& body) {
  const PlaneShape shape = flat ? PlaneShape{1, 1, tensor.batch * tensor.channels * tensor.pixels} : tensor;
  const int64_t width = shape.channels == 1 ? kTileRows * kTileColumns : kTileColumns;
  const int64_t across = (shape.pixels + width - 1) / width;
  const int64_t down = (shape.channels + kTileRows - 1) / kTileRows;
  parallel_for(parallel, shape.batch * down * across, kTileGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Tile tile;
      tile.image = i / (down * across);
      tile.row = i / across % down * kTileRows;
      tile.column = i % across * width;
      tile.rows = shape.channels - tile.row < kTileRows ? shape.channels - tile.row : kTileRows;
      tile.columns = shape.pixels - tile.column < width ? shape.pixels - tile.column : width;
      body(shape, tile);
    }
  });
}

bool planar(const Plane& a, const Plane& b) { return !a.interleaved && !b.interleaved; }

}  // namespace

void add_noise(const Parallel& parallel, Isa isa, const PlaneShape& shape, Plane mean, Plane variance, Noise noise,
               bool keep_slope) {
  const auto kernel = elementwise(isa).add_noise_tile;
  for_each_tile(parallel, shape, planar(mean, variance), [&](const PlaneShape& shape, const Tile& tile) {
    kernel(shape, tile, mean, variance, noise, keep_slope);
  });
}

void noise_gradient(const Parallel& parallel, Isa isa, const PlaneShape& shape, Plane grad, Plane variance, Noise noise,
                    Plane out) {
  const auto kernel = elementwise(isa).noise_gradient_tile;
  const bool flat = planar(grad, variance) && !out.interleaved;
  for_each_tile(parallel, shape, flat, [&](const PlaneShape& shape, const Tile& tile) {
    kernel(shape, tile, grad, variance, noise, out);
  });
}

void multiply(const Parallel& parallel, Isa isa, const PlaneShape& shape, Plane grad, Plane slope, Plane out) {
  const auto kernel = elementwise(isa).multiply_tile;
  const bool flat = grad.interleaved == slope.interleaved && slope.interleaved == out.interleaved;
  if (flat) grad.interleaved = slope.interleaved = out.interleaved = false;
  for_each_tile(parallel, shape, flat, [&](const PlaneShape& shape, const Tile& tile) {
    kernel(shape, tile, grad, slope, out);
  });
}

void square(const Parallel& parallel, Isa isa, const PlaneShape& shape, Plane x, Plane out) {
  const auto kernel = elementwise(isa).square_tile;
  const bool flat = x.interleaved == out.interleaved;
  if (flat) x.interleaved = out.interleaved = false;
  for_each_tile(parallel, shape, flat, [&](const PlaneShape& shape, const Tile& tile) { kernel(shape, tile, x, out); });
}

void add_square_gradient(const Parallel& parallel, Isa isa, const PlaneShape& shape, Plane grad, Plane x,
                         Plane grad_square) {
  const auto kernel = elementwise(isa).add_square_gradient_tile;
  const bool flat = grad.interleaved == x.interleaved && x.interleaved == grad_square.interleaved;
  if (flat) grad.interleaved = x.interleaved = grad_square.interleaved = false;
  for_each_tile(parallel, shape, flat, [&](const PlaneShape& shape, const Tile& tile) {
    kernel(shape, tile, grad, x, grad_square);
  });
}

}  // namespace bqnn
