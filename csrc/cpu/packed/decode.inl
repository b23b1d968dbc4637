// From words of codes to a panel of weights: [lane of K][blocks][16 channels], 32 bits each.

// Vectors that hold a block's channels.
constexpr int kParts = kBlock / kLanes;

// The levels of a block of channels, as 32 bits each: floats, or integers where the lanes hold several.
struct Codebook {
  alignas(64) uint32_t entries[kTable][kBlock];  // [0][code] of a shared one, [code][channel] else
};

// What is decoded: a table of levels, and which of the bfloat16 numbers whose sum is a level: the level rounded, or
// what rounding left of it.
struct LevelSource {
  const float* table;
  int part = 0;
};

template <class Op>
inline uint32_t level_of(const PackedLayout& layout, const LevelSource& source, int64_t index) {
  // Where one instruction decodes all that a lane holds, it has the level in each of its places.
  if constexpr (Op::kUnit == 4) return 0x01010101u * static_cast<uint8_t>(layout.int8_table()[index]);
  if constexpr (Op::kUnit == 2 && Op::kInt8) return static_cast<uint32_t>(int32_t{layout.int8_table()[index]});
  float level = Op::kInt8 ? static_cast<float>(layout.int8_table()[index]) : source.table[index];
  for (int part = 0; part < source.part; ++part) level -= nearest_bfloat16(level);
  if (Op::kBfloat16 || layout.precision == Precision::bf16) level = nearest_bfloat16(level);
  uint32_t bits;
  __builtin_memcpy(&bits, &level, sizeof bits);
  return Op::kBfloat16 ? bits | bits >> 16 : bits;
}

// The levels of the codebook that begins at `first` of the table: a vector for one permute, repeated with the period of
// the code.
template <class Op>
inline void read_table(const PackedLayout& layout, const LevelSource& source, int64_t first, uint32_t* table) {
  constexpr int kPlaces = kBlock * Op::kUnit;  // places of the table
  if constexpr (Op::kUnit == 4) {
    for (int i = 0; i < kPlaces; i += kTable)
      __builtin_memcpy(reinterpret_cast<char*>(table) + i, layout.int8_table() + first, kTable);
  } else if constexpr (Op::kBfloat16) {
    for (int i = 0; i < kPlaces; ++i) {
      const auto level = static_cast<Bfloat16>(level_of<Op>(layout, source, first + i % kTable));
      __builtin_memcpy(reinterpret_cast<char*>(table) + 2 * i, &level, sizeof level);
    }
  } else {
    for (int i = 0; i < kTable; ++i) table[i] = level_of<Op>(layout, source, first + i);
  }
}

template <class Op>
inline void read_codebook(const PackedLayout& layout, const LevelSource& source, int64_t group, int64_t block,
                          Codebook* book) {
  if (layout.codebooks == 1) return read_table<Op>(layout, source, 0, book->entries[0]);
  const int64_t channel = (group * layout.blocks + block) * kBlock;
  for (int m = 0; m < kTable; ++m)
    for (int i = 0; i < kBlock; ++i) book->entries[m][i] = level_of<Op>(layout, source, (channel + i) * kTable + m);
}

#if BQNN_LANES == 16
// The entries of a table that the low bits of every byte, half or lane name. GCC 12 warns of permutes without a mask.
template <class Op>
BQNN_INLINE UInt permute(UInt index, UInt table) {
  if constexpr (Op::kInt8) return (UInt)_mm512_maskz_permutexvar_epi8(~0ull, (__m512i)index, (__m512i)table);
  if constexpr (Op::kBfloat16) return (UInt)_mm512_maskz_permutexvar_epi16(~0u, (__m512i)index, (__m512i)table);
  return (UInt)_mm512_maskz_permutexvar_epi32(0xFFFF, (__m512i)index, (__m512i)table);
}
#endif

// Of two levels the one that a bit of the code names, in every place of a lane that holds kUnit of them.
template <int kUnit>
BQNN_INLINE UInt choose(UInt code, int bit, UInt zero, UInt one) {
#if BQNN_LANES == 16
  const auto codes = (__m512i)code, low = (__m512i)zero, high = (__m512i)one;
  if constexpr (kUnit == 4)
    return (UInt)_mm512_mask_mov_epi8(
        low, _mm512_test_epi8_mask(codes, _mm512_set1_epi8(static_cast<char>(1 << bit))), high);
  if constexpr (kUnit == 2)
    return (UInt)_mm512_mask_mov_epi16(
        low, _mm512_test_epi16_mask(codes, _mm512_set1_epi16(static_cast<short>(1 << bit))), high);
#endif
  return (Mask)((code & (1u << bit)) != 0) ? one : zero;
}

