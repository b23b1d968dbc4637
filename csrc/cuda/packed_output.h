// From the sums of a block's products to outputs: what each thread adds, in which order, and where it writes. As
// packed_tile.h, for the host too.
#pragma once

#include "cuda/packed_tile.h"

namespace bqnn::cuda {

// A sum is a float32 or, in int8, an int32, and is kept as 32 bits. The products of a step are added apart, and then to
// the others': a tensor core cuts off where it adds, and a step's products of integers are exact in its float32.
static_assert(Codes<2>::kInStep * 127 * 127 < 1 << 24 && Codes<2>::kInStep >= Codes<4>::kInStep);

BQNN_HOST_DEVICE uint32_t add_step(uint32_t sum, float step, Mode mode) {
#ifdef __CUDA_ARCH__
  if (mode == Mode::int8) return sum + static_cast<uint32_t>(__float2int_rn(step));
#else
  if (mode == Mode::int8) return sum + static_cast<uint32_t>(static_cast<int32_t>(step));
#endif
  return bits_of(float_of(sum) + step);
}

BQNN_HOST_DEVICE uint32_t add_sums(uint32_t a, uint32_t b, Mode mode) {
  return mode == Mode::int8 ? a + b : bits_of(float_of(a) + float_of(b));
}

// Capacity 2: the product with the levels, of the sum of the activations, and of that with the signs 1 - 2 code.
BQNN_HOST_DEVICE uint32_t levels_of_signs(const PackedLinearCall& call, int64_t codebook, uint32_t total,
                                          uint32_t signs) {
  const float low = level_of(call, codebook, 0), high = level_of(call, codebook, 1);
  if (call.mode == Mode::int8) {
    const int64_t all = static_cast<int32_t>(total), difference = static_cast<int32_t>(signs);
    const int64_t zeros = (all + difference) / 2, ones = (all - difference) / 2;
    return static_cast<uint32_t>(zeros * static_cast<int64_t>(low) + ones * static_cast<int64_t>(high));
  }
  const float zeros = 0.5f * (float_of(total) + float_of(signs)), ones = 0.5f * (float_of(total) - float_of(signs));
  return bits_of(zeros * low + ones * high);
}

// The output of a sum over all columns.
BQNN_HOST_DEVICE void finish(const PackedLinearCall& call, uint32_t sum, int x_row, int64_t row) {
  float value = float_of(sum);
  if (call.mode == Mode::int8) {
    const float scale = call.scale[call.codebooks == 1 ? 0 : row];
    // The rule of int8 rounds each operation; a fused multiply-add would not.
#ifdef __CUDA_ARCH__
    value = __fmul_rn(__fmul_rn(static_cast<float>(static_cast<int32_t>(sum)), scale), call.row_scale[x_row]);
#else
    value = static_cast<float>(static_cast<int32_t>(sum)) * scale * call.row_scale[x_row];
#endif
  }
#ifdef __CUDA_ARCH__
  if (call.bias) value = __fadd_rn(value, call.bias[row]);
#else
  if (call.bias) value = value + call.bias[row];
#endif
  if (call.relu && value < 0.0f) value = 0.0f;  // NaN and -0.0 stay, as in torch
  const int64_t place = x_row * call.channels + row;
  if (call.y_element == Element::float32) {
    static_cast<float*>(call.y)[place] = value;
  } else if (call.y_element == Element::bfloat16) {
    static_cast<uint16_t*>(call.y)[place] = static_cast<uint16_t>(bits_of(round_bfloat16(value)) >> 16);
  } else {
#ifdef __CUDA_ARCH__
    static_cast<__half*>(call.y)[place] = __float2half_rn(value);
#else
    static_cast<_Float16*>(call.y)[place] = static_cast<_Float16>(value);
#endif
  }
}

// Where a warp leaves the sum of a row of the block and a column of the activations, for gather().
template <class T>
BQNN_HOST_DEVICE int sum_place(const Tile<T>& tile, int column_warp, int row, int column) {
  return (column_warp * tile.block_rows + row) * tile.columns + column;
}

// Thread `thread` leaves sum c of row tile `tile_row` and column tile n of its product; `total` is for capacity 2.
template <class T>
BQNN_HOST_DEVICE void leave_sum(const PackedLinearCall& call, const Tile<T>& tile, int thread, int tile_row, int n,
                                int c, uint32_t sum, uint32_t total, Unit* shared) {
  const int row = lane_row(tile, thread, 2 * tile_row + c / 2), column = kTileColumns * n + thread % 4 * 2 + c % 2;
  if (column >= tile.columns) return;
  if constexpr (T::kCapacity == 2) sum = levels_of_signs(call, codebook_of(call, tile, row), total, sum);
  reinterpret_cast<uint32_t*>(shared)[sum_place(tile, column_warp_of(tile, thread), row, column)] = sum;
}

// Thread `thread` adds its share of the sums, over warps and parts, and writes outputs or what another kernel adds.
template <class T>
BQNN_HOST_DEVICE void gather(const PackedLinearCall& call, const Tile<T>& tile, int thread, int split,
                             const Unit* shared) {
  const uint32_t* sums = reinterpret_cast<const uint32_t*>(shared);
  for (int item = thread; item < tile.block_rows * tile.x_rows; item += kThreads) {
    const int in_block = item % tile.block_rows, x_row = item / tile.block_rows;
    const int64_t row = tile.first_row + in_block;
    if (row >= call.channels) continue;
    uint32_t sum = 0;
    for (int part = tile.parts - 1; part >= 0; --part)  // the least first
      for (int warp = 0; warp < tile.column_warps; ++warp)
        sum = add_sums(sum, sums[sum_place(tile, warp, in_block, x_row * tile.parts + part)], call.mode);
    const int all_row = tile.first_x_row + x_row;
    if (call.splits == 1) {
      finish(call, sum, all_row, row);
    } else {
      call.partial[(static_cast<int64_t>(split) * call.rows + all_row) * call.channels + row] = sum;
    }
  }
}

// Adds what the splits left of output `index`, over [rows, channels].
BQNN_HOST_DEVICE void add_splits(const PackedLinearCall& call, int64_t index) {
  uint32_t sum = 0;
  for (int split = 0; split < call.splits; ++split)
    sum = add_sums(sum, call.partial[split * call.rows * call.channels + index], call.mode);
  finish(call, sum, static_cast<int>(index / call.channels), index % call.channels);
}

}  // namespace bqnn::cuda
