// Activations as the operands of tiles, and decoded weights.

// Writes the activations of one row or image, every part of them, and sees whether they fit.
template <class T>
struct TilePacker {
  using Op = typename T::Op;
  using Element = typename T::Element;
  RowScale scale;
  int64_t part;         // bytes from one part to the next
  uint32_t least = 0;   // magnitudes below are lost, as bits of a float; 0 stays 0
  uint32_t range;       // the largest magnitude less the least one
  Mask misfit = {};

  // Numbers whose products are as they should be: finite, and finite after rounding to bfloat16; sums of them, too.
  // Tiles take denormal numbers for 0, so that the parts of an activation, and their products with those of levels,
  // have to be normal: 2^-100 leaves room for the third part of an activation, and more for the steps of affine levels.
  TilePacker(const PackedCall& call, const RowScale& scale, int64_t part) : scale(scale), part(part) {
    constexpr uint32_t kFinite = 0x7F7F7FFF, kFiniteSums = 0x6F800000;
    if (T::kActivations == 3) {
      const float level = call.weight->least_level < 1.0f ? call.weight->least_level : 1.0f;
      const float smallest = T::kAffine ? 0x1p-90f : 0x1p-100f / level;
      __builtin_memcpy(&least, &smallest, sizeof least);
    }
    range = (T::kAffine ? kFiniteSums : kFinite) - least;
  }

  BQNN_INLINE void operator()(Float x, Element* to, int count) {
    if constexpr (Op::kInt8) {
      store_operands<Op>(to, rounded<Op>(x, false, scale), count);
    } else {
      const UInt magnitude = (UInt)abs(x);
      misfit |= (Mask)(magnitude - least > range) & (Mask)(magnitude != 0);
      BQNN_UNROLL(3) for (int p = 0; p < T::kActivations; ++p) {
        const Bits16 bits = bfloat16_operands(x);
        store_bits16(reinterpret_cast<Element*>(reinterpret_cast<char*>(to) + p * part), bits, count);
        if (p + 1 < T::kActivations) x -= widen(bits);
      }
    }
  }

  void zeros(char* from, const char* to) const {
    for (int p = 0; p < T::kActivations && from < to; ++p)
      __builtin_memset(from + p * part, 0, static_cast<size_t>(to - from));
  }

  bool fits() const { return !any(misfit); }

  using Local = TilePacker;  // a loop has its own, in registers
  void keep(const TilePacker& local) { misfit = local.misfit; }
};

// The levels of a block, every part of them.
template <class T>
struct TileCodebook {
  Codebook part[T::kLevels];

  void read(const PackedLayout& layout, int64_t group, int64_t block) {
    const float* table = T::kAffine ? layout.affine_steps : layout.level_table();
    for (int p = 0; p < T::kLevels; ++p)
      read_codebook<typename T::Op>(layout, {table, p}, group, block, &part[p]);
  }
};

// Brings words that are decoded soon towards the core.
template <int kLocality>
inline void fetch_words(const uint32_t* words, int64_t count) {
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(words + i * kBlock, 0, kLocality);
}

// Decodes steps [first, first + steps) of a segment of a block; beyond the segment's last weight the panel holds
// nothing, since the activations there belong to others.
template <class T>
inline void decode_steps(const PackedLayout& layout, const TileCodebook<T>& book, int64_t group, int64_t block,
                         int64_t segment, int64_t first, int64_t steps, char* panel, int64_t panel_part) {
  using Op = typename T::Op;
  const int64_t weights = smaller(layout.segment - first * T::kStep, steps * T::kStep);
  const uint32_t* words =
      layout.block(group, block) + (segment * layout.padded + first * T::kStep) / layout.word_weights() * kBlock;
  for (int p = 0; p < T::kLevels; ++p, panel += panel_part) {
    auto* lanes = reinterpret_cast<uint32_t*>(panel);
    decoder_of<Op>(layout)(book.part[p], words, weights, lanes, kBlock);
    clear_beyond<Op>(lanes, kBlock, weights, steps * kTile);
  }
}
