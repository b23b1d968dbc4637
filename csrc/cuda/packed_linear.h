// y = x Q^T + bias, or its ReLU, for a few rows of x, Q the levels of packed codes: what a call takes, and its launch.
#pragma once

#include <cstdint>

namespace bqnn::cuda {

enum class Element : int32_t { float32, bfloat16, float16 };

// How levels and activations are multiplied: in three bfloat16 parts each, as float32 has them; rounded to bfloat16; or
// as integers of at most 127, given as such, whose sums are exact.
enum class Mode : int32_t { fp32, bf16, int8 };

constexpr int kIntegers = 16;

struct PackedLinearCall {
  const uint32_t* words;   // [channels, row_loads * 4] in blocks of 16 words, less than 2^31 loads
  const float* levels;     // [codebooks, num_levels]; null for int8
  const int8_t* integers;  // [codebooks, kIntegers], int8 only: the rounded levels
  const void* x;           // [rows, x_columns]
  const float* bias;       // [channels] or null
  const float* scale;      // [codebooks], int8 only
  const float* row_scale;  // [rows], int8 only
  uint32_t* partial;       // [splits, rows, channels], float32 or int32; null where splits is 1
  void* y;                 // [rows, channels]
  int64_t channels;
  int32_t row_loads;  // 16-byte loads a row, a multiple of 4
  int32_t x_columns;
  int32_t rows;
  int32_t num_levels, codebooks;
  Mode mode;
  Element x_element, y_element;
  int32_t row_warps;  // 1, 2, 4 or 8: of a block's 8 warps, so many take rows of their own, the others other columns
  int32_t splits;     // of the columns, over blocks
  int32_t relu;       // whether negative outputs become 0
};

// Parts of bfloat16 in which the activations of a call are multiplied.
inline int x_parts(const PackedLinearCall& call) {
  if (call.mode != Mode::fp32) return 1;
  return call.x_element == Element::bfloat16 ? 1 : call.x_element == Element::float16 ? 2 : 3;
}

// Sets row_warps and splits of a call whose other numbers are set. Returns a cudaError_t.
int plan_packed_linear(PackedLinearCall* call, int device);

// Rows of activations to 8-bit integers, by the rule of "int8".
struct RoundRowsCall {
  const void* x;    // [rows, columns]
  uint16_t* q;      // [rows, columns]: the integers as bfloat16, which has them all
  float* scale;     // [rows]
  int64_t columns;
  int32_t rows;
  Element x_element;
};

// Fills q and scale; `stream` and the result as below.
int launch_round_rows(const RoundRowsCall& call, void* stream);

// Fills y. `stream` is a cudaStream_t; returns a cudaError_t. Rows are 1 or more; words are aligned to 16 bytes.
int launch_packed_linear(const PackedLinearCall& call, void* stream);

}  // namespace bqnn::cuda
