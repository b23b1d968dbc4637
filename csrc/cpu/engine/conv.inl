// Convolutions, of which linear layers are some: the product of positions and a strip of channels, straight from the
// arena, where images have their border.

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

// One position and a few strips straight from their codes, over all of K, whose words are whole: nothing is written in
// between. words [kStrips * kStripBlocks] are those of the blocks.
template <template <int, int> class Sums, class Op, int kBits, int kStripsOfCall, int kMostChain>
__attribute__((noinline)) void multiply_codes(const Codebook& book, const char* x_at, const uint32_t* const* words,
                                              int64_t count, uint32_t* products) {
  constexpr int kLanesOfWord = 32 / kBits / Op::kUnit, kChain = kMostChain < kLanesOfWord ? kMostChain : kLanesOfWord;
  using All = Sums<kStripsOfCall, kVectors>;
  add_to_products<All, kStripsOfCall, kVectors>(products, kWidth, true, [&](auto& sums) BQNN_LAMBDA {
    for (int64_t i = 0; i < count; ++i, x_at += 4 * kLanesOfWord) {
      UInt word[kStripsOfCall][kVectors];
      BQNN_UNROLL(4) for (int r = 0; r < kStripsOfCall; ++r)
        BQNN_UNROLL(4) for (int v = 0; v < kVectors; ++v)
          word[r][v] = load_lanes(words[r * kStripBlocks + v / kParts] + i * kBlock + v % kParts * kLanes);
      unroll<kLanesOfWord / kChain>([&](auto part) BQNN_LAMBDA {
        constexpr int kFirst = decltype(part)::value * kChain;
        sums.template add<kChain>(
            [&](int, int t) BQNN_LAMBDA { return broadcast_lane(x_at + 4 * (kFirst + t)); },
            [&](int r, int t, int v) BQNN_LAMBDA {
              return look_up_lane<Op, kBits, true>(book, word[r][v], (kFirst + t) * Op::kUnit, v % kParts);
            });
      });
    }
  });
}

using MultiplyCodes = void(const Codebook& book, const char* x, const uint32_t* const* words, int64_t count,
                           uint32_t* products);

// Of codes, so many strips fill the registers.
constexpr int kIntegerStrips = BQNN_LANES == 16 ? kStrips : 1, kFloatStrips = BQNN_LANES == 4 ? 1 : kStrips;

// The kernel that multiplies by so many bits a code.
inline MultiplyCodes* codes_kernel(const Conv& conv, int bits) {
  const auto of = [&](auto constant) -> MultiplyCodes* {
    constexpr int kBits = decltype(constant)::value;
    if (!conv.integers) return &multiply_codes<FloatSums, FloatOperand, kBits, kFloatStrips, 1>;
    if (conv.most_integer <= 16) return &multiply_codes<ByteSums, ByteOperand, kBits, kIntegerStrips, 4>;
    if (conv.most_integer <= 32) return &multiply_codes<ByteSums, ByteOperand, kBits, kIntegerStrips, 2>;
    return &multiply_codes<ByteSums, ByteOperand, kBits, kIntegerStrips, 1>;
  };
  return bits == 1 ? of(Constant<1>{}) : bits == 2 ? of(Constant<2>{}) : of(Constant<4>{});
}

// Whether one position can be multiplied straight from the codes.
inline bool reads_codes(const Conv& conv) {
  return conv.layout != nullptr && conv.layout->codebooks == 1 && conv.segments == 1 &&
         conv.segment % conv.layout->word_weights() == 0;
}

