// The work of one thread in each phase of the kernel, but for the product itself: which bytes it reads and writes, and
// in which order it adds. All of it compiles for the host, where tests walk blocks, threads and lanes.
//
// A block has 8 warps. A warp takes kRowTiles times 16 rows of the weight, the m16 side of mma.m16n8k16; the columns of
// the activations are its n8 side: a row of x is one column, or one for each of its bfloat16 parts. Lane 4 g + t
// loads 16 bytes of row g, load 4 step + t of that row, and likewise of rows g + 8, g + 16, ...: a step is 64 bytes of
// each row. Since a product adds over k in any order, codes need not move between lanes: the activations that go with
// them are put into shared memory in the order of decoding, as 16-byte units
//
//     unit (((step * kUnits + word * kQuads + quad) * columns + column) * 4 + t)
//
// which all lanes of a warp read without bank conflicts. Shared memory holds a slice of the columns at a time.
#pragma once

#include "cuda/packed_codes.h"
#include "cuda/packed_linear.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace bqnn::cuda {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kTileRows = 16;           // rows of the weight in one product
constexpr int kTileColumns = 8;         // columns of the activations in one product
constexpr uint32_t kOnes = 0x3f803f80;  // 1.0 twice
// Units of shared memory, 16 bytes each: 32 KiB, which every architecture has twice in a multiprocessor.
constexpr int kSharedUnits = 2048;

struct alignas(16) Unit {
  uint32_t words[4];
};

// A kernel: what its decoder has room for, the bfloat16 parts of a level, and n8 tiles of activations.
template <int kCapacity_, int kParts_, int kColumnTiles_>
struct LinearTraits {
  static constexpr int kCapacity = kCapacity_, kParts = kParts_, kColumnTiles = kColumnTiles_;
  using Code = Codes<kCapacity>;
  static constexpr int kUnits = 4 * Code::kQuads;         // units that a lane reads in a step for one column
  // Three tables a row, or three tiles of sums, leave registers for two rows a lane.
  static constexpr int kRowTiles = kParts == 1 && kColumnTiles < 3 ? 2 : 1;
  static constexpr int kLaneRows = 2 * kRowTiles;
  static constexpr int kWarpRows = kTileRows * kRowTiles;
  static constexpr int kMaxColumns = kTileColumns * kColumnTiles;
  // Steps whose loads are under way: 16 * kLaneRows bytes a lane each, as many as registers allow.
  static constexpr int kDepth = (kColumnTiles == 1 ? 3 : 2) - (kCapacity == 4 ? 0 : 1);
  // On a multiprocessor, whose registers are 128 a thread of two; six tables and three tiles of sums take more.
  static constexpr int kBlocks = kCapacity == 16 && kParts * kColumnTiles == 9 ? 1 : 2;
  static_assert(kParts == 1 || kCapacity > 2, "one bit needs no parts: its levels come in at the end");
};

// Where a block is, and how it divides its work.
template <class T>
struct Tile {
  int columns;             // columns of the activations, all parts of them
  int parts;               // parts of a row of x: column = row * parts + part
  int first_x_row, x_rows;
  int column_warps;        // warps that share rows and divide the columns
  int block_rows;          // rows of the weight in a block
  int64_t first_row;
  int begin, end;          // the steps of this block
  int slice;               // steps that shared memory holds, a multiple of column_warps * kDepth

  BQNN_HOST_DEVICE Tile(const PackedLinearCall& call, int parts_, int64_t block_x, int block_y, int block_z)
      : parts(parts_) {
    const int group = T::kMaxColumns / parts;
    first_x_row = block_z * group;
    x_rows = call.rows - first_x_row < group ? call.rows - first_x_row : group;
    columns = x_rows * parts;
    column_warps = kWarps / call.row_warps;
    block_rows = T::kWarpRows * call.row_warps;
    first_row = block_x * block_rows;
    const int steps = (call.row_loads + 3) / 4;
    const int share = (steps + call.splits - 1) / call.splits;
    begin = block_y * share < steps ? block_y * share : steps;
    end = begin + share < steps ? begin + share : steps;
    const int stride = column_warps * T::kDepth;
    slice = kSharedUnits / (T::kUnits * columns * 4) / stride * stride;
  }
};

