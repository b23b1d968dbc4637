// Float products at two and three levels on AVX-512: a few codes of a channel are one index, and a table of one or two
// registers has, for each of its values, the sum of what those weights add. So one permute and one addition take four
// or three weights of 16 channels, where a multiplication takes one. The permute looks at 4 or 5 bits: those above need
// no clearing.
//
// Tables are made where they are used, in the L1 cache, and all channels pass by: lut_linear.inl and lut_conv2d.inl.

constexpr int kSumRows = 4;                 // rows or pixels that share what is read and shifted of the codes
constexpr int64_t kTablesRoom = 24 * 1024;  // bytes of tables that are made together

// The tables of a codebook of kLevels levels.
template <int kLevels>
struct SumTables {
  static constexpr SumIndex kIndex = sum_index(kLevels);
  static constexpr int kWeights = kIndex.weights, kInWord = kIndex.in_word;
  static constexpr int kWordWeights = kInWord * kWeights, kVectors = kIndex.bits - 3, kEntries = kVectors * 16;
  Float level[kWeights][kVectors];

  explicit SumTables(const PackedLayout& layout) {
    alignas(64) uint32_t levels[kBlock], entry[kEntries];
    read_table<FloatOperand>(layout, {layout.level_table()}, 0, levels);
    for (int j = 0, power = 1; j < kWeights; ++j, power *= kLevels) {
      for (int i = 0; i < kEntries; ++i) entry[i] = levels[i / power % kLevels];
      for (int v = 0; v < kVectors; ++v) level[j][v] = (Float)load_lanes(entry + 16 * v);
    }
  }

  // The table of kWeights activations.
  BQNN_INLINE void make(const float* x, float* table) const {
    BQNN_UNROLL(2) for (int v = 0; v < kVectors; ++v) {
      Float sum = level[0][v] * x[0];
      BQNN_UNROLL(4) for (int j = 1; j < kWeights; ++j) sum = multiply_add(level[j][v], broadcast(x[j]), sum);
      store(table + 16 * v, sum);
    }
  }

  static BQNN_INLINE Float look_up(UInt word, const Float* table) {
    if constexpr (kVectors == 1) return (Float)permute<FloatOperand>(word, (UInt)table[0]);
    return (Float)_mm512_permutex2var_ps((__m512)table[0], (__m512i)word, (__m512)table[kVectors - 1]);
  }
};

// Where the indices of some blocks stand, in words, and how far apart those of the next index word are.
struct IndexStream {
  const uint32_t* words;
  int64_t stride;
};

inline IndexStream index_stream(const PackedLayout& layout, int64_t group, int64_t block) {
  const int64_t unit = block / kIndexBlocks;
  return {layout.index_unit(group, unit) + block % kIndexBlocks * kBlock,
          smaller(layout.blocks - unit * kIndexBlocks, kIndexBlocks) * kBlock};
}

// Adds (or, first, writes) to sums [kRows][kBlocks * 16], rows `stride` apart, what `count` words of kBlocks blocks
// say; at(i) leads from a row's tables to that of index i.
template <class Tables, int kRows, int kBlocks, class At>
BQNN_INLINE void add_sums(IndexStream indices, int64_t ahead, int64_t count, const float* const* tables, const At& at,
                          float* sums, int64_t stride, bool first) {
  Float sum[kRows][kBlocks] = {};
  const float* row[kRows];
  BQNN_UNROLL(4) for (int r = 0; r < kRows; ++r) row[r] = tables[r];
  for (int64_t w = 0; w < count; ++w, indices.words += indices.stride) {
    UInt word[kBlocks];
    BQNN_UNROLL(8) for (int b = 0; b < kBlocks; ++b) {
      word[b] = load_lanes(indices.words + b * kBlock);
      _mm_prefetch(reinterpret_cast<const char*>(indices.words + b * kBlock + ahead), _MM_HINT_T0);
    }
    BQNN_UNROLL(8) for (int i = 0; i < Tables::kInWord; ++i) {
      const int64_t offset = at(w * Tables::kInWord + i);
      BQNN_UNROLL(4) for (int r = 0; r < kRows; ++r) {
        Float table[Tables::kVectors];
        BQNN_UNROLL(2) for (int v = 0; v < Tables::kVectors; ++v) table[v] = load(row[r] + offset + v * 16);
        BQNN_UNROLL(8) for (int b = 0; b < kBlocks; ++b) {
          sum[r][b] += Tables::look_up(word[b], table);
          __asm__("" : "+v"(sum[r][b]));  // or GCC looks up a whole word's sums, and spills them, before it adds one
        }
      }
      BQNN_UNROLL(8) for (int b = 0; b < kBlocks; ++b) word[b] >>= Tables::kIndex.bits;
    }
  }
  BQNN_UNROLL(4) for (int r = 0; r < kRows; ++r)
    BQNN_UNROLL(8) for (int b = 0; b < kBlocks; ++b) {
      float* to = sums + r * stride + b * kBlock;
      store(to, first ? sum[r][b] : load(to) + sum[r][b]);
    }
}

// How the channels are cut into parts, so that tasks keep all threads busy.
struct ChannelParts {
  int64_t blocks, units, parts;

  ChannelParts(int64_t blocks, int64_t tasks, int threads) : blocks(blocks), units(ceil_div(blocks, kIndexBlocks)) {
    parts = 1;
    while (parts < units && tasks * parts < 4 * threads && tasks * parts % threads != 0) ++parts;
  }
  int64_t most_channels() const { return ceil_div(units, parts) * kIndexBlocks * kBlock; }
  int64_t first_block(int64_t part) const { return smaller(units * part / parts * kIndexBlocks, blocks); }
};
