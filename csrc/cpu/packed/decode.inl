// From words of codes to a panel of weights: [lane of K][blocks][16 channels], 32 bits each.
//
// Included inside the namespace of a translation unit that has set the target, after operands.inl.
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
  // Where one instruction decodes all that a lane holds, it has the level in each of its places.
  if constexpr (Op::kUnit == 4) return 0x01010101u * static_cast<uint8_t>(layout.int8_table()[index]);
  if constexpr (Op::kUnit == 2 && Op::kInt8) return static_cast<uint32_t>(int32_t{layout.int8_table()[index]});
  float level = Op::kInt8 ? static_cast<float>(layout.int8_table()[index]) : layout.level_table()[index];
  if (layout.precision == Precision::bf16) level = round_to_bf16(level);
  uint32_t bits;
  __builtin_memcpy(&bits, &level, sizeof bits);
  return Op::kHalf ? bits | bits >> 16 : bits;
}

// The levels of the codebook that begins at `first` of the table: a vector for one permute, repeated with the period of
// the code.
template <class Op>
inline void read_table(const PackedLayout& layout, int64_t first, uint32_t (&table)[kBlock]) {
  constexpr int kPlaces = kBlock * Op::kUnit;  // of a level, in the table
  if constexpr (Op::kUnit == 4) {
    for (int i = 0; i < kPlaces; i += kTable)
      __builtin_memcpy(reinterpret_cast<char*>(table) + i, layout.int8_table() + first, kTable);
  } else if constexpr (Op::kHalf) {
    for (int i = 0; i < kPlaces; ++i) {
      const auto half = static_cast<uint16_t>(level_of<Op>(layout, first + i % kTable));
      __builtin_memcpy(reinterpret_cast<char*>(table) + 2 * i, &half, sizeof half);
    }
  } else {
    for (int i = 0; i < kTable; ++i) table[i] = level_of<Op>(layout, first + i);
  }
}

template <class Op>
inline void read_codebook(const PackedLayout& layout, int64_t group, int64_t block, Codebook* book) {
  if (layout.codebooks == 1) return read_table<Op>(layout, 0, book->entries[0]);
  const int64_t channel = (group * layout.blocks + block) * kBlock;
  for (int m = 0; m < kTable; ++m)
    for (int i = 0; i < kBlock; ++i) book->entries[m][i] = level_of<Op>(layout, (channel + i) * kTable + m);
}

#if BQNN_LANES == 16
// The entries of a table that the low bits of every byte, half or lane name. GCC 12 warns of permutes without a mask.
template <class Op>
BQNN_INLINE UInt permute(UInt index, UInt table) {
  if constexpr (Op::kInt8) return (UInt)_mm512_maskz_permutexvar_epi8(~0ull, (__m512i)index, (__m512i)table);
  if constexpr (Op::kHalf) return (UInt)_mm512_maskz_permutexvar_epi16(~0u, (__m512i)index, (__m512i)table);
  return (UInt)_mm512_maskz_permutexvar_epi32(0xFFFF, (__m512i)index, (__m512i)table);
}
#endif

// The levels of the codes in the low bits of each lane of vector `part` of a block; the bits above may be anything.
template <int kBits, bool kShared>
BQNN_INLINE UInt look_up(const Codebook& book, UInt word, int part) {
  if constexpr (kShared) {
    const uint32_t* table = book.entries[0];  // repeated with the period of the code
#if BQNN_LANES == 16
    return permute<FloatOperand>(word, load_lanes(table));
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
  if constexpr (Op::kUnit == kUnit) {  // one instruction for all of the lane
    const UInt code = word >> (first / kUnit * kBits);
    if constexpr (kShared) return permute<Op>(code, load_lanes(book.entries[0]));
    const auto codes = (__m512i)code;
    constexpr int kCodes = 1 << kBits;
    __m512i level[kCodes];
#pragma GCC unroll 16
    for (int m = 0; m < kCodes; ++m) level[m] = (__m512i)load_lanes(book.entries[m]);
#pragma GCC unroll 4
    for (int bit = 0; bit < kBits; ++bit) {
      const auto odd = Op::kHalf ? _mm512_test_epi16_mask(codes, _mm512_set1_epi16(static_cast<short>(1 << bit)))
                                 : _mm512_test_epi8_mask(codes, _mm512_set1_epi8(static_cast<char>(1 << bit)));
#pragma GCC unroll 8
      for (int m = 0; m < kCodes >> (bit + 1); ++m)
        level[m] = Op::kHalf ? _mm512_mask_mov_epi16(level[2 * m], static_cast<__mmask32>(odd), level[2 * m + 1])
                             : _mm512_mask_mov_epi8(level[2 * m], odd, level[2 * m + 1]);
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
