// Convolutions, of which linear layers are some: the product of positions and a strip of channels, straight from the
// arena, where images have their border.

// Bytes from 0 to 255 times integers from -64 to 64, four to a lane.
struct ByteOperand {
  using Element = uint8_t;
  static constexpr bool kInt8 = true, kBfloat16 = false;
  static constexpr int kUnit = 4, kZero = 0;
};

constexpr int kStripBlocks = BQNN_LANES == 16 ? 2 : 1;
constexpr int kWidth = kStripBlocks * kBlock;
constexpr int kVectors = kWidth / kLanes;  // of a strip
constexpr int kBatch = 48;                 // positions whose products are finished together
constexpr int kMostTile = 12;              // positions that are multiplied together at most

template <class Op>
inline int64_t segment_lanes(const Conv& conv) { return ceil_div(conv.segment, Op::kUnit); }

// --- panels -------------------------------------------------------------------------------------------------------

// Codes are decoded word by word: so many lanes a panel may be written beyond its end.
constexpr int64_t kWordLanes = 32;

template <class Op>
inline int64_t panel_words_of(const Conv& conv) {
  return (conv.segments * segment_lanes<Op>(conv) + kWordLanes) * kWidth;
}

// The weights [first, first + count) of every segment, `first` at the beginning of a word.
template <class Op>
inline void decode_part(const Conv& conv, int64_t group, int64_t strip, int64_t first, int64_t count, uint32_t* panel) {
  const PackedLayout& layout = *conv.layout;
  const int64_t lanes = ceil_div(count, Op::kUnit);
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
    for (int64_t s = 0; s < conv.segments; ++s)
      decode<Op>(layout, book, words + (s * layout.padded + first) / layout.word_weights() * kBlock, count,
                 panel + s * lanes * kWidth + b * kBlock, kWidth);
  }
}

template <class Op>
inline void decode_panel(const Conv& conv, int64_t group, int64_t strip, uint32_t* panel) {
  decode_part<Op>(conv, group, strip, 0, conv.segment, panel);
}

// A panel of a weight that is numbers.
template <class Op, class Number>
inline void copy_panel(const Conv& conv, const Number* numbers, int64_t group, int64_t strip, uint32_t* panel) {
  const int64_t columns = conv.segments * conv.segment, first = strip * kWidth;
  const int64_t count = smaller(conv.group_channels - first, kWidth);
  __builtin_memset(panel, 0, static_cast<size_t>(panel_words_of<Op>(conv)) * sizeof *panel);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; k < columns; ++k) {
      const int64_t at = k % conv.segment, lane = k / conv.segment * segment_lanes<Op>(conv) + at / Op::kUnit;
      const Number number = numbers[(group * conv.group_channels + first + i) * columns + k];
      __builtin_memcpy(reinterpret_cast<char*>(panel + lane * kWidth + i) + at % Op::kUnit * sizeof number, &number,
                       sizeof number);
    }
}

inline int64_t panel_words(const Conv& conv) {
  return conv.integers ? panel_words_of<ByteOperand>(conv) : panel_words_of<FloatOperand>(conv);
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
  const int64_t unit = conv.integers ? ByteOperand::kUnit : FloatOperand::kUnit;
  const int64_t weights = smaller(conv.segment - first * unit, count * unit);
  if (conv.integers) return decode_part<ByteOperand>(conv, group, strip, first * unit, weights, panel);
  decode_part<FloatOperand>(conv, group, strip, first * unit, weights, panel);
}

// --- products -----------------------------------------------------------------------------------------------------

// A run of K that is contiguous in x: where it is, in bytes from a position on, and how many lanes it has.
struct Piece {
  int64_t offset, lanes;
};

// Pieces whose part of a panel stays in the L1 cache while a batch of positions is multiplied by it.
struct Chunk {
  const Piece* pieces;
  int64_t count, panel;  // pieces, and the first word of the panel
};

constexpr int64_t kChunkLanes = 256;

