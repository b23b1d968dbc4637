// The layout that the packed kernels read: made once of a layer's stored codes, never stored itself.
//
// Output channels stand side by side in blocks of 16, one 32-bit word each, so that one 64-byte vector holds the same
// weights of 16 channels. A word holds 32 / bits consecutive weights of its channel, bits = 1, 2 or 4 for M = 2, up to
// 4, up to 16. Within a word the weights lie so that a shift and one permute give a vector in the order in which the
// product instructions take their operand (lanes of `unit` weights, each lane in a channel's word):
//
//     weight i of a word is at bit (i % unit) * (32 / unit) + (i / unit) * bits
//
// unit = 4 for "int8" (bytes), 2 for "bf16" and "fp32" (half words). Along K the weights come in segments: runs that
// are contiguous in the activations. A linear layer has one, a convolution one for each kernel row (r; s and the
// channels run inside it, channels fastest), or one for each (r, s) where dilation sets the columns apart. Every
// segment is padded to whole steps of one 64-byte row of activations.
//
// A layer with one codebook of two or three levels, in "fp32", may have its codes a second time, for AVX-512: those of
// four (three) consecutive inputs at one kernel tap are a number, and a word holds eight (six) of these, in the order
// [inputs / 4 (3)][r][s],
//
//     number i of a word is at bit 4 i (5 i), and weight j of a number counts 2^j (3^j)
//
// Up to 8 blocks of a group stand side by side, so that a kernel reads them as one stream.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bqnn {

enum class Precision : int32_t { fp32, bf16, int8 };

constexpr int kBlock = 16;  // output channels side by side
constexpr int kTable = 16;  // entries of a decoding table: the levels, at most 16, repeated with period 2^bits
constexpr int kNumberBlocks = 8;  // side by side
constexpr uint32_t kInt8Offset = 128;  // of 8-bit activations where the instruction takes them unsigned

// Numbers of several weights.
struct Numbers {
  int weights, bits, in_word;
};

constexpr Numbers numbers_of(int num_levels) { return num_levels == 2 ? Numbers{4, 4, 8} : Numbers{3, 5, 6}; }

struct PackedLayout {
  uint64_t magic;
  int64_t bytes;              // of the whole
  int64_t channels, columns;  // N, K: the weight's shape
  int64_t groups;
  int64_t blocks;           // of 16 channels, in each group
  int64_t inputs;           // channels of the activations in each group
  int64_t segment, padded;  // weights in a segment, and after padding
  int32_t segments, kernel_h, kernel_w, dilation_w;
  int32_t num_levels, bits, unit, codebooks;
  Precision precision;
  int32_t affine;                     // whether the levels are offset + scale * step, see affine_levels.h
  double affine_offset, affine_scale;
  float affine_steps[kTable];         // as in a decoding table
  int64_t words, levels, int8_levels, int8_scale, int8_shift;  // where each part begins, in bytes
  int64_t numbers;                                           // likewise, or 0 where there are none

  int64_t word_weights() const { return 32 / bits; }
  int64_t block_words() const { return segments * padded / word_weights() * kBlock; }
  int64_t group_channels() const { return channels / groups; }

  const char* at(int64_t offset) const { return reinterpret_cast<const char*>(this) + offset; }
  // The words of 16 channels, [segments * padded / word_weights][16].
  const uint32_t* block(int64_t group, int64_t index) const {
    return reinterpret_cast<const uint32_t*>(at(words)) + (group * blocks + index) * block_words();
  }
  int64_t taps() const { return int64_t{kernel_h} * kernel_w; }
  int64_t number_words() const {
    const Numbers number = numbers_of(num_levels);
    const int64_t count = (inputs + number.weights - 1) / number.weights * taps();
    return (count + number.in_word - 1) / number.in_word;
  }
  // Where the numbers of 8 blocks of a group begin, of fewer at its end: [number_words][blocks][16].
  int64_t numbers_at(int64_t group, int64_t unit) const {
    return (group * blocks + unit * kNumberBlocks) * number_words() * kBlock;
  }
  const uint32_t* number_unit(int64_t group, int64_t unit) const {
    return reinterpret_cast<const uint32_t*>(at(numbers)) + numbers_at(group, unit);
  }
  // [1, or groups * blocks * 16][16]: the levels of a codebook; a channel beyond the last one has zeros.
  const float* level_table() const { return reinterpret_cast<const float*>(at(levels)); }
  const int8_t* int8_table() const { return reinterpret_cast<const int8_t*>(at(int8_levels)); }
  // [groups * blocks * 16]: the step of the rounded levels, and what activations that are all kInt8Offset add to the
  // products of a channel, modulo 2^32.
  const float* int8_scales() const { return reinterpret_cast<const float*>(at(int8_scale)); }
  const uint32_t* int8_shifts() const { return reinterpret_cast<const uint32_t*>(at(int8_shift)); }
};

struct PackedWeight {
  const uint8_t* codes;       // [channels, ceil(columns / digits)], base-M digits
  const float* levels;        // [codebooks, num_levels]
  const int8_t* int8_levels;  // the same shape, or null unless the precision is int8
  const float* int8_scale;    // [codebooks], or null
  int64_t channels, columns, groups;
  int num_levels, codebooks, kernel_h, kernel_w, dilation_w;
  Precision precision;
  bool numbers;  // whether a kernel may read them
};

// Bytes of the layout of `weight`.
size_t layout_bytes(const PackedWeight& weight);

// Writes the layout into `memory`, which is aligned to 64 and has layout_bytes(weight).
void make_layout(const PackedWeight& weight, void* memory);

// The layout in `memory`, or null where the bytes are no layout that make_layout wrote.
const PackedLayout* view_layout(const void* memory, size_t bytes);

}  // namespace bqnn
