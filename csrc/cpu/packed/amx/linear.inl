// packed_linear on AMX: packs the activations, then computes 64 channels by a chunk of rows at a time.

// Steps of K whose decoded weights, of two blocks, stay in the L1 cache.
constexpr int64_t kChunkSteps = 8;

// Tiles of rows that a task takes at most.
constexpr int kMaxRowTiles = 32;

// Where row `row` and step `step` of the packed activations stand: chunk by chunk of K, the tiles of a chunk one after
// the other, so that a product walks through memory in order.
inline int64_t activations_at(int64_t row, int64_t step, int64_t steps, int64_t tiles) {
  const int64_t chunk = step / kChunkSteps, length = smaller(steps - chunk * kChunkSteps, kChunkSteps);
  return (chunk * kChunkSteps * tiles + row / kTile * length + step % kChunkSteps) * kTileBytes + row % kTile * 64;
}

// Packs a row of x; false where an activation does not fit.
template <class T, class X>
inline bool pack_tile_row(const PackedCall& call, const X* x, int64_t row, int64_t tiles, char* activations,
                          float* scale) {
  using Op = typename T::Op;
  const int64_t columns = call.weight->columns, steps = call.weight->padded / T::kStep;
  const RowScale rule = Op::kInt8 ? row_scale(largest(x, columns)) : RowScale{};
  *scale = rule.scale;
  TilePacker<T> pack(call, rule, 0);
  for (int64_t step = 0; step < steps; ++step) {
    auto* to = reinterpret_cast<typename T::Element*>(activations + activations_at(row, step, steps, tiles));
    for (int64_t i = 0; i < T::kStep; i += kLanes) {
      const int64_t k = step * T::kStep + i, left = columns - k;
      pack(left > 0 ? load_numbers(x + k, lanes_left(left)) : Float{}, to + i, kLanes);
    }
  }
  return pack.fits();
}

// How many rows a task takes: few enough for their activations to stay in the L2 cache, enough to repay decoding, and
// such that there are tasks for every thread.
template <class T>
inline int64_t rows_of_task(const PackedLayout& layout, int64_t rows, int64_t channel_tasks, int threads) {
  constexpr int64_t kCache = 1280 << 10, kLeast = 32;
  int64_t most = kCache / (layout.padded / T::kStep * 64) / kLeast * kLeast;
  most = most < kLeast ? kLeast : smaller(most, kMaxRowTiles * kTile);
  int64_t chunks = ceil_div(2 * threads, channel_tasks);
  if (chunks < ceil_div(rows, most)) chunks = ceil_div(rows, most);
  return ceil_div(ceil_div(rows, chunks), kLeast) * kLeast;
}

// One tile of activations times kBlocks blocks, one or four, over all of K: decodes a step while the tiles of the one
// before are multiplied, through a ring that stays in the L1 cache.
template <class T, int kBlocks>
inline void stream_blocks(const PackedLayout& layout, int64_t first_block, const char* x, typename T::Product* out) {
  using Op = typename T::Op;
  constexpr int kRing = 4;
  constexpr int64_t kSlot = 4 * kTileBytes, kAhead = 16;  // words are fetched 16 steps before their use
  const int64_t steps = layout.padded / T::kStep, words = T::kStep / layout.word_weights();
  alignas(64) char ring[kRing * kSlot];
  const auto decode = decoder_of<Op>(layout);
  TileCodebook<T> book[kBlocks];
  for (int b = 0; b < kBlocks; ++b) book[b].read(layout, 0, first_block + b);
  const auto decode_step = [&](int64_t step) {
    for (int b = 0; b < kBlocks; ++b) {
      const uint32_t* from = layout.block(0, first_block + b) + step * words * kBlock;
      fetch_words<3>(from + kAhead * words * kBlock, words);
      auto* to = reinterpret_cast<uint32_t*>(ring + step % kRing * kSlot + b * kTileBytes);
      decode(book[b].part[0], from, T::kStep, to, kBlock);
      const int64_t left = layout.columns - step * T::kStep;
      if (left < T::kStep) clear_beyond<Op>(to, kBlock, left, kTile);
    }
  };
  unroll<kBlocks>([](auto b) { zero_tile<b.value>(); });
  decode_step(0);
  for (int64_t step = 0; step < steps; ++step) {
    if (step + 1 < steps) decode_step(step + 1);
    load_tile<4>(x + step * kTileBytes, 64);
    unroll<kBlocks>([&](auto b) {
      load_tile<6 + b.value % 2>(ring + step % kRing * kSlot + b.value * kTileBytes, 64);
      dot_tiles<dot_of<T>(), b.value, 4, 6 + b.value % 2>();
    });
  }
  unroll<kBlocks>([&](auto b) { store_tile<b.value>(reinterpret_cast<char*>(out) + b.value * 64, kWidth * 4); });
}

