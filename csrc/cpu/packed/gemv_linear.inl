// packed_linear of a few rows on AVX-512, where reading and decoding the words is most of the work: no panel, the
// lanes are 16 channels and several blocks share what is read of the activations.
//
// Included inside the namespace of the AVX-512 translation unit, after gemv_per_channel.inl.
#pragma once

constexpr int kFewRows = 8;
constexpr int64_t kWordsOfSum = 256;  // words added up in one float32 sum: error grows with the number of terms

// Products [kRows][kMostBlocks * 16] of activations of which a lane holds several, zeros up to the end of the last word.
// The 8-bit ones are of levels + 128: vpdpbusd wants one operand unsigned, and 128 times the sum of the activations is
// to be subtracted. Integer sums may wrap around on the way.
template <class Op, int kBits, int kRows, int kBlocks>
__attribute__((noinline)) void dot_rows(const PackedLayout& layout, int64_t block, const char* const* rows,
                                        typename Op::Product* products) {
  constexpr int kLanesOfWord = 32 / kBits / Op::kUnit;
  constexpr int kSums = kRows * kBlocks <= 8 ? 2 : 1;  // enough to hide the latency of the product
  // A permute looks at 5 or 6 bits: a table for each code among the low 4, and one shift serves two codes or four.
  constexpr int kInNibble = 4 / kBits;
  alignas(64) uint32_t entries[kBlock];
  read_table<Op>(layout, 0, entries);
  const UInt table = Op::kInt8 ? load_lanes(entries) ^ 0x80808080u : load_lanes(entries);
  UInt tables[kInNibble], count_up;  // bytes or halves that count
  for (uint32_t i = 0; i < 16; ++i)
    count_up[i] = Op::kInt8 ? 0x03020100u + 0x04040404u * i : 0x00010000u + 0x00020002u * i;
  for (int i = 0; i < kInNibble; ++i) tables[i] = permute<Op>(count_up >> (i * kBits), table);
  const char* row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) row[r] = rows[r];
  const uint32_t* words = layout.block(0, block);
  const int64_t stride = layout.block_words(), count = layout.padded * kBits / 32;
  for (int64_t first = 0; first < count; first += kWordsOfSum) {
    const int64_t end = count - first < kWordsOfSum ? count : first + kWordsOfSum;
    typename Op::Sum sum[kBlocks][kRows][kSums] = {};
    for (int64_t at = first * kLanesOfWord * 4; at < end * kLanesOfWord * 4; at += kLanesOfWord * 4, words += kBlock) {
      UInt word[kBlocks];
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) {
        prefetch_words(words + b * stride);
        word[b] = load_lanes(words + b * stride);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanesOfWord; ++i) {
        UInt level[kBlocks];
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b)
          level[b] = permute<Op>(word[b] >> (i / kInNibble * 4), tables[i % kInNibble]);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const UInt x = broadcast_lane(row[r] + at + i * 4);
#pragma GCC unroll 8
          for (int b = 0; b < kBlocks; ++b) sum[b][r][i % kSums] = Op::dot(x, level[b], sum[b][r][i % kSums]);
        }
      }
    }
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        typename Op::Product* to = products + (r * kMostBlocks + b) * kBlock;
        UInt total = (UInt)sum[b][r][0];
        if (kSums == 2) total = Op::add(total, sum[b][r][kSums - 1]);
        if (first > 0) total = Op::add(load_lanes(to), total);
        __builtin_memcpy(to, &total, sizeof total);
      }
  }
}

// Products [kRows][kMostBlocks * 16] of float activations and codes of 4 bits.
template <int kRows, int kBlocks>
__attribute__((noinline)) void float_rows(const PackedLayout& layout, int64_t block, const char* const* rows,
                                          float* products) {
  alignas(64) uint32_t entries[kBlock];
  read_table<FloatOperand>(layout, 0, entries);
  const UInt table = load_lanes(entries);
  const char* row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) row[r] = rows[r];
  const uint32_t* words = layout.block(0, block);
  const int64_t stride = layout.block_words(), count = layout.padded * 4 / 32;
  for (int64_t first = 0; first < count; first += kWordsOfSum) {
    const int64_t end = count - first < kWordsOfSum ? count : first + kWordsOfSum;
    Float sum[kBlocks][kRows] = {};
    for (int64_t at = first * 32; at < end * 32; at += 32, words += kBlock) {
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) prefetch_words(words + b * stride);
#pragma GCC unroll 8
      for (int code = 0; code < 8; ++code) {
        // Read from the code's byte on, so that every other needs no shift. The last one of a block reads up to 3 bytes
        // of the next, or of the end of the layout.
        UInt level[kBlocks];
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) {
          const UInt codes = load_lanes(reinterpret_cast<const char*>(words + b * stride) + code / 2);
          level[b] = permute<FloatOperand>(code % 2 ? codes >> 4 : codes, table);
        }
        const int weight = code % 4 * 2 + code / 4;  // the layout's order
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const UInt x = broadcast_lane(row[r] + at + weight * 4);
#pragma GCC unroll 8
          for (int b = 0; b < kBlocks; ++b) sum[b][r] = FloatOperand::dot(x, level[b], sum[b][r]);
        }
      }
    }
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        float* to = products + (r * kMostBlocks + b) * kBlock;
        store(to, first == 0 ? sum[b][r] : load(to) + sum[b][r]);
      }
  }
}

