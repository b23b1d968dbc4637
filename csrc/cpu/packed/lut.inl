// Float products at two to four levels on AVX-512: a few codes of a channel are one number, and a table of one or two
// registers has, for each of its values, the sum of what those weights add. So one permute and one addition take four,
// three or two weights of 16 channels, where a multiplication takes one. The permute looks at 4 or 5 bits: those above
// need no clearing.
//
// Tables are made where they are used, in the L1 cache, and all channels pass by: lut_linear.inl and
// lut_conv2d.inl.
//
// Included inside the namespace of the AVX-512 translation unit, after gemv_linear.inl.
#pragma once

constexpr int kSumRows = 4;                 // rows, or pixels, that share what is read and shifted of the codes
constexpr int kSumUnit = kNumberBlocks;     // blocks of a unit of tasks
constexpr int64_t kTablesRoom = 24 * 1024;  // bytes
// Below, with more than a few rows, decoding for a product takes less than making the tables.
constexpr int64_t kLeastSumBlocks = 8;

// Where the codes of some blocks stand.
struct CodeStream {
  const char* words;
  int64_t block, word;  // bytes from one to the next
};

// The numbers of layout.h.
template <int kLevels>
struct NumberSums {
  static constexpr int kWeights = numbers_of(kLevels).weights, kShift = numbers_of(kLevels).bits;
  static constexpr int kGroups = numbers_of(kLevels).in_word;  // of a word: sums that are looked up
  static constexpr int kWordWeights = kGroups * kWeights, kVectors = kShift - 3, kTable = kVectors * 16;
  Float level[kWeights][kVectors];

  explicit NumberSums(const PackedLayout& layout) {
    alignas(64) uint32_t levels[kBlock], entry[kTable];
    read_table<FloatOperand>(layout, 0, levels);
    for (int j = 0, power = 1; j < kWeights; ++j, power *= kLevels) {
      for (int i = 0; i < kTable; ++i) entry[i] = levels[i / power % kLevels];
      for (int v = 0; v < kVectors; ++v) level[j][v] = (Float)load_lanes(entry + 16 * v);
    }
  }

  static int64_t padded(const PackedLayout& layout) { return layout.number_words() * kWordWeights; }

  static CodeStream stream(const PackedLayout& layout, int64_t group, int64_t block) {
    const int64_t unit = block / kNumberBlocks, left = layout.blocks - unit * kNumberBlocks;
    const auto* words = reinterpret_cast<const char*>(layout.number_unit(group, unit)) + block % kNumberBlocks * 64;
    return {words, 64, (left < kNumberBlocks ? left : kNumberBlocks) * 64};
  }

  BQNN_INLINE void make(const float* x, float* table) const {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Float sum = level[0][v] * x[0];
#pragma GCC unroll 4
      for (int j = 1; j < kWeights; ++j) sum = multiply_add(level[j][v], broadcast(x[j]), sum);
      store(table + 16 * v, sum);
    }
  }

  // Tables of the weights of one word.
  BQNN_INLINE void make_word(const float* x, float* tables) const {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) make(x + g * kWeights, tables + g * kTable);
  }

  static BQNN_INLINE Float look_up(UInt word, const Float* table) {
    if constexpr (kVectors == 1) return (Float)permute<FloatOperand>(word, (UInt)table[0]);
    return (Float)_mm512_permutex2var_ps((__m512)table[0], (__m512i)word, (__m512)table[kVectors - 1]);
  }
};

// Pairs of weights at four levels, as the words of the layout have them.
struct PairSums {
  static constexpr int kGroups = 8, kShift = 4, kVectors = 1, kTable = 16, kWordWeights = 16;
  Float level[2];  // of the first weight of a pair and the second

  explicit PairSums(const PackedLayout& layout) {
    alignas(64) uint32_t levels[kBlock], entry[kTable];
    read_table<FloatOperand>(layout, 0, levels);
    for (int j = 0; j < 2; ++j) {
      for (int i = 0; i < kTable; ++i) entry[i] = levels[i >> (2 * j) & 3];
      level[j] = (Float)load_lanes(entry);
    }
  }

  static int64_t padded(const PackedLayout& layout) { return layout.padded; }

  static CodeStream stream(const PackedLayout& layout, int64_t group, int64_t block) {
    return {reinterpret_cast<const char*>(layout.block(group, block)), layout.block_words() * 4, kBlock * 4};
  }

  BQNN_INLINE void make_word(const float* x, float* tables) const {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      const float* pair = x + g % 4 * 4 + g / 4;  // every half word has every second weight
      store(tables + g * kTable, multiply_add(level[1], broadcast(pair[2]), level[0] * pair[0]));
    }
  }

  static BQNN_INLINE Float look_up(UInt word, const Float* table) {
    return (Float)permute<FloatOperand>(word, (UInt)table[0]);
  }
};

// Adds (or, first, writes) to sums [kRows][kBlocks * 16], rows `stride` apart, what `count` words of kBlocks blocks
// say; at(i) leads from a row's tables to that of group i.
template <class Sums, int kRows, int kBlocks, class At>
BQNN_INLINE void add_sums(CodeStream codes, int64_t ahead, int64_t count, const float* const* tables, const At& at,
                          float* sums, int64_t stride, bool first) {
  Float sum[kRows][kBlocks] = {};
  const float* row[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) row[r] = tables[r];
  for (int64_t w = 0; w < count; ++w, codes.words += codes.word) {
    UInt word[kBlocks];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      word[b] = load_lanes(codes.words + b * codes.block);
      _mm_prefetch(codes.words + b * codes.block + ahead, _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int g = 0; g < Sums::kGroups; ++g) {
      const int64_t offset = at(w * Sums::kGroups + g);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Float table[Sums::kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < Sums::kVectors; ++v) table[v] = load(row[r] + offset + v * 16);
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

// How many parts the channels are cut into, so that tasks keep all threads busy.
inline int64_t parts_of_channels(int64_t tasks, int64_t units, int threads) {
  int64_t parts = 1;
  while (parts < units && tasks * parts < 4 * threads && tasks * parts % threads != 0) ++parts;
  return parts;
}