// The products of a few lanes of K, added to running sums. A chain is how many lanes are added in 16 bits first, where
// there is no instruction that adds up bytes in 32.
template <int kRows, int kCount, int kChain>
struct ByteSums {
  UInt sum[kRows][kCount] = {};

  template <int kLanesOfK>
  BQNN_INLINE void add(const char* const* row, int64_t at, const uint32_t* weight) {
#if BQNN_LANES == 16
    BQNN_UNROLL(8) for (int t = 0; t < kLanesOfK; ++t) {
      UInt w[kCount];
      BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v) w[v] = load_lanes(weight + t * kWidth + v * kLanes);
      BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r) {
        const UInt x = broadcast_lane(row[r] + at + 4 * t);
        BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v) sum[r][v] = Int8Operand::dot(x, w[v], sum[r][v]);
      }
    }
#elif BQNN_LANES == 8
    __m256i part[kRows][kCount];
    BQNN_UNROLL(8) for (int t = 0; t < kLanesOfK; ++t) {
      __m256i w[kCount];
      BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v) w[v] = (__m256i)load_lanes(weight + t * kWidth + v * kLanes);
      BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r) {
        const auto x = (__m256i)broadcast_lane(row[r] + at + 4 * t);
        BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v) {
          const __m256i product = _mm256_maddubs_epi16(x, w[v]);
          part[r][v] = t == 0 ? product : _mm256_add_epi16(part[r][v], product);
          __asm__("" : "+x"(part[r][v]));  // else GCC adds up in another order, which takes more registers than there are
        }
      }
    }
    const __m256i ones = _mm256_set1_epi16(1);
    BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r)
      BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v) sum[r][v] += (UInt)_mm256_madd_epi16(part[r][v], ones);
#else
    BQNN_UNROLL(8) for (int t = 0; t < kLanesOfK; ++t)
      BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r) {
        const UInt x = broadcast_lane(row[r] + at + 4 * t);
        BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v) {
          const UInt w = load_lanes(weight + t * kWidth + v * kLanes);
          BQNN_UNROLL(4) for (int j = 0; j < 4; ++j)
            sum[r][v] += (x >> 8 * j & 255) * (UInt)((Int)(w << (24 - 8 * j)) >> 24);
        }
      }
#endif
  }
};

template <int kRows, int kCount, int kChain>
struct FloatSums {
  Float sum[kRows][kCount] = {};

  template <int kLanesOfK>
  BQNN_INLINE void add(const char* const* row, int64_t at, const uint32_t* weight) {
    Float w[kCount];
    BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v) w[v] = (Float)load_lanes(weight + v * kLanes);
    BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r) {
      const auto x = (Float)broadcast_lane(row[r] + at);
      BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v) sum[r][v] = multiply_add(x, w[v], sum[r][v]);
    }
  }
};

// Adds (or, first, writes) to products [kRows][kWidth] those of positions and the first kCount vectors of a strip, over a
// chunk of K: in the order of K whatever kRows is.
template <template <int, int, int> class Sums, int kRows, int kCount, int kChain>
__attribute__((noinline)) void multiply_tile(const char* const* position, const Chunk& chunk, const uint32_t* weight,
                                             uint32_t* products, bool first) {
  Sums<kRows, kCount, kChain> sums;
  if (!first)
    BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r)
      BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v)
        __builtin_memcpy(&sums.sum[r][v], products + r * kWidth + v * kLanes, sizeof(UInt));
  for (const Piece *piece = chunk.pieces, *end = piece + chunk.count; piece < end; ++piece) {
    const char* row[kRows];
    BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r) row[r] = position[r] + piece->offset;
    const int64_t lanes = piece->lanes;
    int64_t k = 0;
    if constexpr (kChain > 1)
      for (; k + kChain <= lanes; k += kChain, weight += kChain * kWidth)
        sums.template add<kChain>(row, 4 * k, weight);
    for (; k < lanes; ++k, weight += kWidth) sums.template add<1>(row, 4 * k, weight);
  }
  BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r)
    BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v)
      __builtin_memcpy(products + r * kWidth + v * kLanes, &sums.sum[r][v], sizeof(UInt));
}

