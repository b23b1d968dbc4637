// From words of codes to a panel of weights: [lane of K][blocks][16 channels], 32 bits each.
//
// Included inside the namespace of a translation unit that has set the target, after packed_operands.h.
#pragma once

constexpr int kParts = kBlock / kLanes;  // vectors that hold a block's channels

// The float nearest to x, ties to even, that bfloat16 has; NaN stays NaN, and infinity infinity.
BQNN_INLINE float round_to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t nearest = bits + 0x7FFF + (bits >> 16 & 1), quiet = bits | 0x400000;
  bits = ((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet : nearest) & 0xFFFF0000;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// The levels of a block of channels, as 32 bits each: floats, or integers where the lanes hold several.
struct Codebook {
  bool shared;
  int levels;
  uint32_t mask;                                // of a code
  alignas(64) uint32_t entries[kMaxLevels][16];  // [0][code] of a shared one, [code][channel] else
};

template <class Op>
inline uint32_t level_of(const PackedLayout& layout, int64_t index) {
  if constexpr (Op::kInt8 && Op::kUnit > 1) return static_cast<uint32_t>(int32_t{layout.int8_table()[index]});
  float level = Op::kInt8 ? static_cast<float>(layout.int8_table()[index]) : layout.level_table()[index];
  if (layout.precision == Precision::bf16) level = round_to_bf16(level);
  uint32_t bits;
  __builtin_memcpy(&bits, &level, sizeof bits);
  return bits;
}

template <class Op>
inline void read_codebook(const PackedLayout& layout, int64_t group, int64_t block, Codebook* book) {
  book->shared = layout.codebooks == 1;
  book->levels = layout.num_levels;
  book->mask = (1u << layout.bits) - 1;
  if (book->shared) {
    for (int i = 0; i < kTable; ++i) book->entries[0][i] = level_of<Op>(layout, i);
    return;
  }
  const int64_t channel = (group * layout.blocks + block) * kBlock;
  for (int m = 0; m < book->levels; ++m)
    for (int i = 0; i < kBlock; ++i) book->entries[m][i] = level_of<Op>(layout, (channel + i) * kTable + m);
}

// The levels of the codes in the low bits of vector `part` of a block; the bits above may be anything.
BQNN_INLINE UInt look_up(const Codebook& book, UInt word, int part) {
  if (book.shared) {
    const uint32_t* table = book.entries[0];  // repeated with the period of the code
#if BQNN_LANES == 16
    // GCC 12 warns of the one without a mask.
    return (UInt)_mm512_maskz_permutexvar_epi32(0xFFFF, (__m512i)word, (__m512i)load_lanes(table));
#elif BQNN_LANES == 8
    const __m256i low = _mm256_permutevar8x32_epi32((__m256i)load_lanes(table), (__m256i)word);
    const __m256i high = _mm256_permutevar8x32_epi32((__m256i)load_lanes(table + 8), (__m256i)word);
    return (UInt)_mm256_blendv_ps((__m256)low, (__m256)high, (__m256)(word << 28));
#else
    UInt value = {};
    for (int i = 0; i < kLanes; ++i) value[i] = table[word[i] % kTable];
    return value;
#endif
  }
  const Int code = (Int)(word & book.mask);
  UInt value = load_lanes(book.entries[0] + part * kLanes);
  for (int m = 1; m < book.levels; ++m) value = code >= m ? load_lanes(book.entries[m] + part * kLanes) : value;
  return value;
}

// One lane of K: the kUnit weights from the `first` one of a word.
template <class Op>
BQNN_INLINE UInt look_up_lane(const Codebook& book, UInt word, int bits, int first, int part) {
  constexpr int kUnit = Op::kInt8 ? 4 : 2;  // of the layout
  UInt value = {};
  for (int j = 0; j < Op::kUnit; ++j) {
    const int i = first + j;
    UInt level = look_up(book, word >> (i % kUnit * (32 / kUnit) + i / kUnit * bits), part);
    if (Op::kUnit > 1) level = (level & (0xFFFFFFFFu >> (32 - 32 / Op::kUnit))) << (j * (32 / Op::kUnit));
    value |= level;
  }
  return value;
}

// Decodes `weights` weights of a block into lanes `stride` 32-bit numbers apart; what the last lane holds beyond them
// is 0.
template <class Op>
__attribute__((noinline)) void decode(const Codebook& book, int bits, const uint32_t* words, int64_t weights,
                                      uint32_t* panel, int64_t stride) {
  const int in_word = 32 / bits;
  uint32_t* to = panel;
  for (int64_t k = 0; k < weights; k += in_word, words += kBlock) {
    for (int first = 0; first < in_word && k + first < weights; first += Op::kUnit, to += stride) {
      for (int part = 0; part < kParts; ++part) {
        const UInt value = look_up_lane<Op>(book, load_lanes(words + part * kLanes), bits, first, part);
        __builtin_memcpy(to + part * kLanes, &value, sizeof value);
      }
    }
  }
  if (const int rest = static_cast<int>(weights % Op::kUnit)) {
    const uint32_t keep = (1u << (rest * (32 / Op::kUnit))) - 1;
    for (int i = 0; i < kBlock; ++i) to[i - stride] &= keep;
  }
}