BQNN_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// --- lanes --------------------------------------------------------------------------------------------------------

// Of the warps of a block, those that share rows stand side by side; thread = 32 warp + 4 g + t.
template <class T>
BQNN_HOST_DEVICE int column_warp_of(const Tile<T>& tile, int thread) {
  return thread / 32 % tile.column_warps;
}

// The i-th row that a thread decodes, in the block; it multiplies rows 2 j and 2 j + 1 together, g and g + 8 of a tile.
template <class T>
BQNN_HOST_DEVICE int lane_row(const Tile<T>& tile, int thread, int i) {
  return thread / 32 / tile.column_warps * T::kWarpRows + thread % 32 / 4 + 8 * i;
}

// Its load of step 0 for that row, among those of the weight; of step s it is 4 s later. Past the last row, the last.
template <class T>
BQNN_HOST_DEVICE int load_place(const PackedLinearCall& call, const Tile<T>& tile, int thread, int i) {
  const int64_t row = smaller(tile.first_row + lane_row(tile, thread, i), call.channels - 1);
  return static_cast<int>(row * call.row_loads + thread % 4);
}

// Whether step `step` has something to load for the thread; else it decodes zeros, and meets activations that are 0.
template <class T>
BQNN_HOST_DEVICE bool loads_in(const PackedLinearCall& call, const Tile<T>& tile, int thread, int step) {
  return step < tile.end && 4 * step + thread % 4 < call.row_loads;
}

// Its activations of tile n among the units of one word and quad; past the last column, the last.
template <class T>
BQNN_HOST_DEVICE int x_place(const Tile<T>& tile, int thread, int n) {
  return static_cast<int>(smaller(kTileColumns * n + thread % 32 / 4, tile.columns - 1)) * 4 + thread % 4;
}

// --- activations --------------------------------------------------------------------------------------------------

BQNN_HOST_DEVICE float load_activation(const void* x, Element element, int64_t index) {
  if (element == Element::float32) return static_cast<const float*>(x)[index];
  const uint32_t bits = static_cast<const uint16_t*>(x)[index];
  if (element == Element::bfloat16) return float_of(bits << 16);
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
#else
  const uint32_t sign = (bits & 0x8000) << 16, size = bits & 0x7fff;
  // A half's exponent is 112 less; multiplying by 2^112 gives its subnormal numbers too.
  const float value = size >= 0x7c00 ? float_of(0x7f800000u | (size & 0x3ff) << 13) : float_of(size << 13) * 0x1p112f;
  return float_of(bits_of(value) | sign);
#endif
}

// The rule of "int8", as the Python reference has it: q = rint((x * lift) * factor), which is x / scale.
struct Rounding {
  float lift, factor, scale;
};

// Magnitudes compare as their bits do, NaN above infinity.
BQNN_HOST_DEVICE uint32_t magnitude_of(float value) { return bits_of(value) & 0x7fffffffu; }

BQNN_HOST_DEVICE Rounding rounding_of(uint32_t largest_magnitude) {
  const float largest = float_of(largest_magnitude);
  if (largest_magnitude >= 0x7f800000u) return {0.0f, 0.0f, float_of(0x7fc00000u)};
  const float lift = largest < 0x1p-64f ? 0x1p64f : 1.0f;
  return {lift, largest > 0.0f ? 127.0f / (largest * lift) : 0.0f, largest / 127.0f};
}

// As the 16 bits of a bfloat16.
BQNN_HOST_DEVICE uint16_t rounded_activation(float x, const Rounding& rounding) {
  if (rounding.factor == 0.0f) return 0;  // of zeros, or of a row with an infinity or NaN, whose scale is NaN
  float q = rintf((x * rounding.lift) * rounding.factor);
  q = q > 127.0f ? 127.0f : q < -127.0f ? -127.0f : q;
  return static_cast<uint16_t>(bits_of(q) >> 16);
}