// The level of each channel of vector `part` of a block: bit by bit of its code, one of every two that are left.
template <int kBits, int kUnit>
BQNN_INLINE UInt choose_levels(const Codebook& book, UInt code, int part) {
  constexpr int kCodes = 1 << kBits;
  UInt level[kCodes];
  BQNN_UNROLL(16) for (int m = 0; m < kCodes; ++m) level[m] = load_lanes(book.entries[m] + part * kLanes);
  unroll<kBits>([&](auto bit) __attribute__((always_inline)) {
    BQNN_UNROLL(8) for (int m = 0; m < kCodes >> (bit.value + 1); ++m)
      level[m] = choose<kUnit>(code, bit.value, level[2 * m], level[2 * m + 1]);
  });
  return level[0];
}

// The levels of the codes in the low bits of each lane of vector `part` of a block; the bits above may be anything.
template <int kBits, bool kShared>
BQNN_INLINE UInt look_up(const Codebook& book, UInt word, int part) {
  if constexpr (!kShared) return choose_levels<kBits, 1>(book, word, part);
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

// One lane of K: the kUnit weights of a word from the `first` one on.
template <class Op, int kBits, bool kShared>
BQNN_INLINE UInt look_up_lane(const Codebook& book, UInt word, int first, int part) {
  constexpr int kUnit = Op::kInt8 ? 4 : 2;  // weights that a lane of the layout has
#if BQNN_LANES == 16
  if constexpr (Op::kUnit == kUnit) {  // one instruction for all of the lane
    const UInt code = word >> (first / kUnit * kBits);
    if constexpr (kShared) return permute<Op>(code, load_lanes(book.entries[0]));
    return choose_levels<kBits, kUnit>(book, code, part);
  }
#else
  if constexpr (Op::kUnit == 4 && kShared) {
    const UInt code = (word >> (first / kUnit * kBits)) & 0x0F0F0F0Fu;
#if BQNN_LANES == 8
    return (UInt)_mm256_shuffle_epi8((__m256i)load_lanes(book.entries[0]), (__m256i)code);
#endif
    const auto* table = reinterpret_cast<const uint8_t*>(book.entries[0]);
    UInt value = {};
    for (int j = 0; j < 4 * kLanes; ++j)
      value[j / 4] |= static_cast<uint32_t>(table[code[j / 4] >> j % 4 * 8 & 15]) << j % 4 * 8;
    return value;
  }
#endif
  UInt value = {};
  BQNN_UNROLL(4) for (int j = 0; j < Op::kUnit; ++j) {
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
      BQNN_UNROLL(32) for (int first = 0; first < kWord; first += Op::kUnit) {
        const UInt value = look_up_lane<Op, kBits, kShared>(book, word, first, part);
        __builtin_memcpy(panel + first / Op::kUnit * stride + part * kLanes, &value, sizeof value);
      }
    }
  }
}

// Calls f(bits, shared) with both as compile-time constants.
template <class F>
inline auto with_codes_of(const PackedLayout& layout, const F& f) {
  const auto with_bits = [&](auto shared) {
    if (layout.bits == 4) return f(Constant<4>{}, shared);
    return layout.bits == 1 ? f(Constant<1>{}, shared) : f(Constant<2>{}, shared);
  };
  return layout.codebooks == 1 ? with_bits(Constant<1>{}) : with_bits(Constant<0>{});
}

template <class Op>
inline auto decoder_of(const PackedLayout& layout) {
  return with_codes_of(layout, [](auto bits, auto shared) { return &decode_words<Op, bits.value, shared.value != 0>; });
}

// Makes the lanes [weights / kUnit, lanes) of a panel hold nothing beyond the last weight.
template <class Op>
inline void clear_beyond(uint32_t* panel, int64_t stride, int64_t weights, int64_t lanes) {
  int64_t lane = weights / Op::kUnit;
  if (const int rest = static_cast<int>(weights % Op::kUnit)) {
    const uint32_t keep = (1u << (rest * (32 / Op::kUnit))) - 1;
    for (int i = 0; i < kBlock; ++i) panel[lane * stride + i] &= keep;
    ++lane;
  }
  for (; lane < lanes; ++lane) __builtin_memset(panel + lane * stride, 0, kBlock * sizeof *panel);
}

// Decodes `weights` weights of a block, and up to the end of the last word, into lanes `stride` 32-bit numbers apart;
// beyond the last weight its lane holds 0.
template <class Op>
inline void decode(const PackedLayout& layout, const Codebook& book, const uint32_t* words, int64_t weights,
                   uint32_t* panel, int64_t stride) {
  decoder_of<Op>(layout)(book, words, weights, panel, stride);
  clear_beyond<Op>(panel, stride, weights, 0);
}
