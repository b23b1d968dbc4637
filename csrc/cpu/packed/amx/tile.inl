// How packed_linear and packed_conv2d on AMX describe a product to their operands.
//
// Both are one product: a tile is 16 output positions (rows of a linear layer, pixels of a convolution) whose
// activations lie at a constant distance; K is walked in the segments of the layout, in steps of 64 bytes. An operand
// class `Op` has
//
//     Product                     float or int32_t, what is accumulated
//     kElement, kInt8             bytes of an activation, and whether it is an integer
//     kParts, kLevelParts         copies of the activations (a float32 is three bfloat16 parts), and of the levels
//     kAffine                     whether levels are offset + scale * what is multiplied, see affine_levels.h
//     panel_bytes(steps)          of one block of 16 channels
//     decode(layout, group, block, first_step, steps, panel)
//     multiply(tiles, blocks, strip, run, panel, panel_stride, out, accumulate)
//     pack_step, pack_run, pack_square: activations of 64 bytes, of a run, of 16 x 16 transposed ones
#pragma once

constexpr int kTile = 16;     // output positions in a tile
constexpr int kMaxTiles = 4;  // tiles that one call of multiply takes
constexpr int kWidth = 64;    // channels that a task computes together: the row length of its products

struct Strip {
  const char* const* tile;  // where the first row of each tile begins
  int64_t row, step, part;  // bytes from row to row of a tile, from step to step of K, from part to part
};

struct Run {
  int segments;
  int64_t steps;          // of each segment
  const int64_t* offset;  // [segments]: bytes from a position's first activation to the segment's
};
