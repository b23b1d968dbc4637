// The product of many positions (rows of a linear layer, pixels of a convolution) and a strip of channels.

// Blocks of channels that make a strip.
constexpr int kStripBlocks = BQNN_LANES == 16 ? 2 : 1;
constexpr int kWidth = kStripBlocks * kBlock;
// Positions that are multiplied together, as many as there are registers for their sums.
constexpr int kTile = BQNN_LANES == 16 ? 8 : BQNN_LANES == 8 ? 6 : 2;

// A run of K whose activations are contiguous.
struct Piece {
  int64_t offset;  // bytes from a position's first activation
  int64_t lanes;
  int64_t panel;  // the first lane that it has in the panel
};

// Adds (or, first, writes) kRows x kBlocks * 16 products over the lanes of a few pieces.
template <class Op, int kRows, int kBlocks>
__attribute__((noinline)) void multiply_tile(const char* const* position, const Piece* pieces, int count,
                                             const uint32_t* panel, typename Op::Product* out, bool first) {
  using Sum = typename Op::Sum;
  constexpr int kVectors = kBlocks * kParts;
  Sum sum[kRows][kVectors] = {};
  const char* row[kRows];
  BQNN_UNROLL(8) for (int r = 0; r < kRows; ++r) row[r] = position[r];
  for (int p = 0; p < count; ++p) {
    const uint32_t* weight = panel + pieces[p].panel * kBlocks * kBlock;
    const int64_t begin = pieces[p].offset, end = begin + pieces[p].lanes * 4;
    for (int64_t at = begin; at < end; at += 4, weight += kBlocks * kBlock) {
      UInt w[kVectors];
      BQNN_UNROLL(4) for (int v = 0; v < kVectors; ++v) w[v] = load_lanes(weight + v * kLanes);
      BQNN_UNROLL(8) for (int r = 0; r < kRows; ++r) {
        const UInt x = broadcast_lane(row[r] + at);
        BQNN_UNROLL(4) for (int v = 0; v < kVectors; ++v) sum[r][v] = Op::dot(x, w[v], sum[r][v]);
      }
    }
  }
  BQNN_UNROLL(8) for (int r = 0; r < kRows; ++r) {
    BQNN_UNROLL(4) for (int v = 0; v < kVectors; ++v) {
      typename Op::Product* to = out + r * kWidth + v * kLanes;
      const UInt product = Op::add(first ? UInt{} : load_lanes(to), sum[r][v]);
      __builtin_memcpy(to, &product, sizeof product);
    }
  }
}

template <class Op, int kBlocks>
inline void multiply_positions(const char* const* position, int64_t count, const Piece* pieces, int num_pieces,
                               const uint32_t* panel, typename Op::Product* out, bool first) {
  for (int64_t i = 0; i < count; i += kTile) {
    const auto multiply = count - i == 1          ? multiply_tile<Op, 1, kBlocks>
                          : count - i <= kTile / 2 ? multiply_tile<Op, kTile / 2, kBlocks>
                                                   : multiply_tile<Op, kTile, kBlocks>;
    multiply(position + i, pieces, num_pieces, panel, out + i * kWidth, first);
  }
}

// Products [positions up to a whole tile][kWidth] of positions and the channels of `blocks` blocks. There are
// count + kTile - 1 of `position`, whatever stands in the last ones; offset[s] leads from there to segment s.
template <class Op>
__attribute__((noinline)) void multiply_strip(const PackedLayout& layout, int64_t group, int64_t first_block,
                                              int blocks, const char* const* position, int64_t count,
                                              const int64_t* offset, typename Op::Product* products) {
  constexpr int64_t kStep = Op::kInt8 ? 64 : 32;  // weights that a segment is padded to
  static_assert(kChunk % (kStep / Op::kUnit) == 0, "pieces begin at a word");
  Codebook book[kStripBlocks];
  for (int b = 0; b < blocks; ++b) read_codebook<Op>(layout, {layout.level_table()}, group, first_block + b, &book[b]);
  auto* panel = room<uint32_t>(Scratch::panel, kChunk * kWidth);
  bool first = true;
  for (int64_t segment = 0, at = 0; segment < layout.segments; first = false) {
    Piece pieces[kChunk * Op::kUnit / kStep];
    int num_pieces = 0;
    for (int64_t used = 0; used < kChunk && segment < layout.segments;) {
      const int64_t weights = smaller(layout.segment - at, (kChunk - used) * Op::kUnit);
      const int64_t word = (segment * layout.padded + at) / layout.word_weights();
      for (int b = 0; b < blocks; ++b)
        decode<Op>(layout, book[b], layout.block(group, first_block + b) + word * kBlock, weights,
                   panel + (used * blocks + b) * kBlock, blocks * kBlock);
      pieces[num_pieces++] = {offset[segment] + at * static_cast<int64_t>(sizeof(typename Op::Element)),
                              ceil_div(weights, Op::kUnit), used};
      used += ceil_div(weights, kStep) * kStep / Op::kUnit;
      at += weights;
      if (at == layout.segment) at = 0, ++segment;
    }
    const auto multiply = blocks == 1 ? multiply_positions<Op, 1> : multiply_positions<Op, kStripBlocks>;
    multiply(position, count, pieces, num_pieces, panel, products, first);
  }
}
