// packed_linear of a few rows on AVX-512, where reading and decoding the words is most of the work: no panel, the
// lanes are 16 channels and several blocks share what is read of the activations.
//
// Included inside the namespace of the AVX-512 translation unit, after packed_activations.h.
#pragma once

constexpr int kFewRows = 4;
constexpr int kMostBlocks = 8;       // that a kernel computes together
constexpr int kAhead = 16;           // vectors of words between a prefetch and its use
constexpr int64_t kWordsOfSum = 256;  // words added up in one float32 sum: error grows with the number of terms

BQNN_INLINE void prefetch_words(const uint32_t* word) {
  _mm_prefetch(reinterpret_cast<const char*>(word + kAhead * kBlock), _MM_HINT_T0);
}

#include "packed_channel_rows.h"

// Totals [kRows][kMostBlocks * 16] of 8-bit activations, zeros up to the end of the last word, and levels + 128:
// vpdpbusd wants one operand unsigned, and 128 times the sum of the activations is to be subtracted. Sums may wrap
// around on the way.
template <int kBits, int kRows, int kBlocks>
__attribute__((noinline)) void int8_rows(const PackedLayout& layout, int64_t block, const char* const* row,
                                         int32_t* totals) {
  constexpr int kQuads = 8 / kBits, kSums = kRows == 1 ? 2 : 1;  // enough sums to hide the latency of vpdpbusd
  const __m512i table = _mm512_xor_si512(
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(layout.int8_table()))),
      _mm512_set1_epi8(-128));
  // A permute looks at 6 bits: a table for each code among the low 4, and one shift serves two codes or four.
  constexpr int kInNibble = 4 / kBits;
  __m512i tables[kInNibble];
  UInt entry;  // 64 bytes that count
  for (int i = 0; i < 16; ++i) entry[i] = 0x03020100u + 0x04040404u * static_cast<uint32_t>(i);
  for (int i = 0; i < kInNibble; ++i)
    tables[i] = _mm512_maskz_permutexvar_epi8(~0ull, (__m512i)(entry >> (i * kBits)), table);
  const uint32_t* words = layout.block(0, block);
  const int64_t stride = layout.block_words(), count = layout.padded * kBits / 32;
  UInt sum[kBlocks][kRows][kSums] = {};
  for (int64_t w = 0; w < count; ++w, words += kBlock) {
    UInt word[kBlocks];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      prefetch_words(words + b * stride);
      word[b] = load_lanes(words + b * stride);
    }
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q) {
      UInt x[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) x[r] = broadcast_lane(row[r] + (w * kQuads + q) * 4);
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) {
        const UInt codes = word[b] >> (q / kInNibble * 4);
        const __m512i level = _mm512_maskz_permutexvar_epi8(~0ull, (__m512i)codes, tables[q % kInNibble]);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
          sum[b][r][q % kSums] = (UInt)_mm512_dpbusd_epi32((__m512i)sum[b][r][q % kSums], level, (__m512i)x[r]);
      }
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const UInt total = sum[b][r][0] + (kSums == 2 ? sum[b][r][kSums - 1] : UInt{});
      __builtin_memcpy(totals + (r * kMostBlocks + b) * kBlock, &total, sizeof total);
    }
}

// Products [kRows][kMostBlocks * 16] of float activations.
//
// With kTables, row[r] holds 16 floats for each of a word's eight groups of 4 bits: what the group's weights add for
// each value of the group. Otherwise a group is one weight, and row[r] holds the activations.
template <bool kTables, int kRows, int kBlocks>
__attribute__((noinline)) void float_rows(const PackedLayout& layout, int64_t block, const Codebook& book,
                                          const char* const* row, float* products) {
  const __m512i levels = (__m512i)load_lanes(book.entries[0]);
  const uint32_t* words = layout.block(0, block);
  const int64_t stride = layout.block_words(), count = layout.padded * layout.bits / 32;
  Float total[kBlocks][kRows] = {};
  for (int64_t first = 0; first < count; first += kWordsOfSum) {
    const int64_t end = count - first < kWordsOfSum ? count : first + kWordsOfSum;
    Float sum[kBlocks][kRows] = {};
    for (int64_t w = first; w < end; ++w, words += kBlock) {
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) prefetch_words(words + b * stride);
#pragma GCC unroll 4
      for (int byte = 0; byte < 4; ++byte) {
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) {
          // Read from this byte on: a lane of the permute looks at 4 bits, and a shift fewer is needed. The last one
          // of a block reads up to 3 bytes of the next, or of the end of the layout.
          const UInt codes = load_lanes(reinterpret_cast<const char*>(words + b * stride) + byte);
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const __m512i index = (__m512i)(half ? codes >> 4 : codes);
            const int group = 2 * byte + half;
            __m512i level;
            if constexpr (!kTables) level = _mm512_maskz_permutexvar_epi32(0xFFFF, index, levels);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
              if constexpr (kTables) {
                const __m512i table = (__m512i)load_lanes(row[r] + (w * 8 + group) * 64);
                sum[b][r] += (Float)_mm512_maskz_permutexvar_epi32(0xFFFF, index, table);
              } else {
                const int weight = group % 4 * 2 + group / 4;  // the layout's order for 4 bits and units of 2
                const UInt x = broadcast_lane(row[r] + (w * 8 + weight) * 4);
                sum[b][r] = multiply_add((Float)level, (Float)x, sum[b][r]);
              }
            }
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) total[b][r] += sum[b][r];
  }
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) store(products + (r * kMostBlocks + b) * kBlock, total[b][r]);
}