// The steps of the slice that begins with step `first`.
template <class T>
BQNN_HOST_DEVICE int steps_from(const Tile<T>& tile, int first) {
  return static_cast<int>(smaller(tile.slice, tile.end - first));
}

// Thread `thread` of the block stages its share of the activations of the slice that begins with step `first`.
template <class T>
BQNN_HOST_DEVICE void stage(const PackedLinearCall& call, const Tile<T>& tile, int thread, int first, Unit* shared) {
  using Code = typename T::Code;
  const int words = steps_from(tile, first) * 16;  // words of a row of the weight
  for (int item = thread; item < words * tile.x_rows; item += kThreads) {
    const int row = item / words, word = item % words;
    const int step = word / 16, t = word / 4 % 4, in_load = word % 4;
    // A step is a block of the layout: code i of word j is at column 16 i + j. Neighbouring threads read neighbours.
    const int64_t column = static_cast<int64_t>(first + step) * Code::kInStep + word % 16;
    const int64_t x_row = static_cast<int64_t>(tile.first_x_row + row) * call.x_columns;
    float values[Code::kInWord];
#pragma unroll
    for (int i = 0; i < Code::kInWord; ++i) {
      const int64_t at = column + 16 * i;
      values[i] = at < call.x_columns ? load_activation(call.x, call.x_element, x_row + at) : 0.0f;
    }
    if (call.mode == Mode::bf16) {
#pragma unroll
      for (float& value : values) value = round_bfloat16(value);
    }
    for (int part = 0; part < tile.parts; ++part) {
#pragma unroll
      for (int quad = 0; quad < Code::kQuads; ++quad) {
        Unit unit;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int pair = 4 * quad + i;
          unit.words[i] = upper_halves(values[Code::code_at(pair, 0)], values[Code::code_at(pair, 1)]);
        }
        const int place = (step * T::kUnits + in_load * Code::kQuads + quad) * tile.columns + row * tile.parts + part;
        shared[place * 4 + t] = unit;
      }
#pragma unroll
      for (float& value : values) value = rest_of(value);
    }
  }
}

// --- levels -------------------------------------------------------------------------------------------------------

BQNN_HOST_DEVICE float level_of(const PackedLinearCall& call, int64_t codebook, int code) {
  if (call.mode == Mode::int8) return code < call.num_levels ? call.integers[codebook * kIntegers + code] : 0.0f;
  const float level = code < call.num_levels ? call.levels[codebook * call.num_levels + code] : 0.0f;
  return call.mode == Mode::bf16 ? round_bfloat16(level) : level;
}

// The codebook of row `row` of the block; rows beyond the last one have the last one's.
template <class T>
BQNN_HOST_DEVICE int64_t codebook_of(const PackedLinearCall& call, const Tile<T>& tile, int row) {
  return call.codebooks == 1 ? 0 : smaller(tile.first_row + row, call.channels - 1);
}

// Thread `thread` writes its share of the tables: [1 or rows of the block][parts][table].
template <class T>
BQNN_HOST_DEVICE void write_tables(const PackedLinearCall& call, const Tile<T>& tile, int thread, Unit* shared) {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(shared);
  const int rows = call.codebooks == 1 ? 1 : tile.block_rows;
  for (int item = thread; item < rows * T::kCapacity; item += kThreads) {
    const int row = item / T::kCapacity, code = item % T::kCapacity;
    write_level<T::kCapacity, T::kParts>(level_of(call, codebook_of(call, tile, row), code), code,
                                         bytes + row * 2 * T::kCapacity * T::kParts);
  }
}

template <class T>
BQNN_HOST_DEVICE void read_table(const PackedLinearCall& call, int row, int part, const Unit* shared, uint32_t* table) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(shared);
  const int first = ((call.codebooks == 1 ? 0 : row) * T::kParts + part) * T::Code::kTable;
#pragma unroll
  for (int i = 0; i < T::Code::kTable; ++i) table[i] = words[first + i];
}

}  // namespace bqnn::cuda
