// Convolutions of integers on the tiles of AMX: a tile is sixteen positions that lie at one distance from each other in
// the arena, by 64 bytes of a run of K; the weights are those of a panel, as it is.

static_assert(kPositions % kTileRows == 0);

// How a call is cut into tiles. With stride 1 a tile may go on from one row of an image to the next, over the border in
// between, whose products nobody asks for; else every row begins a tile. One position an image makes the images a row.
struct Grid {
  int64_t images, height, width;        // positions
  int64_t image, row, step;             // bytes from one to the next, in x
  int64_t pitch;                        // positions from row to row where tiles go on, else 0
  int64_t tiles;                        // of an image

  explicit Grid(const ConvCall& call) {
    const Window& window = call.conv->window;
    const View& x = call.x;
    images = call.images, height = call.y.shape.height, width = call.y.shape.width;
    image = x.bytes(x.image), row = x.bytes(window.stride_h * x.row), step = x.bytes(window.stride_w * x.pixel);
    pitch = 0;
    if (height * width == 1) width = images, images = 1, step = image;
    tiles = height * ceil_div(width, kTileRows);
    if (window.stride_h > 1 || window.stride_w > 1 || height == 1) return;
    const int64_t whole = ceil_div((height - 1) * (x.row / x.pixel) + width, kTileRows);
    if (whole < tiles) pitch = x.row / x.pixel, tiles = whole;
  }
};

// The tiles [first, first + count) of all images.
inline void place_tiles(const ConvCall& call, const Grid& grid, int64_t group, int64_t first, int64_t count,
                        Positions* at) {
  const Window& window = call.conv->window;
  const bool by_image = call.y.shape.height * call.y.shape.width == 1;
  const char* corner = call.x.at(0, -window.top, -window.left) + call.x.bytes(group * call.conv->inputs);
  const int64_t across = ceil_div(grid.width, kTileRows);
  at->num_runs = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t image = (first + i) / grid.tiles, tile = (first + i) % grid.tiles, slot = kTileRows * tile;
    int64_t h = grid.pitch > 0 ? slot / grid.pitch : tile / across;
    int64_t w = grid.pitch > 0 ? slot % grid.pitch : tile % across * kTileRows;
    at->x[i] = corner + image * grid.image + h * grid.row + w * grid.step;
    for (int64_t row = i * kTileRows, end = row + kTileRows; row < end && h < grid.height; ++h) {
      const int64_t here = smaller(grid.width - w, end - row);
      if (here > 0) at->add_run(call, row, here, by_image ? w : image, by_image ? 0 : h, by_image ? 0 : w);
      if (grid.pitch == 0) break;
      row += grid.pitch - w, w = 0;
    }
  }
}

// A run of whole tiles of K: where it is in x, in bytes from a position on, how many lanes it has, and the first word
// of its part of a panel.
struct TilePiece {
  int64_t offset, lanes, panel;
};

struct TileChunk {
  const TilePiece* pieces;
  int64_t count;
};

// Lanes of a chunk: weights come from the L2 cache as fast as they are multiplied, and sums that go to memory and back
// for every chunk cost more.
constexpr int64_t kTileChunkLanes = 1024;

// K in chunks: each has the same channels of every segment, since neighbouring positions share what they read of those.
// Returns how many chunks there are.
inline int64_t plan_tile_chunks(const ConvCall& call, TilePiece* pieces, TileChunk* chunks) {
  const Conv& conv = *call.conv;
  const int64_t share = kTileChunkLanes / conv.segments / kTileLanes * kTileLanes;
  const int64_t most = share > kTileLanes ? share : kTileLanes;
  int64_t count = 0;
  for (int64_t first = 0; first < conv.lanes; first += most) {
    chunks[count++] = {pieces, conv.segments};
    for (int64_t s = 0; s < conv.segments; ++s)
      *pieces++ = {segment_offset(call, s) + first * 4, smaller(conv.lanes - first, most),
                   (s * conv.lanes + first) * kWidth};
  }
  return count;
}