// The tables of float_rows for n activations, n a multiple of the weights of a word; returns `to`.
inline char* make_tables(const Codebook& book, int bits, const float* x, int64_t n, char* to) {
  auto* tables = reinterpret_cast<float*>(to);
  const int in_group = 4 / bits, in_word = 32 / bits;
  Float level[4];  // by the value of the group: that of its first weight, its second ...
  for (int j = 0; j < in_group; ++j) {
    alignas(64) uint32_t entry[16];
    for (int value = 0; value < 16; ++value) entry[value] = book.entries[0][value >> (j * bits) & ((1 << bits) - 1)];
    level[j] = (Float)load_lanes(entry);
  }
  for (int64_t k = 0; k < n; k += in_word)
    for (int group = 0; group < 8; ++group, tables += 16) {
      // Every half word has every second weight.
      const float* first = x + k + group % 4 * in_group * 2 + group / 4;
      Float sum = level[0] * first[0];
      for (int j = 1; j < in_group; ++j) sum += level[j] * first[2 * j];
      store(tables, sum);
    }
  return to;
}

// Calls f(first_block, blocks) with kMost (8, 4 or 1) blocks, a constant, or fewer, until all are done.
template <int kMost, class F>
inline void for_blocks(int64_t begin, int64_t end, const F& f) {
  int64_t block = begin;
  if constexpr (kMost == 8)
    for (; block + 8 <= end; block += 8) f(block, Constant<8>{});
  if constexpr (kMost >= 4)
    for (; block + 4 <= end; block += 4) f(block, Constant<4>{});
  for (; block < end; ++block) f(block, Constant<1>{});
}

// Tasks of few rows: `compute(block, blocks, products)` for all blocks, up to kMost together, then the outputs.
template <class Op, int kMost, int kRows, class X, class F>
inline void run_blocks(const LinearCall& call, const Parallel& parallel, const float* scales, const F& compute) {
  const PackedLayout& layout = *call.weight;
  const int64_t units = ceil_div(layout.blocks, 4), work = 4 * kBlock * kRows * layout.columns;
  parallel_for(parallel, units, 1 + kTaskWork / work, [&](int64_t begin, int64_t end) {
    const int64_t last = 4 * end < layout.blocks ? 4 * end : layout.blocks;
    for_blocks<kMost>(4 * begin, last, [&](int64_t block, auto blocks) {
      alignas(64) typename Op::Product products[kRows * kMostBlocks * kBlock];
      compute(block, blocks, products);
      const int64_t channel = block * kBlock, left = layout.channels - channel;
      const int64_t width = left < blocks.value * kBlock ? left : blocks.value * kBlock;
      const Epilogue strip = epilogue<Op>(call, 0, block);
      for (int r = 0; r < kRows; ++r)
        finish_row<Op>(products + r * kMostBlocks * kBlock, width, strip, scales[r],
                       static_cast<X*>(call.y) + r * layout.channels + channel);
    });
  });
}

constexpr int kMostOf[kFewRows + 1] = {0, 8, 4, 4, 4};  // blocks whose sums fit the registers, by rows