// Products [tiles * 16][kWidth] of some tiles of activations and some blocks, a chunk of K at a time.
template <class T>
inline void multiply_chunks(const PackedLayout& layout, int64_t first_block, int blocks, const char* activations,
                            int64_t first_tile, int count, int64_t tiles, typename T::Product* products) {
  const int64_t steps = layout.padded / T::kStep, offset = 0, panel_block = kChunkSteps * kTileBytes;
  char* panel = room<char>(Scratch::panel, 2 * panel_block);
  TileCodebook<T> book[kWidthBlocks];
  for (int b = 0; b < blocks; ++b) book[b].read(layout, 0, first_block + b);
  const int together = blocks == 1 ? 1 : 2;
  for (int64_t step = 0; step < steps; step += kChunkSteps) {
    const int64_t now = smaller(steps - step, kChunkSteps), next = kChunkSteps * T::kStep / layout.word_weights();
    const char* tile[kMaxRowTiles];
    for (int t = 0; t < count; ++t)
      tile[t] = activations + activations_at((first_tile + t) * kTile, step, steps, tiles);
    const Run run{1, now, &offset, 64, kTileBytes, 0, panel, 0, panel_block};
    for (int b = 0; b < blocks; b += together) {
      const int wide = blocks - b < together ? blocks - b : together;
      for (int i = 0; i < wide; ++i) {
        // Without this each chunk begins with the latency of the L3 cache.
        fetch_words<2>(layout.block(0, first_block + b + i) + (step / kChunkSteps + 1) * next * kBlock, next);
        decode_steps<T>(layout, book[b + i], 0, first_block + b + i, 0, step, now, panel + i * panel_block, 0);
      }
      for (int t = 0; t < count; t += tiles_with(wide))
        multiply<T>(tile + t, count - t < tiles_with(wide) ? count - t : tiles_with(wide), wide, run,
                    products + t * kTile * kWidth + b * kBlock, step > 0);
    }
  }
}

template <class T>
bool run_linear(const PackedCall& call, const Parallel& parallel) {
  const PackedLayout& layout = *call.weight;
  const int64_t rows = call.images, tiles = ceil_div(rows, kTile);
  char* activations = room<char>(Scratch::activations, tiles * (layout.padded / T::kStep) * kTileBytes);
  float* scales = room<float>(Scratch::scales, rows);
  bool fits = true;
  with_elements(call.x, [&](const auto* x) {
    parallel_for(parallel, rows, 1 + (1 << 14) / layout.columns, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        if (!pack_tile_row<T>(call, x + row * call.x.image_stride, row, tiles, activations, scales + row))
          __atomic_store_n(&fits, false, __ATOMIC_RELAXED);
    });
  });
  if (!fits) return false;

  const int64_t channel_tasks = ceil_div(layout.blocks, kWidthBlocks);
  const int64_t chunk = rows_of_task<T>(layout, rows, channel_tasks, parallel.threads), chunk_tiles = chunk / kTile;
  // Tasks below some ten microseconds are not worth another thread.
  const int64_t work = (smaller(chunk, rows) + 16) * kWidth * layout.padded;
  parallel_for(parallel, channel_tasks * ceil_div(rows, chunk), 1 + 4 * kTaskWork / work,
               [&](int64_t begin, int64_t end) {
    const TileConfig config(rows < kTile ? static_cast<int>(rows) : kTile);
    auto* products = room<typename T::Product>(Scratch::products, chunk * kWidth);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_tile = task / channel_tasks * chunk_tiles, first_block = task % channel_tasks * kWidthBlocks;
      const int count = static_cast<int>(smaller(tiles - first_tile, chunk_tiles));
      const int blocks = static_cast<int>(smaller(layout.blocks - first_block, kWidthBlocks));
      if (tiles > 1) {
        multiply_chunks<T>(layout, first_block, blocks, activations, first_tile, count, tiles, products);
      } else if (blocks == kWidthBlocks) {
        stream_blocks<T, kWidthBlocks>(layout, first_block, activations, products);
      } else {
        for (int b = 0; b < blocks; ++b)
          stream_blocks<T, 1>(layout, first_block + b, activations, products + b * kBlock);
      }
      const int64_t first_row = first_tile * kTile;
      finish_rows<typename T::Op>(call, products, kWidth, first_row, smaller(rows - first_row, count * kTile),
                                  first_block, smaller(layout.channels - first_block * kBlock, kWidth),
                                  scales + first_row);
    }
  });
  return true;
}
