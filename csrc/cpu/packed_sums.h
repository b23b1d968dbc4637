// packed_linear in floats at two to four levels on AVX-512: a few codes of a channel are one number, and a table of one
// or two registers has, for each of its values, the sum of what those weights add. So one permute and one addition take
// four, three or two weights of 16 channels, where a multiplication takes one. The permute looks at 4 or 5 bits: those
// above need no clearing.
//
// The tables of some columns and a few rows are made where they are used, in the L1 cache, and all channels pass by.
//
// Included inside the namespace of the AVX-512 translation unit, after packed_few_rows.h.
#pragma once

constexpr int kSumRows = 4;                 // rows that share what is read and shifted of the codes
constexpr int kSumUnit = 8;                 // blocks of a unit of tasks; a layout of triples has so many side by side
constexpr int64_t kTablesRoom = 24 * 1024;  // bytes
// Below, with more than a few rows, decoding for a product takes less than making the tables.
constexpr int64_t kLeastSumBlocks = 8;

// Where the codes of some blocks stand.
struct CodeStream {
  const char* words;
  int64_t block, word;  // bytes from one to the next
};

// Groups of 4 bits: what a word of the layout has, at two or four levels.
template <int kBits>
struct NibbleSums {
  static constexpr int kGroups = 8, kShift = 4, kVectors = 1, kWordWeights = 32 / kBits;
  Float level[4 / kBits];  // of the first weight of a group, the second ..., by the value of the group

  explicit NibbleSums(const Codebook& book) {
    for (int j = 0; j < 4 / kBits; ++j) {
      alignas(64) uint32_t entry[16];
      for (int i = 0; i < 16; ++i) entry[i] = book.entries[0][i >> (j * kBits) & ((1 << kBits) - 1)];
      level[j] = (Float)load_lanes(entry);
    }
  }

  static int64_t words(const PackedLayout& layout) { return layout.padded / kWordWeights; }

  static CodeStream stream(const PackedLayout& layout, int64_t block) {
    return {reinterpret_cast<const char*>(layout.block(0, block)), layout.block_words() * 4, kBlock * 4};
  }

  BQNN_INLINE void make(const float* x, int group, float* table) const {
    constexpr int kInGroup = 4 / kBits;
    x += group % 4 * kInGroup * 2 + group / 4;  // every half word has every second weight
    Float sum = level[0] * x[0];
#pragma GCC unroll 4
    for (int j = 1; j < kInGroup; ++j) sum = multiply_add(level[j], broadcast(x[2 * j]), sum);
    store(table, sum);
  }

  static BQNN_INLINE Float look_up(UInt word, const Float* table) {
    return (Float)permute<FloatOperand>(word, (UInt)table[0]);
  }
};

// Groups of three weights at three levels, see packed_layout.h.
struct TripleSums {
  static constexpr int kGroups = kTripleWeights / 3, kShift = kTripleBits, kVectors = 2, kWordWeights = kTripleWeights;
  static_assert(kSumUnit == kTripleBlocks, "a unit is what stands side by side");
  Float level[3][2];

  explicit TripleSums(const Codebook& book) {
    alignas(64) uint32_t entry[3][32] = {};
    for (int j = 0, power = 1; j < 3; ++j, power *= 3)
      for (int i = 0; i < 27; ++i) entry[j][i] = book.entries[0][i / power % 3];
    for (int j = 0; j < 3; ++j)
      for (int half = 0; half < 2; ++half) level[j][half] = (Float)load_lanes(entry[j] + 16 * half);
  }

  static int64_t words(const PackedLayout& layout) { return layout.triple_words(); }

  static CodeStream stream(const PackedLayout& layout, int64_t block) {
    const int64_t unit = block / kSumUnit, left = layout.blocks - unit * kSumUnit;
    const auto* words = reinterpret_cast<const char*>(layout.triple_unit(unit)) + block % kSumUnit * 64;
    return {words, 64, (left < kSumUnit ? left : kSumUnit) * 64};
  }

  BQNN_INLINE void make(const float* x, int group, float* table) const {
    x += 3 * group;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const Float first = level[0][half] * x[0];
      const Float sum = multiply_add(level[1][half], broadcast(x[1]), first);
      store(table + 16 * half, multiply_add(level[2][half], broadcast(x[2]), sum));
    }
  }

  static BQNN_INLINE Float look_up(UInt word, const Float* table) {
    return (Float)_mm512_permutex2var_ps((__m512)table[0], (__m512i)word, (__m512)table[1]);
  }
};

// Words whose tables, of kRows rows, are made together.
template <class Sums, int kRows>
constexpr int64_t kSumWords = kTablesRoom / kRows / (Sums::kGroups * Sums::kVectors * 64);

// Adds (or, first, writes) to sums [kRows][kBlocks * 16], rows `stride` apart, what `count` words of kBlocks blocks say.
template <class Sums, int kRows, int kBlocks>
__attribute__((noinline)) void add_sums(CodeStream codes, int64_t ahead, int64_t count, const float* tables,
                                        float* sums, int64_t stride, bool first) {
  constexpr int kTable = Sums::kVectors * 16;
  constexpr int64_t kRow = kSumWords<Sums, kRows> * Sums::kGroups * kTable;
  Float sum[kRows][kBlocks] = {};
  for (int64_t w = 0; w < count; ++w, codes.words += codes.word, tables += Sums::kGroups * kTable) {
    UInt word[kBlocks];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      word[b] = load_lanes(codes.words + b * codes.block);
      _mm_prefetch(codes.words + b * codes.block + ahead, _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int g = 0; g < Sums::kGroups; ++g) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Float table[Sums::kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < Sums::kVectors; ++v) table[v] = load(tables + r * kRow + g * kTable + v * 16);
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) {
          sum[r][b] += Sums::look_up(word[b], table);
          __asm__("" : "+v"(sum[r][b]));  // or GCC looks up a whole word's sums, and spills them, before it adds one
        }
      }
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) word[b] >>= Sums::kShift;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      float* to = sums + r * stride + b * kBlock;
      store(to, first ? sum[r][b] : load(to) + sum[r][b]);
    }
}