using Multiply = void(const char* const* position, const Chunk& chunk, const uint32_t* weight, uint32_t* products,
                      bool first);

// The kernels of a call: of a whole tile, of few positions, and of one.
struct Tiles {
  Multiply *whole, *few, *one;
  int rows, few_rows;
};

template <template <int, int, int> class Sums, int kRows, int kFew, int kCount, int kChain>
constexpr Tiles tiles() {
  return {&multiply_tile<Sums, kRows, kCount, kChain>, &multiply_tile<Sums, kFew, kCount, kChain>,
          &multiply_tile<Sums, 1, kCount, kChain>, kRows, kFew};
}

// As many positions as the sums of their tile fit the registers.
inline Tiles tiles_of(const Conv& conv, int vectors) {
#if BQNN_LANES == 16
  if (conv.integers) return vectors == 1 ? tiles<ByteSums, 12, 4, 1, 1>() : tiles<ByteSums, 12, 4, 2, 1>();
  return vectors == 1 ? tiles<FloatSums, 12, 4, 1, 1>() : tiles<FloatSums, 12, 4, 2, 1>();
#elif BQNN_LANES == 8
  // A sum of 2 * chain products of 255 and the largest integer fits 16 bits.
  if (conv.integers && conv.most_integer <= 8)
    return vectors == 1 ? tiles<ByteSums, 6, 2, 1, 8>() : tiles<ByteSums, 3, 2, 2, 8>();
  if (conv.integers && conv.most_integer <= 16)
    return vectors == 1 ? tiles<ByteSums, 6, 2, 1, 4>() : tiles<ByteSums, 3, 2, 2, 4>();
  if (conv.integers && conv.most_integer <= 32)
    return vectors == 1 ? tiles<ByteSums, 6, 2, 1, 2>() : tiles<ByteSums, 3, 2, 2, 2>();
  if (conv.integers) return vectors == 1 ? tiles<ByteSums, 6, 2, 1, 1>() : tiles<ByteSums, 3, 2, 2, 1>();
  return vectors == 1 ? tiles<FloatSums, 8, 4, 1, 1>() : tiles<FloatSums, 6, 3, 2, 1>();
#else
  if (conv.integers) return tiles<ByteSums, 2, 2, kVectors, 1>();
  return tiles<FloatSums, 2, 2, kVectors, 1>();
#endif
}

// --- outputs ------------------------------------------------------------------------------------------------------

// Where the outputs of some positions go, and their residuals are.
struct Positions {
  const char* x[kBatch + kMostTile];
  char* y[kBatch];
  const char* residual[kBatch];
};

// What turns the products of some channels into outputs.
template <class Y, class R>
struct Finish {
  const ConvCall& call;
  const Numbers<Y> out{call.y};
  const Numbers<R> added{call.residual};
  const Activation act = call.conv->activation;
  const bool integers = call.conv->integers, residual = call.residual.data != nullptr;
  const bool clamps = act.function == Function::clamp || act.function == Function::none;
  // Where all that is left is clamping, an output in bytes is clamped once, after it was divided by its scale: that is
  // monotone, so that the result is the same.
  Float low = broadcast(clamps && act.function == Function::clamp ? act.low : -__builtin_inff());
  Float high = broadcast(clamps && act.function == Function::clamp ? act.high : __builtin_inff());

  explicit Finish(const ConvCall& of) : call(of) {
    if constexpr (sizeof(Y) == 1) {
      low = max(low * out.inverse, broadcast(-out.zero));
      high = min(high * out.inverse, broadcast(255.0f - out.zero));
    }
  }

  // The channels of a vector: their scales and what is added.
  struct Channels {
    Float scale, bias;
    UInt shift;
  };
  BQNN_INLINE Channels channels(int64_t channel) const {
    const Conv& conv = *call.conv;
    return {load(conv.scale + channel), load(conv.bias + channel), load_lanes(conv.shift + channel)};
  }