template <int kRows, class X>
__attribute__((noinline)) void run_int8_rows(const LinearCall& call, const Parallel& parallel) {
  const PackedLayout& layout = *call.weight;
  const bool shared = layout.codebooks == 1;
  const int64_t groups = groups_of_words(layout), padded = groups * 16 * layout.word_weights();
  char* packed = scratch(Scratch::activations, static_cast<size_t>(kRows * padded));
  char* turned = shared ? nullptr : scratch(Scratch::tables, static_cast<size_t>(kRows * padded));
  const char* row[kRows];
  float scales[kRows];
  uint32_t shift[kRows];
  for (int r = 0; r < kRows; ++r) {
    const X* x = static_cast<const X*>(call.x) + r * layout.columns;
    auto* to = reinterpret_cast<int8_t*>(packed + r * padded);
    const RowScale scale = row_scale(largest(x, layout.columns));
    pack_row<SignedOperand>(x, layout.columns, false, scale, to);
    int32_t sum = 0;
    for (int64_t k = 0; k < layout.columns; ++k) sum += to[k];
    for (int64_t k = layout.columns; k < padded; ++k) to[k] = 0;
    row[r] = packed + r * padded;
    if (!shared) row[r] = turn_activations(row[r], groups, 8 / layout.bits, turned + r * padded);
    scales[r] = scale.scale;
    shift[r] = 128u * static_cast<uint32_t>(sum);
  }
  const auto subtract_shift = [&](int channels, int32_t* totals) {
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < channels; ++i) {
        int32_t& total = totals[r * kMostBlocks * kBlock + i];
        total = static_cast<int32_t>(static_cast<uint32_t>(total) - shift[r]);
      }
  };
  if (!shared) {
    return run_blocks<SignedOperand, 1, kRows, X>(call, parallel, scales, [&](int64_t block, auto, int32_t* totals) {
      channel_rows_of_bits<SignedOperand, kRows>(layout, block, row, totals);
      subtract_shift(kBlock, totals);
    });
  }
  constexpr int kMost = kMostOf[kRows];
  run_blocks<SignedOperand, kMost, kRows, X>(call, parallel, scales, [&](int64_t block, auto blocks, int32_t* totals) {
    const auto of_bits = layout.bits == 1   ? int8_rows<1, kRows, blocks.value>
                         : layout.bits == 2 ? int8_rows<2, kRows, blocks.value>
                                            : int8_rows<4, kRows, blocks.value>;
    of_bits(layout, block, row, totals);
    subtract_shift(blocks.value * kBlock, totals);
  });
}

template <int kRows, class X>
__attribute__((noinline)) void run_float_rows(const LinearCall& call, const Parallel& parallel) {
  const PackedLayout& layout = *call.weight;
  const bool bf16 = layout.precision == Precision::bf16, shared = layout.codebooks == 1;
  const bool use_tables = shared && layout.bits < 4;
  Codebook book;
  if (shared) read_codebook<FloatOperand>(layout, 0, 0, &book);
  const int64_t groups = groups_of_words(layout), padded = groups * 16 * layout.word_weights();
  const int64_t row_bytes = padded * 4, table_bytes = groups * 16 * 8 * 64;
  char* packed = scratch(Scratch::activations, static_cast<size_t>(kRows * row_bytes));
  const int64_t derived = use_tables ? table_bytes : shared ? 0 : row_bytes;
  char* tables = scratch(Scratch::tables, static_cast<size_t>(kRows * derived));
  const char* row[kRows];
  const float scales[kRows] = {};
  for (int r = 0; r < kRows; ++r) {
    auto* to = reinterpret_cast<float*>(packed + r * row_bytes);
    pack_row<FloatOperand>(static_cast<const X*>(call.x) + r * layout.columns, layout.columns, bf16, RowScale{}, to);
    for (int64_t k = layout.columns; k < padded; ++k) to[k] = 0.0f;
    row[r] = packed + r * row_bytes;
    if (use_tables)
      row[r] = make_tables(book, layout.bits, to, layout.padded, tables + r * table_bytes);
    else if (!shared)
      row[r] = turn_activations(row[r], groups, 32 / layout.bits, tables + r * row_bytes);
  }
  if (!shared) {
    return run_blocks<FloatOperand, 1, kRows, X>(call, parallel, scales, [&](int64_t block, auto, float* products) {
      channel_rows_of_bits<FloatOperand, kRows>(layout, block, row, products);
    });
  }
  constexpr int kMost = kMostOf[kRows];
  run_blocks<FloatOperand, kMost, kRows, X>(call, parallel, scales, [&](int64_t block, auto blocks, float* products) {
    (use_tables ? float_rows<true, kRows, blocks.value> : float_rows<false, kRows, blocks.value>)(layout, block, book,
                                                                                                 row, products);
  });
}

template <int kRows, class X>
inline void run_rows(const LinearCall& call, const Parallel& parallel) {
  (call.weight->precision == Precision::int8 ? run_int8_rows<kRows, X> : run_float_rows<kRows, X>)(call, parallel);
}

// Whether this was a call of few rows, and all of y is written.
template <class X>
inline bool run_few_rows(const LinearCall& call, const Parallel& parallel) {
  if (call.rows < 1 || call.rows > kFewRows) return false;
  const auto run = call.rows == 1   ? run_rows<1, X>
                   : call.rows == 2 ? run_rows<2, X>
                   : call.rows == 3 ? run_rows<3, X>
                                    : run_rows<4, X>;
  run(call, parallel);
  return true;
}