// One position: strips are multiplied together, since a strip alone would wait for its own sums.
inline void multiply_one(const ConvCall& call, const Chunk* chunks, int64_t num_chunks, int64_t begin, int64_t end) {
  const Conv& conv = *call.conv;
  const int64_t strips = ceil_div(conv.group_channels, kWidth), words = panel_words(conv);
  const int64_t room_of_chunk = (kChunkLanes / 4 + kWordLanes) * kWidth;
  const bool kept = conv.panels != nullptr, codes = reads_codes(conv);
  const int64_t most = codes ? (conv.integers ? kIntegerStrips : kFloatStrips) : kStrips;
  uint32_t* made = kept ? nullptr : room<uint32_t>(Scratch::panel, kStrips * room_of_chunk);
  alignas(64) uint32_t products[kStrips * kWidth];
  const Tiles tile = tiles_of(conv, kVectors);
  Codebook book;
  if (codes && conv.integers) read_codebook<ByteOperand>(*conv.layout, {conv.layout->level_table()}, 0, 0, &book);
  if (codes && !conv.integers) read_codebook<FloatOperand>(*conv.layout, {conv.layout->level_table()}, 0, 0, &book);
  Positions at(call);
  for (int64_t index = begin; index < end;) {
    const int64_t group = index / strips, strip = index % strips;
    bool together = index + most <= end && strip + most <= strips;
    if (codes) together = together && (strip + most) * kStripBlocks <= conv.layout->blocks;
    const int64_t count = together ? most : 1;
    place(call, group, 0, 1, &at);
    if (codes && together) {
      const uint32_t* blocks[kStrips * kStripBlocks];
      for (int64_t i = 0; i < count * kStripBlocks; ++i)
        blocks[i] = conv.layout->block(group, strip * kStripBlocks + i);
      const int64_t words_of_block = conv.segment / conv.layout->word_weights();
      codes_kernel(conv, conv.layout->bits)(book, at.x[0], blocks, words_of_block, products);
    } else {
      for (int64_t c = 0; c < num_chunks; ++c) {
        const uint32_t* weight = kept ? conv.panels + index * words + chunks[c].panel : made;
        for (int64_t i = 0; !kept && i < count; ++i)
          make_part(conv, group, strip + i, chunks[c].panel / kWidth, chunks[c].pieces->lanes,
                    made + i * room_of_chunk);
        if (together && !codes)
          tile.strips(at.x[0], chunks[c], weight, kept ? words : room_of_chunk, products, c == 0);
        else
          tile.one(at.x, chunks[c], weight, products, c == 0);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = (strip + i) * kWidth;
      finish_batch(call, products + i * kWidth, at, group * conv.group_channels + first,
                   smaller(conv.group_channels - first, kWidth));
    }
    index += count;
  }
}

inline void run_conv2d(const ConvCall& call, int64_t parts, int64_t begin, int64_t end) {
  const Conv& conv = *call.conv;
  const int64_t strips = ceil_div(conv.group_channels, kWidth), words = panel_words(conv);
  const int64_t panels = conv.groups * strips, positions = call.images * call.y.shape.height * call.y.shape.width;
  // Where a batch is all that a panel is made for, each chunk is decoded when it is multiplied, and stays in the cache.
  const bool chunked = conv.panels == nullptr && conv.segments == 1 && ceil_div(positions, parts) <= kBatch;
  // Floats are loaded slower than they can be from the L2 cache, and gain nothing from chunks that fit the L1 cache;
  // those of the strips that one position is multiplied by are in it together.
  const bool one = positions == 1 && (chunked || conv.panels != nullptr);
  const int64_t chunk_lanes = one ? kChunkLanes / 4 : conv.integers || chunked ? kChunkLanes : 8 * kChunkLanes;
  const int64_t most = 2 * (conv.segments + words / kWidth / 16);
  auto* pieces = room<Piece>(Scratch::offsets, most);
  auto* chunks = room<Chunk>(Scratch::tables, most);
  const int64_t num_chunks = plan_chunks(call, chunk_lanes, pieces, chunks);
  if (one) return multiply_one(call, chunks, num_chunks, begin, end);
  uint32_t* made = conv.panels == nullptr ? room<uint32_t>(Scratch::panel, words) : nullptr;
  alignas(64) uint32_t products[(kBatch + kMostTile) * kWidth];
  int64_t decoded = -1;
  Positions at(call);
  const bool rows = !chunked && finishes_rows(call, num_chunks);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit / panels, index = unit % panels, group = index / strips, strip = index % strips;
    const uint32_t* panel = conv.panels == nullptr ? made : conv.panels + index * words;
    if (conv.panels == nullptr && !chunked && index != decoded) make_panel(conv, group, strip, made), decoded = index;
    const int64_t width = smaller(conv.group_channels - strip * kWidth, kWidth);
    const Tiles tile = tiles_of(conv, static_cast<int>(ceil_div(width, kLanes)));
    const int64_t last = call.begin_of(part + 1, parts);
    if (rows) {
      finish_strip(call, *chunks, panel, group, strip, call.begin_of(part, parts), last);
      continue;
    }
    for (int64_t first = call.begin_of(part, parts); first < last; first += kBatch) {
      const int64_t count = smaller(last - first, kBatch);
      place(call, group, first, count, &at);
      for (int64_t c = 0; c < num_chunks; ++c) {
        const Chunk& chunk = chunks[c];
        if (chunked) make_part(conv, group, strip, chunk.panel / kWidth, chunk.pieces->lanes, made);
        multiply_batch(tile, at, count, chunk, chunked ? made : panel + chunk.panel, products, c == 0);
      }
      finish_batch(call, products, at, group * conv.group_channels + strip * kWidth, width);
    }
  }
}
