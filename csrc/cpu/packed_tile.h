// How the drivers of packed_linear and packed_conv2d describe a product to the operands of an instruction set.
//
// Included once by each instruction set's translation unit, inside its namespace. Both ops are one product: a tile is
// 16 output positions (rows of a linear layer, pixels of a convolution) whose activations lie at a constant distance;
// K is walked in runs (the segments of the layout) of 64-byte steps. An operand class `Op` provides
//
//     Product                        float or int32_t, what is accumulated
//     kParts                         copies of the activations (a float32 is three bfloat16 parts), `part` bytes apart
//     kTileRows                      rows a tile always computes, or 0 where it takes any number up to 16
//     panel_bytes(steps)             of one block of 16 channels
//     decode(layout, group, block, first_step, steps, panel)
//     multiply(tiles, blocks, rows, strip, run, panel, panel_stride, out, accumulate)
//
// and the packers of activations that the drivers ask for.
#pragma once

constexpr int kTile = 16;      // output positions in a tile
constexpr int kMaxTiles = 4;   // tiles, and blocks of channels, that one call of multiply takes
constexpr int kWidth = 64;  // channels that a task computes together: the row length of its products

struct Strip {
  const char* const* tile;  // where the first row of each tile begins
  int64_t row, step, part;  // bytes from row to row of a tile, from step to step of K, from part to part
};

struct Run {
  int segments;
  int64_t steps;          // of each segment
  int64_t length;         // weights of each segment
  const int64_t* offset;  // [segments]: bytes from a position's first activation to the segment's
};