  BQNN_INLINE Float value(const uint32_t* products, const Channels& of, const char* residual_at, int64_t channel) const {
    const UInt product = load_lanes(products);
    Float y = (integers ? to_float((Int)(product - of.shift)) : (Float)product) * of.scale + of.bias;
    if (residual) y += added.read(reinterpret_cast<const R*>(residual_at) + channel);
    return y;
  }

  BQNN_INLINE Int bytes(Float y) const {
    return clamps ? out.quantize(y, low, high) : out.quantize(activate(act, y));
  }

  BQNN_INLINE void store(Y* to, Float y, int count) const {
    if constexpr (sizeof(Y) == 1)
      store_bytes(to, bytes(y), count);
    else
      out.write(to, clamps ? min(high, max(low, y)) : activate(act, y), count);
  }
};

template <class Y, class R>
inline void finish(const ConvCall& call, const uint32_t* products, const Positions& at, int64_t count, int64_t channel,
                   int64_t width) {
  const Finish<Y, R> finish(call);
  int64_t c = 0;
  if constexpr (sizeof(Y) == 1)
    for (; c + 2 * kLanes <= width; c += 2 * kLanes) {
      const int64_t first = channel + c, second = first + kLanes;
      const auto of_first = finish.channels(first), of_second = finish.channels(second);
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t* from = products + i * kWidth + c;
        const Int x = finish.bytes(finish.value(from, of_first, at.residual[i], first));
        const Int y = finish.bytes(finish.value(from + kLanes, of_second, at.residual[i], second));
        store_bytes_of_two(reinterpret_cast<uint8_t*>(at.y[i]) + first, x, y);
      }
    }
  for (; c < width; c += kLanes) {
    const int lanes = lanes_left(width - c);
    const auto of = finish.channels(channel + c);
    for (int64_t i = 0; i < count; ++i)
      finish.store(reinterpret_cast<Y*>(at.y[i]) + channel + c,
                   finish.value(products + i * kWidth + c, of, at.residual[i], channel + c), lanes);
  }
}

inline void finish_batch(const ConvCall& call, const uint32_t* products, const Positions& at, int64_t count,
                         int64_t channel, int64_t width) {
  with_element(call.y.dtype, [&](auto* y) {
    with_element(call.residual.dtype, [&](auto* residual) {
      finish<std::remove_pointer_t<decltype(y)>, std::remove_pointer_t<decltype(residual)>>(call, products, at, count,
                                                                                           channel, width);
    });
  });
}

// The positions [first, first + count), counted through the outputs of all images.
inline void place(const ConvCall& call, int64_t group, int64_t first, int64_t count, Positions* at) {
  const Conv& conv = *call.conv;
  const Window& window = conv.window;
  const int64_t width = call.y.shape.width, height = call.y.shape.height;
  int64_t image = first / (width * height), h = first / width % height, w = first % width;
  const int64_t step_x = call.x.bytes(window.stride_w * call.x.pixel), step_y = call.y.bytes(call.y.pixel);
  const int64_t step_residual = call.residual.bytes(call.residual.pixel);
  const int64_t corner = call.x.bytes(group * conv.inputs);
  for (int64_t i = 0; i < count;) {
    const char* x = call.x.at(image, h * window.stride_h - window.top, w * window.stride_w - window.left) + corner;
    char* y = call.y.at(image, h, w);
    const char* residual = call.residual.data == nullptr ? nullptr : call.residual.at(image, h, w);
    const int64_t end = i + smaller(count - i, width - w);
    for (; i < end; ++i, x += step_x, y += step_y, residual += step_residual)
      at->x[i] = x, at->y[i] = y, at->residual[i] = residual;
    w = 0;
    if (++h == height) h = 0, ++image;
  }
  for (int64_t i = count; i < count + kMostTile; ++i) at->x[i] = at->x[count - 1];
}

