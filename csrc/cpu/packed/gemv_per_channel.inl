// packed_linear of a few rows on AVX-512 with a codebook a channel: 16 words of each channel are turned into one
// vector, so that a permute of the channel's own table decodes them; the lanes are words, and sums run along K.

// Blocks that a kernel computes together at most.
constexpr int kMostBlocks = 8;

// Words are fetched so many vectors before their use.
constexpr int kAhead = 16;

BQNN_INLINE void prefetch_words(const uint32_t* word) {
  _mm_prefetch(reinterpret_cast<const char*>(word + kAhead * kBlock), _MM_HINT_T0);
}

// How many times 16 words a channel has, the last ones perhaps not whole.
inline int64_t groups_of_words(const PackedLayout& layout) {
  return ceil_div(layout.padded, 16 * layout.word_weights());
}

// Lanes of activations in the order in which channel_rows meets them: [16 words][lane of the word][word]; returns `to`.
inline char* turn_activations(const char* x, int64_t groups, int lanes, char* to) {
  const auto* from = reinterpret_cast<const uint32_t*>(x);
  auto* turned = reinterpret_cast<uint32_t*>(to);
  for (int64_t group = 0; group < groups; ++group, from += 16 * lanes)
    for (int i = 0; i < lanes; ++i)
      for (int word = 0; word < 16; ++word) *turned++ = from[word * lanes + i];
  return to;
}

// Products [kRows][kMostBlocks * 16] of one block. The 8-bit ones are of levels + 128.
template <class Op, int kBits, int kRows>
__attribute__((noinline)) void channel_rows(const PackedLayout& layout, int64_t block, const char* const* row,
                                            typename Op::Product* products) {
  constexpr int kWord = 32 / kBits, kLanesOfWord = kWord / Op::kUnit;
  alignas(64) uint32_t tables[kBlock][16], turned[kBlock][16];
  UInt total[kRows][kBlock] = {};
  for (int c = 0; c < kBlock; ++c) {
    read_table<Op>(layout, {layout.level_table()}, (block * kBlock + c) * kTable, tables[c]);
    if (Op::kInt8)
      for (int i = 0; i < 16; ++i) tables[c][i] ^= 0x80808080u;
  }
  const uint32_t* words = layout.block(0, block);
  const int64_t count = layout.padded / kWord;
  for (int64_t first = 0, at = 0; first < count; first += 16, at += kLanesOfWord * 64) {
    UInt word[16];
    BQNN_UNROLL(16) for (int i = 0; i < 16; ++i) {
      prefetch_words(words + (first + i) * kBlock);
      word[i] = first + i < count ? load_lanes(words + (first + i) * kBlock) : UInt{};
    }
    transpose(word);
    BQNN_UNROLL(16) for (int c = 0; c < kBlock; ++c) __builtin_memcpy(turned[c], &word[c], sizeof word[c]);
    for (int c = 0; c < kBlock; ++c) {
      const UInt codes = load_lanes(turned[c]);
      const UInt table = load_lanes(tables[c]);
      typename Op::Sum sum[kRows][2] = {};
      BQNN_UNROLL(32) for (int i = 0; i < kLanesOfWord; ++i) {
        const int shift = Op::kUnit > 1 ? i * kBits : i % 2 * 16 + i / 2 * kBits;
        const UInt level = permute<Op>(codes >> shift, table);
        BQNN_UNROLL(8) for (int r = 0; r < kRows; ++r)
          sum[r][i % 2] = Op::dot(load_lanes(row[r] + at + i * 64), level, sum[r][i % 2]);
      }
      BQNN_UNROLL(8) for (int r = 0; r < kRows; ++r) total[r][c] = Op::add(Op::add(total[r][c], sum[r][0]), sum[r][1]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    transpose(total[r]);
    UInt product = total[r][0];
    for (int i = 1; i < 16; ++i) product = Op::add(product, total[r][i]);
    __builtin_memcpy(products + r * kMostBlocks * kBlock, &product, sizeof product);
  }
}
