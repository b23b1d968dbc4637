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
// A layer with one codebook of two or three levels, in "fp32", may have its codes a second time, as indices into tables
// of sums: those of four (three) consecutive inputs at one kernel tap are one index, and a word holds eight (six) of
// these, in the order [inputs / 4 (3)][r][s],
//
//     index i of a word is at bit 4 i (5 i), and weight j of an index counts 2^j (3^j)
//
// Up to 8 blocks of a group stand side by side, so that a kernel reads them as one stream.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bqnn {

enum class Precision : int32_t { fp32, bf16, int8 };

// What a kernel reads of a layout. The words are always there.
enum class LayoutForm : int32_t { words = 0, sum_indices = 1 };

constexpr int kBlock = 16;             // output channels side by side
constexpr int kTable = 16;             // entries of a decoding table: the levels, repeated with period 2^bits
constexpr int kIndexBlocks = 8;        // blocks of sum indices side by side
constexpr int kMostLevels = 16;        // levels of a codebook at most
constexpr uint32_t kInt8Offset = 128;  // added to 8-bit activations where the instruction takes them unsigned

// An index into a table of sums: the weights it stands for, its bits, and how many a word holds.
struct SumIndex {
  int weights, bits, in_word;
};

constexpr SumIndex sum_index(int num_levels) { return num_levels == 2 ? SumIndex{4, 4, 8} : SumIndex{3, 5, 6}; }

struct PackedLayout {
  uint64_t magic;
  int64_t bytes;              // size of the whole layout
  int64_t channels, columns;  // N, K: the weight's shape
  int64_t groups;
  int64_t blocks;             // blocks of 16 channels in each group
  int64_t group_channels;     // output channels of each group
  int64_t inputs;             // channels of the activations in each group
  int64_t segment, padded;    // weights in a segment, and after padding
  int32_t segments, kernel_h, kernel_w, dilation_w;
  int32_t num_levels, bits, unit, codebooks;
  Precision precision;
  LayoutForm form;     // what it has beside the words
  int32_t affine;      // whether the levels are offset + scale * step, see affine_levels.h
  float least_level;   // the smallest magnitude of a level that is not 0
  double affine_offset, affine_scale;
  float affine_steps[kTable];  // the steps of an affine codebook as a decoding table
  // Where each part begins, in bytes from the header; 0 where there is none.
  int64_t words, levels, int8_levels, int8_scale, int8_shift, indices;

  int64_t word_weights() const { return 32 / bits; }
  int64_t block_words() const { return segments * padded * bits / 32 * kBlock; }
  int64_t taps() const { return int64_t{kernel_h} * kernel_w; }

  const char* at(int64_t offset) const { return reinterpret_cast<const char*>(this) + offset; }
  // The words of 16 channels, [segments * padded / word_weights][16].
  const uint32_t* block(int64_t group, int64_t index) const {
    return reinterpret_cast<const uint32_t*>(at(words)) + (group * blocks + index) * block_words();
  }
  int64_t index_words() const {
    return num_levels == 2 ? ((inputs + 3) / 4 * taps() + 7) / 8 : ((inputs + 2) / 3 * taps() + 5) / 6;
  }
  // Where the sum indices of 8 blocks of a group begin, of fewer at its end: [index_words][blocks][16].
  int64_t indices_at(int64_t group, int64_t unit) const {
    return (group * blocks + unit * kIndexBlocks) * index_words() * kBlock;
  }
  const uint32_t* index_unit(int64_t group, int64_t unit) const {
    return reinterpret_cast<const uint32_t*>(at(indices)) + indices_at(group, unit);
  }
  // [1, or groups * blocks * 16][16]: the levels of a codebook; a channel beyond the last one has zeros.
  const float* level_table() const { return reinterpret_cast<const float*>(at(levels)); }
  const int8_t* int8_table() const { return reinterpret_cast<const int8_t*>(at(int8_levels)); }
  // [groups * blocks * 16]: the step of the rounded levels, and what activations that are all kInt8Offset add to the
  // products of a channel, modulo 2^32.
  const float* int8_scales() const { return reinterpret_cast<const float*>(at(int8_scale)); }
  const uint32_t* int8_shifts() const { return reinterpret_cast<const uint32_t*>(at(int8_shift)); }
};

// A weight as it is stored. Sizes are 1 or more, columns a multiple of the kernel's taps, channels of the groups.
struct PackedWeight {
  const uint8_t* codes;       // [channels, ceil(columns / digits_of_byte(num_levels))], base-M digits
  const float* levels;        // [codebooks, num_levels]
  const int8_t* int8_levels;  // the shape of levels; null unless the precision is int8
  const float* int8_scale;    // [codebooks]; null unless the precision is int8
  int64_t channels, columns, groups;
  int num_levels, codebooks;  // 2 to 16; 1 or channels
  int kernel_h, kernel_w, dilation_w;
  Precision precision;
  LayoutForm form;  // what kernels may read of it, see select.h
};

// Base-M digits that a byte of stored codes holds.
int digits_of_byte(int num_levels);

// The layout of a weight but for what follows from its levels and codes: its tensors are not read.
PackedLayout plan_layout(const PackedWeight& weight);

// Writes the layout into `memory`, which is aligned to 64 and has plan_layout(weight).bytes.
void make_layout(const PackedWeight& weight, void* memory);

// The layout in `memory`, or null where a kernel might read past its end. Words, indices and levels may hold anything:
// kernels look at as many bits of a code as their tables have entries.
const PackedLayout* view_layout(const void* memory, size_t bytes);

}  // namespace bqnn