// How many parts the channels are cut into, so that tasks of kRows rows keep all threads busy.
inline int64_t parts_of_channels(int64_t row_groups, int64_t units, int threads) {
  int64_t parts = 1;
  while (parts < units && row_groups * parts < 4 * threads && row_groups * parts % threads != 0) ++parts;
  return parts;
}

template <class Sums, int kRows, class X>
__attribute__((noinline)) void run_sums_of(const LinearCall& call, const Parallel& parallel) {
  constexpr int kBlocks = kRows <= 2 ? 8 : 4, kTable = Sums::kVectors * 16;
  constexpr int64_t kWords = kSumWords<Sums, kRows>, kRow = kWords * Sums::kGroups * kTable;
  const PackedLayout& layout = *call.weight;
  const int64_t words = Sums::words(layout), padded = words * Sums::kWordWeights;
  const int64_t row_groups = ceil_div(call.rows, kRows), units = ceil_div(layout.blocks, kSumUnit);
  const int64_t parts = parts_of_channels(row_groups, units, parallel.threads);
  const int64_t most = ceil_div(units, parts) * kSumUnit * kBlock;  // channels of a part
  const int64_t work = kRows * most * layout.columns;
  parallel_for(parallel, row_groups * parts, 1 + kTaskWork / work, [&](int64_t begin, int64_t end) {
    Codebook book;
    read_codebook<FloatOperand>(layout, 0, 0, &book);
    const Sums of(book);
    auto* x = reinterpret_cast<float*>(scratch(Scratch::activations, static_cast<size_t>(kRows * padded) * 4));
    auto* tables = reinterpret_cast<float*>(scratch(Scratch::tables, kRows * kRow * 4));
    auto* sums = reinterpret_cast<float*>(scratch(Scratch::products, static_cast<size_t>(kRows * most) * 4));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / parts * kRows, part = task % parts;
      const int64_t count = call.rows - row < kRows ? call.rows - row : kRows;
      const int64_t first_block = units * part / parts * kSumUnit, next = units * (part + 1) / parts * kSumUnit;
      const int64_t last_block = next < layout.blocks ? next : layout.blocks;
      for (int64_t r = 0; r < count; ++r) {
        float* to = x + r * padded;
        pack_row<FloatOperand>(static_cast<const X*>(call.x) + (row + r) * layout.columns, layout.columns, false,
                               RowScale{}, to);
        for (int64_t k = layout.columns; k < padded; ++k) to[k] = 0.0f;
      }
      for (int64_t word = 0; word < words; word += kWords) {
        const int64_t here = words - word < kWords ? words - word : kWords;
        for (int64_t r = 0; r < count; ++r)
          for (int64_t w = 0; w < here; ++w)
#pragma GCC unroll 8
            for (int g = 0; g < Sums::kGroups; ++g)
              of.make(x + r * padded + (word + w) * Sums::kWordWeights, g,
                      tables + r * kRow + (w * Sums::kGroups + g) * kTable);
        for_blocks<kBlocks>(first_block, last_block, [&](int64_t block, auto blocks) {
          CodeStream codes = Sums::stream(layout, block);
          const int64_t ahead = Sums::stream(layout, block + blocks.value).words - codes.words;
          codes.words += word * codes.word;
          add_sums<Sums, kRows, blocks.value>(codes, ahead, here, tables, sums + (block - first_block) * kBlock, most,
                                              word == 0);
        });
      }
      const int64_t channel = first_block * kBlock, width = last_block * kBlock - channel;
      const int64_t left = layout.channels - channel;
      const Epilogue strip = epilogue<FloatOperand>(call, 0, first_block);
      for (int64_t r = 0; r < count; ++r)
        finish_row<FloatOperand>(sums + r * most, width < left ? width : left, strip, 0.0f,
                                 static_cast<X*>(call.y) + (row + r) * layout.channels + channel);
    }
  });
}

template <class Sums, class X>
inline bool run_sums_with(const LinearCall& call, const Parallel& parallel) {
  const auto run = call.rows == 1   ? run_sums_of<Sums, 1, X>
                   : call.rows == 2 ? run_sums_of<Sums, 2, X>
                                    : run_sums_of<Sums, kSumRows, X>;
  run(call, parallel);
  return true;
}

// Whether this was a call that sums suit, and all of y is written.
template <class X>
inline bool run_sums(const LinearCall& call, const Parallel& parallel) {
  const PackedLayout& layout = *call.weight;
  const bool suits = layout.precision == Precision::fp32 && layout.codebooks == 1 && layout.bits <= 2 && call.rows > 0;
  if (!suits || (call.rows > kFewRows && layout.blocks < kLeastSumBlocks)) return false;
  if (layout.bits == 1) return run_sums_with<NibbleSums<1>, X>(call, parallel);
  if (layout.triples != 0) return run_sums_with<TripleSums, X>(call, parallel);
  // Two weights a permute: no faster than FMA where it shares its port with the additions.
  if (call.rows > kFewRows) return false;
  return run_sums_with<NibbleSums<2>, X>(call, parallel);
}