// The pieces of K in chunks of `most` lanes at most; returns how many chunks there are.
inline int64_t plan_chunks(const ConvCall& call, int64_t most, Piece* pieces, Chunk* chunks) {
  const Conv& conv = *call.conv;
  const Window& window = conv.window;
  const int64_t lanes = conv.integers ? segment_lanes<ByteOperand>(conv) : segment_lanes<FloatOperand>(conv);
  const int64_t across = conv.segments / window.kernel_h;  // 1, or kernel_w
  int64_t count = 0, used = most, panel = 0;
  Piece* next = pieces;
  for (int64_t s = 0; s < conv.segments; ++s) {
    const int64_t row = s / across * window.dilation_h, column = s % across * window.dilation_w;
    const int64_t offset = call.x.bytes(row * call.x.row + column * call.x.pixel);
    for (int64_t lane = 0; lane < lanes;) {
      if (used == most) chunks[count++] = {next, 0, panel}, used = 0;
      // A piece as short as a few lanes would not repay its loop.
      int64_t here = smaller(lanes - lane, most - used);
      if (here < lanes - lane && here < 16) {
        used = most;
        continue;
      }
      *next++ = {offset + lane * 4, here};
      ++chunks[count - 1].count;
      lane += here, used += here, panel += here * kWidth;
    }
  }
  return count;
}

// Multiplies a batch of positions by a chunk of a panel.
inline void multiply_batch(const Tiles& tile, const Positions& at, int64_t count, const Chunk& chunk,
                           const uint32_t* weight, uint32_t* products, bool first) {
  for (int64_t i = 0; i < count;) {
    const int64_t left = count - i;
    const int rows = left == 1 ? 1 : left <= tile.few_rows ? tile.few_rows : tile.rows;
    const auto multiply = rows == 1 ? tile.one : rows == tile.few_rows ? tile.few : tile.whole;
    multiply(at.x + i, chunk, weight, products + i * kWidth, first);
    i += rows;
  }
}

inline void run_conv2d(const ConvCall& call, int64_t parts, int64_t begin, int64_t end) {
  const Conv& conv = *call.conv;
  const int64_t strips = ceil_div(conv.group_channels, kWidth), words = panel_words(conv);
  const int64_t positions = call.images * call.y.shape.height * call.y.shape.width;
  // Where a batch is all that a panel is made for, each chunk is decoded when it is multiplied, and stays in the cache.
  const bool chunked = conv.panels == nullptr && conv.segments == 1 && ceil_div(positions, parts) <= kBatch;
  // Floats are loaded slower than they can be from the L2 cache, and gain nothing from chunks that fit the L1 cache.
  const int64_t chunk_lanes = conv.integers || chunked ? kChunkLanes : 8 * kChunkLanes;
  const int64_t most = 2 * (conv.segments + words / kWidth / 16);
  auto* pieces = room<Piece>(Scratch::offsets, most);
  auto* chunks = room<Chunk>(Scratch::tables, most);
  const int64_t num_chunks = plan_chunks(call, chunk_lanes, pieces, chunks);
  uint32_t* made = conv.panels == nullptr ? room<uint32_t>(Scratch::panel, words) : nullptr;
  alignas(64) uint32_t products[(kBatch + kMostTile) * kWidth];
  int64_t decoded = -1;
  Positions at;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t index = unit / parts, group = index / strips, strip = index % strips, part = unit % parts;
    const uint32_t* panel = conv.panels == nullptr ? made : conv.panels + index * words;
    if (conv.panels == nullptr && !chunked && index != decoded) make_panel(conv, group, strip, made), decoded = index;
    const int64_t width = smaller(conv.group_channels - strip * kWidth, kWidth);
    const Tiles tile = tiles_of(conv, static_cast<int>(ceil_div(width, kLanes)));
    const int64_t last = positions * (part + 1) / parts;
    for (int64_t first = positions * part / parts; first < last; first += kBatch) {
      const int64_t count = smaller(last - first, kBatch);
      place(call, group, first, count, &at);
      for (int64_t c = 0; c < num_chunks; ++c) {
        const Chunk& chunk = chunks[c];
        if (chunked) make_part(conv, group, strip, chunk.panel / kWidth, chunk.pieces->lanes, made);
        multiply_batch(tile, at, count, chunk, chunked ? made : panel + chunk.panel, products, c == 0);
      }
      finish_batch(call, products, at, count, group * conv.group_channels + strip * kWidth, width);
    }
  }
}