// Adds to products those of kTiles tiles and kBlocks blocks of a strip, over a chunk of K.
template <int kTiles, int kBlocks>
__attribute__((noinline)) void multiply_tiles(const char* const* x, int64_t step, const TileChunk& chunk,
                                              const uint32_t* weight, uint32_t* products, bool first) {
  constexpr int64_t kRow = kWidth * sizeof(uint32_t);
  const auto each_product = [&](const auto& f) BQNN_LAMBDA {
    unroll<kTiles * kBlocks>([&](auto i) BQNN_LAMBDA {
      f(i, reinterpret_cast<char*>(products) + i.value / kBlocks * kTileRows * kRow + i.value % kBlocks * 64);
    });
  };
  if (first)
    each_product([](auto i, char*) BQNN_LAMBDA { zero_tile<i.value>(); });
  else
    each_product([](auto i, char* at) BQNN_LAMBDA { load_tile<i.value>(at, kRow); });
  for (const TilePiece *piece = chunk.pieces, *end = piece + chunk.count; piece < end; ++piece) {
    const char* panel = reinterpret_cast<const char*>(weight + piece->panel);
    for (int64_t at = piece->offset, last = at + 4 * piece->lanes; at < last; at += 64, panel += kTileLanes * kRow) {
      unroll<kBlocks>([&](auto b) BQNN_LAMBDA { load_tile<6 + b.value>(panel + b.value * 64, kRow); });
      unroll<kTiles>([&](auto t) BQNN_LAMBDA {
        load_tile<4 + t.value % 2>(x[t.value] + at, step);
        unroll<kBlocks>([&](auto b) BQNN_LAMBDA {
          dot_tiles<Dot::bytes, t.value * kBlocks + b.value, 4 + t.value % 2, 6 + b.value>();
        });
      });
    }
  }
  each_product([](auto i, char* at) BQNN_LAMBDA { store_tile<i.value>(at, kRow); });
}

// The products of some tiles and a chunk: four tiles of sums at a time.
inline void multiply_chunk(const char* const* x, int64_t count, int64_t step, int blocks, const TileChunk& chunk,
                           const uint32_t* weight, uint32_t* products, bool first) {
  static constexpr decltype(&multiply_tiles<1, 1>) kOf[2][4] = {
      {multiply_tiles<1, 1>, multiply_tiles<2, 1>, multiply_tiles<3, 1>, multiply_tiles<4, 1>},
      {multiply_tiles<1, 2>, multiply_tiles<2, 2>}};
  const int64_t together = blocks == 1 ? 4 : 2;
  for (int64_t i = 0; i < count; i += together)
    kOf[blocks - 1][smaller(count - i, together) - 1](x + i, step, chunk, weight, products + i * kTileRows * kWidth,
                                                      first);
}