// Calls f(first_block, blocks) with kMost (8, 4, 2 or 1) blocks, a constant, or fewer, until all are done.
template <int kMost, class F>
inline void for_blocks(int64_t begin, int64_t end, const F& f) {
  int64_t block = begin;
  if constexpr (kMost == 8)
    for (; block + 8 <= end; block += 8) f(block, Constant<8>{});
  if constexpr (kMost >= 4)
    for (; block + 4 <= end; block += 4) f(block, Constant<4>{});
  if constexpr (kMost == 2)
    for (; block + 2 <= end; block += 2) f(block, Constant<2>{});
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
      for (int r = 0; r < call.rows; ++r)
        finish_row<Op>(products + r * kMostBlocks * kBlock, width, strip, scales[r],
                       static_cast<X*>(call.y) + r * layout.channels + channel);
    });
  });
}

constexpr int kMostOf[kFewRows + 1] = {0, 8, 4, 4, 4, 2, 2, 2, 2};  // blocks whose sums fit the registers, by rows

// Up to kRows rows; those beyond the last are the first one again.
template <class Op, int kRows, class X>
__attribute__((noinline)) void run_rows_of(const LinearCall& call, const Parallel& parallel) {
  using Element = typename Op::Element;
  using Product = typename Op::Product;
  const PackedLayout& layout = *call.weight;
  const bool shared = layout.codebooks == 1;
  const int64_t groups = groups_of_words(layout), padded = groups * 16 * layout.word_weights();
  int64_t row_bytes = padded * static_cast<int64_t>(sizeof(Element));
  if (row_bytes % 1024 == 0) row_bytes += 64;  // rows would meet in a few sets of the caches
  char* packed = scratch(Scratch::activations, static_cast<size_t>(call.rows * row_bytes));
  char* turned = shared ? nullptr : scratch(Scratch::tables, static_cast<size_t>(call.rows * row_bytes));
  const char* row[kRows];
  float scales[kRows];
  uint32_t shift[kRows];
  parallel_for(parallel, call.rows, 1 + (1 << 14) / layout.columns, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const X* x = static_cast<const X*>(call.x) + r * layout.columns;
      auto* to = reinterpret_cast<Element*>(packed + r * row_bytes);
      RowScale scale{};
      if constexpr (Op::kInt8) scale = row_scale(largest(x, layout.columns));
      pack_row<Op>(x, layout.columns, Op::kHalf, scale, to);
      uint32_t sum = 0;
      if constexpr (Op::kInt8)
        for (int64_t k = 0; k < layout.columns; ++k) sum += static_cast<uint32_t>(int32_t{to[k]});
      for (int64_t k = layout.columns; k < padded; ++k) to[k] = 0;
      row[r] = packed + r * row_bytes;
      if (!shared) row[r] = turn_activations(row[r], groups, 32 / layout.bits / Op::kUnit, turned + r * row_bytes);
      scales[r] = scale.scale;
      shift[r] = 128u * sum;
    }
  });
  for (int r = 1; r < kRows; ++r)
    if (r >= call.rows) row[r] = row[0];
  const auto subtract_shift = [&](int channels, Product* products) {
    if constexpr (Op::kInt8)
      for (int r = 0; r < call.rows; ++r)
        for (int i = 0; i < channels; ++i) {
          Product& product = products[r * kMostBlocks * kBlock + i];
          product = static_cast<Product>(static_cast<uint32_t>(product) - shift[r]);
        }
  };
  if (!shared) {
    return run_blocks<Op, 1, kRows, X>(call, parallel, scales, [&](int64_t block, auto, Product* products) {
      channel_rows_of_bits<Op, kRows>(layout, block, row, products);
      subtract_shift(kBlock, products);
    });
  }
  constexpr int kMost = kMostOf[kRows];
  run_blocks<Op, kMost, kRows, X>(call, parallel, scales, [&](int64_t block, auto blocks, Product* products) {
    if constexpr (Op::kUnit == 1) {
      float_rows<kRows, blocks.value>(layout, block, row, products);
    } else {
      const auto of_bits = layout.bits == 1   ? dot_rows<Op, 1, kRows, blocks.value>
                           : layout.bits == 2 ? dot_rows<Op, 2, kRows, blocks.value>
                                              : dot_rows<Op, 4, kRows, blocks.value>;
      of_bits(layout, block, row, products);
    }
    subtract_shift(blocks.value * kBlock, products);
  });
}

template <class Op, class X>
inline bool run_rows(const LinearCall& call, const Parallel& parallel) {
  const auto run = call.rows == 1   ? run_rows_of<Op, 1, X>
                   : call.rows == 2 ? run_rows_of<Op, 2, X>
                   : call.rows <= 4 ? run_rows_of<Op, 4, X>
                   : call.rows <= 6 ? run_rows_of<Op, 6, X>
                                    : run_rows_of<Op, 8, X>;
  run(call, parallel);
  return true;
}

// Whether this was a call of few rows, and all of y is written.
template <class X>
inline bool run_few_rows(const LinearCall& call, const Parallel& parallel) {
  if (call.rows < 1 || call.rows > kFewRows) return false;
  const Precision precision = call.weight->precision;
  return precision == Precision::int8   ? run_rows<SignedOperand, X>(call, parallel)
         : precision == Precision::bf16 ? run_rows<HalfOperand, X>(call, parallel)
                                        : run_rows<FloatOperand, X>(call, parallel);
}
