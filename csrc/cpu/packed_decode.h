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
  alignas(64) uint32_t entries[kTable][kBlock];  // [0][code] of a shared one, [code][channel] else
};

template <class Op>
inline uint32_t level_of(const PackedLayout& layout, int64_t index) {
  // Where a lane holds four integers, one instruction decodes them: bytes all over a lane.
  if constexpr (Op::kUnit == 4) return 0x01010101u * static_cast<uint8_t>(layout.int8_table()[index]);
  if constexpr (Op::kUnit == 2) return static_cast<uint32_t>(int32_t{layout.int8_table()[index]});
  float level = Op::kInt8 ? static_cast<float>(layout.int8_table()[index]) : layout.level_table()[index];
  if (layout.precision == Precision::bf16) level = round_to_bf16(level);
  uint32_t bits;
  __builtin_memcpy(&bits, &level, sizeof bits);
  return bits;
}

template <class Op>
inline void read_codebook(const PackedLayout& layout, int64_t group, int64_t block, Codebook* book) {
  if (layout.codebooks == 1) {
    if constexpr (Op::kUnit == 4) {
      for (int i = 0; i < kBlock * 4; i += kTable)
        __builtin_memcpy(reinterpret_cast<char*>(book->entries[0]) + i, layout.int8_table(), kTable);
      return;
    }
    for (int i = 0; i < kTable; ++i) book->entries[0][i] = level_of<Op>(layout, i);
    return;
  }
  const int64_t channel = (group * layout.blocks + block) * kBlock;
  for (int m = 0; m < kTable; ++m)
    for (int i = 0; i < kBlock; ++i) book->entries[m][i] = level_of<Op>(layout, (channel + i) * kTable + m);
}

// The levels of the codes in the low bits of each lane of vector `part` of a block; the bits above may be anything.
template <int kBits, bool kShared>
BQNN_INLINE UInt look_up(const Codebook& book, UInt word, int part) {
  if constexpr (kShared) {
    const uint32_t* table = book.entries[0];  // repeated with the period of the code
#if BQNN_LANES == 16
    // GCC 12 warns of the one without a mask.
    return (UInt)_mm512_maskz_permutexvar_epi32(0xFFFF, (__m512i)word, (__m512i)load_lanes(table));
#elif BQNN_LANES == 8
    const __m256i low = _mm256_permutevar8x32_epi32((__m256i)load_lanes(table), (__m256i)word);
    if constexpr (kBits < 4) return (UInt)low;
    const __m256i high = _mm256_permutevar8x32_epi32((__m256i)load_lanes(table + 8), (__m256i)word);
    return (UInt)_mm256_blendv_ps((__m256)low, (__m256)high, (__m256)(word << 28));
#else
    UInt value = {};
    for (int i = 0; i < kLanes; ++i) value[i] = table[word[i] % kTable];
    return value;
#endif
  }
  // A tournament: bit by bit of the code, one of every two levels that are left.
  constexpr int kCodes = 1 << kBits;
  UInt level[kCodes];
#pragma GCC unroll 16
  for (int m = 0; m < kCodes; ++m) level[m] = load_lanes(book.entries[m] + part * kLanes);
#pragma GCC unroll 4
  for (int bit = 0; bit < kBits; ++bit) {
    const Mask odd = (Mask)((word & (1u << bit)) != 0);
#pragma GCC unroll 8
    for (int m = 0; m < kCodes >> (bit + 1); ++m) level[m] = odd ? level[2 * m + 1] : level[2 * m];
  }
  return level[0];
}

// One lane of K: the kUnit weights of a word from the `first` one on.
template <class Op, int kBits, bool kShared>
BQNN_INLINE UInt look_up_lane(const Codebook& book, UInt word, int first, int part) {
  constexpr int kUnit = Op::kInt8 ? 4 : 2;  // of the layout
#if BQNN_LANES == 16
  if constexpr (Op::kInt8) {
    const UInt codes = word >> (first / kUnit * kBits);  // in the low bits of every byte
    if constexpr (kShared)
      return (UInt)_mm512_maskz_permutexvar_epi8(~0ull, (__m512i)codes, (__m512i)load_lanes(book.entries[0]));
    constexpr int kCodes = 1 << kBits;
    __m512i level[kCodes];
#pragma GCC unroll 16
    for (int m = 0; m < kCodes; ++m) level[m] = (__m512i)load_lanes(book.entries[m]);
#pragma GCC unroll 4
    for (int bit = 0; bit < kBits; ++bit) {
      const __mmask64 odd = _mm512_test_epi8_mask((__m512i)codes, _mm512_set1_epi8(static_cast<char>(1 << bit)));
#pragma GCC unroll 8
      for (int m = 0; m < kCodes >> (bit + 1); ++m)
        level[m] = _mm512_mask_mov_epi8(level[2 * m], odd, level[2 * m + 1]);
    }
    return (UInt)level[0];
  }
#endif
  UInt value = {};
#pragma GCC unroll 4
  for (int j = 0; j < Op::kUnit; ++j) {
    const int i = first + j;
    UInt level = look_up<kBits, kShared>(book, word >> (i % kUnit * (32 / kUnit) + i / kUnit * kBits), part);
    if (Op::kUnit > 1) level = (level & (0xFFFFFFFFu >> (32 - 32 / Op::kUnit))) << (j * (32 / Op::kUnit));
    value |= level;
  }
  return value;
}

template <class Op, int kBits, bool kShared>
__attribute__((noinline)) void decode_words(const Codebook& book, const uint32_t* words, int64_t weights,
                                            uint32_t* panel, int64_t stride) {
  constexpr int kWord = 32 / kBits;
  for (int64_t k = 0; k < weights; k += kWord, words += kBlock, panel += kWord / Op::kUnit * stride) {
    for (int part = 0; part < kParts; ++part) {
      const UInt word = load_lanes(words + part * kLanes);
#pragma GCC unroll 32
      for (int first = 0; first < kWord; first += Op::kUnit) {
        const UInt value = look_up_lane<Op, kBits, kShared>(book, word, first, part);
        __builtin_memcpy(panel + first / Op::kUnit * stride + part * kLanes, &value, sizeof value);
      }
    }
  }
}

// Decodes `weights` weights of a block, and up to the end of the last word, into lanes `stride` 32-bit numbers apart;
// beyond the last weight its lane holds 0.
template <class Op>
inline void decode(const PackedLayout& layout, const Codebook& book, const uint32_t* words, int64_t weights,
                   uint32_t* panel, int64_t stride) {
  with_codes_of(layout, [&](auto bits, auto shared) {
    decode_words<Op, bits.value, shared.value != 0>(book, words, weights, panel, stride);
  });
  if (const int rest = static_cast<int>(weights % Op::kUnit)) {
    const uint32_t keep = (1u << (rest * (32 / Op::kUnit))) - 1;
    for (int i = 0; i < kBlock; ++i) panel[weights / Op::kUnit * stride + i] &= keep;
  }
}