// Copies the inputs of positions, segment after segment, to rows of `row` bytes; kBytes hold a segment.
template <int kBytes>
inline void gather(const char* const* x, int64_t count, const int64_t* offsets, int64_t segments, int64_t bytes,
                   int64_t row, char* to) {
  for (int64_t i = 0; i < count; ++i, to += row) {
    char* next = to;
    for (int64_t s = 0; s < segments; ++s, next += bytes) {
      // What is copied beyond a segment the next one covers, or a weight of 0 multiplies.
      // In vectors, since GCC would make loops of smaller numbers gather and scatter them.
      const char* from = x[i] + offsets[s];
      if constexpr (kBytes == 8)
        _mm_storel_epi64(reinterpret_cast<__m128i*>(next), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
      else if constexpr (kBytes == 16)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(next), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      else
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(next),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
  }
}

// Some strips of a group, at the positions [first, last).
inline void gathered_conv2d(const ConvCall& call, int64_t group, int64_t first_strip, int64_t last_strip, int64_t first,
                            int64_t last) {
  const Conv& conv = *call.conv;
  const int64_t strips = ceil_div(conv.group_channels, kWidth), words = panel_words(conv);
  const int64_t lanes = ceil_div(conv.segments * conv.lanes, kTileLanes) * kTileLanes, row = 4 * lanes;
  const TilePiece all{0, lanes, 0};
  const TileChunk chunk{&all, 1};
  const bool kept = conv.panels != nullptr;
  uint32_t* made = kept ? nullptr : room<uint32_t>(Scratch::panel, words * (last_strip - first_strip));
  for (int64_t strip = first_strip; !kept && strip < last_strip; ++strip)
    make_panel(conv, group, strip, made + (strip - first_strip) * words);
  const uint32_t* panels = kept ? conv.panels + (group * strips + first_strip) * words : made;
  auto* offsets = room<int64_t>(Scratch::offsets, conv.segments);
  for (int64_t s = 0; s < conv.segments; ++s) offsets[s] = segment_offset(call, s);
  const int64_t bytes = 4 * conv.lanes, size = kPositions * row + kSlack;
  const auto copy = bytes <= 8 ? gather<8> : bytes <= 16 ? gather<16> : gather<32>;
  char* copies = room<char>(Scratch::activations, 2 * size);
  alignas(64) uint32_t products[kPositions * kWidth];
  // A tile is loaded when its copies are in the cache: one batch is copied while another is multiplied.
  Positions batches[2] = {Positions(call), Positions(call)};
  const auto prepare = [&](int64_t from, int turn) {
    const int64_t count = smaller(last - from, kPositions);
    place(call, group, from, count, &batches[turn]);
    copy(batches[turn].x, count, offsets, conv.segments, bytes, row, copies + turn * size);
  };
  if (first < last) prepare(first, 0);
  for (int turn = 0; first < last; first += kPositions, turn ^= 1) {
    const int64_t tiles = ceil_div(smaller(last - first, kPositions), kTileRows);
    if (first + kPositions < last) prepare(first + kPositions, turn ^ 1);
    const Positions& at = batches[turn];
    const char* x[kPositions / kTileRows];
    for (int64_t i = 0; i < tiles; ++i) x[i] = copies + turn * size + i * kTileRows * row;
    for (int64_t strip = first_strip; strip < last_strip; ++strip) {
      const int64_t channel = strip * kWidth, width = smaller(conv.group_channels - channel, kWidth);
      multiply_chunk(x, tiles, row, width > kTileLanes ? 2 : 1, chunk, panels + (strip - first_strip) * words, products,
                     true);
      finish_batch(call, products, at, group * conv.group_channels + channel, width);
    }
  }
}

inline void run_gathered(const ConvCall& call, int64_t parts, int64_t begin, int64_t end) {
  const int64_t strips = ceil_div(call.conv->group_channels, kWidth);
  const int64_t positions = call.images * call.y.shape.height * call.y.shape.width;
  const TileConfig config(kTileRows);
  for (int64_t unit = begin; unit < end;) {
    const int64_t index = unit / parts, part = unit % parts, strip = index % strips;
    const int64_t count = parts > 1 ? 1 : smaller(strips - strip, end - unit);
    gathered_conv2d(call, index / strips, strip, strip + count, positions * part / parts,
                    positions * (part + 1) / parts);
    unit += count;
  }
}

void conv2d(const ConvCall& call, int64_t parts, int64_t begin, int64_t end) {
  if (call.conv->gathered) return run_gathered(call, parts, begin, end);
  constexpr int64_t kTogether = kPositions / kTileRows;
  const Conv& conv = *call.conv;
  const Grid grid(call);
  const int64_t strips = ceil_div(conv.group_channels, kWidth), words = panel_words(conv);
  const int64_t tiles = grid.images * grid.tiles;
  // Where a panel serves a few tiles alone, each chunk is decoded when it is multiplied, and stays in the cache.
  const bool kept = conv.panels != nullptr, chunked = !kept && conv.segments == 1 && tiles <= kTogether * parts;
  const int64_t most = ceil_div(conv.lanes, kTileLanes);
  auto* pieces = room<TilePiece>(Scratch::offsets, most * conv.segments);
  auto* chunks = room<TileChunk>(Scratch::tables, most);
  const int64_t num_chunks = plan_tile_chunks(call, pieces, chunks);
  uint32_t* made = kept ? nullptr : room<uint32_t>(Scratch::panel, words);
  alignas(64) uint32_t products[kPositions * kWidth];
  int64_t decoded = -1;
  Positions at(call);
  const TileConfig config(kTileRows);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t index = unit / parts, group = index / strips, strip = index % strips, part = unit % parts;
    const uint32_t* panel = kept ? conv.panels + index * words : made;
    if (!kept && !chunked && index != decoded) make_panel(conv, group, strip, made), decoded = index;
    const int64_t width = smaller(conv.group_channels - strip * kWidth, kWidth), last = tiles * (part + 1) / parts;
    const int blocks = width > kTileLanes ? 2 : 1;
    for (int64_t first = tiles * part / parts; first < last; first += kTogether) {
      const int64_t count = smaller(last - first, kTogether);
      place_tiles(call, grid, group, first, count, &at);
      for (int64_t c = 0; c < num_chunks; ++c) {
        const TilePiece& piece = *chunks[c].pieces;
        if (chunked) make_part(conv, group, strip, piece.panel / kWidth, piece.lanes, made);
        multiply_chunk(at.x, count, grid.step, blocks, chunks[c], chunked ? made - piece.panel : panel, products,
                       c == 0);
      }
      finish_batch(call, products, at, group * conv.group_channels + strip * kWidth, width);
    }
  }
}
