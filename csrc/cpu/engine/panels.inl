// Panels: the weights of a strip of channels, [lane of K][kWidth] 32-bit words, as products read them.

// Bytes from 0 to 255 times integers from -64 to 64, four to a lane.
struct ByteOperand {
  using Element = uint8_t;
  static constexpr bool kInt8 = true, kBfloat16 = false;
  static constexpr int kUnit = 4, kZero = 0;
};

constexpr int kStripBlocks = BQNN_LANES == 16 ? 2 : 1;
constexpr int kWidth = kStripBlocks * kBlock;
constexpr int kVectors = kWidth / kLanes;  // of a strip

// Codes are decoded word by word: so many lanes a panel may be written beyond its end.
constexpr int64_t kWordLanes = 32;

inline int64_t panel_words(const Conv& conv) {
  return (conv.segments * conv.lanes + kWordLanes) * kWidth;
}

// The lanes [first, first + lanes) of every segment, `first` at the beginning of a word. Beyond a segment's weights
// they are zeros.
template <class Op>
inline void decode_part(const Conv& conv, int64_t group, int64_t strip, int64_t first, int64_t lanes, uint32_t* panel) {
  const PackedLayout& layout = *conv.layout;
  const int64_t weights = smaller(conv.segment - first * Op::kUnit, lanes * Op::kUnit);
  const int64_t used = ceil_div(weights, Op::kUnit);
  for (int b = 0; b < kStripBlocks; ++b) {
    const int64_t block = strip * kStripBlocks + b;
    if (block >= layout.blocks) {
      for (int64_t lane = 0; lane < conv.segments * lanes; ++lane)
        __builtin_memset(panel + lane * kWidth + b * kBlock, 0, kBlock * sizeof *panel);
      continue;
    }
    Codebook book;
    read_codebook<Op>(layout, {layout.level_table()}, group, block, &book);
    const uint32_t* words = layout.block(group, block);
    for (int64_t s = 0; s < conv.segments; ++s) {
      uint32_t* to = panel + s * lanes * kWidth + b * kBlock;
      decode<Op>(layout, book, words + (s * layout.padded + first * Op::kUnit) / layout.word_weights() * kBlock,
                 weights, to, kWidth);
      for (int64_t lane = used; lane < lanes; ++lane) __builtin_memset(to + lane * kWidth, 0, kBlock * sizeof *to);
    }
  }
}

template <class Op>
inline void decode_panel(const Conv& conv, int64_t group, int64_t strip, uint32_t* panel) {
  decode_part<Op>(conv, group, strip, 0, conv.lanes, panel);
  // What segments that follow each other leave of their last tile.
  if (conv.gathered)
    __builtin_memset(panel + conv.segments * conv.lanes * kWidth, 0, kTileLanes * kWidth * sizeof *panel);
}

// A panel of a weight that is numbers.
template <class Op, class Number>
inline void copy_panel(const Conv& conv, const Number* numbers, int64_t group, int64_t strip, uint32_t* panel) {
  const int64_t columns = conv.segments * conv.segment, first = strip * kWidth;
  const int64_t count = smaller(conv.group_channels - first, kWidth);
  __builtin_memset(panel, 0, static_cast<size_t>(panel_words(conv)) * sizeof *panel);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; k < columns; ++k) {
      const int64_t at = k % conv.segment, lane = k / conv.segment * conv.lanes + at / Op::kUnit;
      const Number number = numbers[(group * conv.group_channels + first + i) * columns + k];
      __builtin_memcpy(reinterpret_cast<char*>(panel + lane * kWidth + i) + at % Op::kUnit * sizeof number, &number,
                       sizeof number);
    }
}

inline void make_panel(const Conv& conv, int64_t group, int64_t strip, uint32_t* panel) {
  if (conv.layout != nullptr)
    return conv.integers ? decode_panel<ByteOperand>(conv, group, strip, panel)
                         : decode_panel<FloatOperand>(conv, group, strip, panel);
  if (conv.integers) return copy_panel<ByteOperand>(conv, conv.integer_numbers, group, strip, panel);
  copy_panel<FloatOperand>(conv, conv.numbers, group, strip, panel);
}

// The lanes [first, first + count) of a panel of codes of one segment.
inline void make_part(const Conv& conv, int64_t group, int64_t strip, int64_t first, int64_t count, uint32_t* panel) {
  if (conv.integers) return decode_part<ByteOperand>(conv, group, strip, first, count, panel);
  decode_part<FloatOperand>(conv, group, strip, first, count, panel);
}
