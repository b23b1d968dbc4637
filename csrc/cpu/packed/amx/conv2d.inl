// packed_conv2d on AMX: a copy of each image, and an implicit matrix product over it.

// How a call is cut into tiles. Positions are output pixels in the order in which tiles take them: with stride 1 an
// image can be one line of all pixels of the padded rows (the few between the rows are computed and left unused), else
// every output row is a line of its own.
struct TilePlan {
  CopyPlan copy;
  int64_t part;                // bytes that one part of all images takes
  int64_t tiles, pitch;        // tiles of an image, and positions from an output row to the next
  int64_t steps;               // steps of a segment
  int64_t sums;                // sums of activations that a group of an image has
  const int64_t *offset, *at;  // [segments], [tiles]: bytes from a position's first activation to a segment's, and from
                               // an image to a tile's first activation
};

template <class T>
inline TilePlan plan_tiles(const PackedCall& call) {
  const PackedLayout& layout = *call.weight;
  TilePlan p{};
  const int64_t padded_w = call.width + 2 * int64_t{call.padding_w};
  const int64_t padded_h = call.height + 2 * int64_t{call.padding_h};
  const int64_t flat = ceil_div((call.out_height - 1) * padded_w + call.out_width, kTile);
  const int64_t by_rows = call.out_height * ceil_div(call.out_width, kTile);
  const bool one_line = call.stride_h == 1 && call.stride_w == 1 && flat < by_rows;
  p.tiles = one_line ? flat : by_rows;
  const int64_t line_tiles = one_line ? flat : ceil_div(call.out_width, kTile);
  p.pitch = one_line ? padded_w : line_tiles * kTile;
  p.steps = layout.padded / T::kStep;
  p.sums = T::kAffine ? padded_h * padded_w + kTile * call.stride_w : 0;
  auto* offset = room<int64_t>(Scratch::offsets, layout.segments + p.tiles);
  // The last tile and the last step of a segment read beyond the image.
  const int64_t pixel = layout.inputs * static_cast<int64_t>(sizeof(typename T::Element));
  const int64_t beyond = (int64_t{kTile} * call.stride_w + 2 * call.padding_w) * pixel + 128;
  p.copy = plan_copy(call, sizeof(typename T::Element), beyond, offset);
  int64_t* at = offset + layout.segments;
  for (int64_t t = 0; t < p.tiles; ++t)
    at[t] = t / line_tiles * call.stride_h * p.copy.row + t % line_tiles * kTile * call.stride_w * pixel;
  p.offset = offset;
  p.at = at;
  return p;
}

// Images that are packed and multiplied together.
struct Wave {
  int64_t first, images;
  char* packed;
  RowScale* scales;
  float* sums;
};

// Copies a wave; false where an activation does not fit.
template <class T>
inline bool pack_tiles(const PackedCall& call, const TilePlan& plan, const Parallel& parallel, const Wave& wave) {
  if constexpr (T::kAffine) sum_images(call, parallel, wave.first, wave.images, plan.sums, wave.sums);
  return pack_wave<TilePacker<T>>(call, plan.copy, parallel, wave.first, wave.images, wave.scales, wave.packed,
                                  plan.part);
}

// Writes the outputs of 64 channels from `block` on of a group whose positions are in [first, last) of an image.
template <class T>
inline void finish_tiles(const PackedCall& call, const TilePlan& plan, typename T::Product* products,
                         const float* sums, int64_t first, int64_t last, int64_t image, int64_t group, int64_t block,
                         float scale) {
  const int64_t width = smaller(call.weight->group_channels - block * kBlock, kWidth);
  for (int64_t h = first / plan.pitch; h < call.out_height && h * plan.pitch < last; ++h) {
    const int64_t origin = h * plan.pitch, from = first > origin ? first - origin : 0;
    const int64_t to = smaller(last - origin, call.out_width);
    if (from >= to) continue;
    auto* row = products + (origin - first + from) * kWidth;
    if constexpr (T::kAffine) apply_levels(call, sums, h, from, to - from, width, row);
    finish_pixels<typename T::Op>(call, row, kWidth, image, h * call.out_width + from, to - from, group, block, width,
                                  scale);
  }
}

// 64 channels from `block` on of a group, at the tiles [first, last) of images [begin, end) of a wave.
template <class T>
inline void multiply_pixels(const PackedCall& call, const TilePlan& plan, const Wave& wave, int64_t begin, int64_t end,
                            int64_t group, int64_t block, int64_t first, int64_t last, Ahead* ahead) {
  const PackedLayout& layout = *call.weight;
  const int64_t span = last - first, count = (end - begin) * span;
  const int blocks = static_cast<int>(smaller(layout.blocks - block, kWidthBlocks)), together = blocks == 1 ? 1 : 2;
  const int64_t panel_part = layout.segments * plan.steps * kTileBytes, panel_block = T::kLevels * panel_part;
  char* panel = room<char>(Scratch::panel, 2 * panel_block);
  auto* products = room<typename T::Product>(Scratch::products, count * kTile * kWidth);
  const Run run{layout.segments, plan.steps, plan.offset, call.stride_w * plan.copy.pixel, 64, plan.part, panel,
                panel_part, panel_block};
  for (int b = 0; b < blocks; b += together) {
    const int wide = blocks - b < together ? blocks - b : together;
    for (int i = 0; i < wide; ++i) {
      TileCodebook<T> book;
      book.read(layout, group, block + b + i);
      for (int64_t s = 0; s < layout.segments; ++s)
        decode_steps<T>(layout, book, group, block + b + i, s, 0, plan.steps,
                        panel + i * panel_block + s * plan.steps * kTileBytes, panel_part);
    }
    int64_t image = begin, at = first;  // where the next tile is
    for (int64_t t = 0; t < count; t += tiles_with(wide)) {
      const int high = static_cast<int>(smaller(count - t, tiles_with(wide)));
      const char* tile[4];
      for (int i = 0; i < high; ++i) {
        tile[i] = wave.packed + image * plan.copy.image + group * plan.copy.plane + plan.at[at];
        if (++at == last) at = first, ++image;
      }
      ahead->fetch();
      multiply<T>(tile, high, wide, run, products + t * kTile * kWidth + b * kBlock, false);
    }
  }
  for (int64_t i = begin; i < end; ++i)
    finish_tiles<T>(call, plan, products + (i - begin) * span * kTile * kWidth,
                    wave.sums + (i * layout.groups + group) * plan.sums, first * kTile, last * kTile, wave.first + i,
                    group, block, T::Op::kInt8 ? wave.scales[i].scale : 1.0f);
}

template <class T>
bool run_conv2d(const PackedCall& call, const Parallel& parallel) {
  constexpr int64_t kTaskTiles = 64;  // the products of so many tiles stay in the L2 cache
  const PackedLayout& layout = *call.weight;
  if (call.images == 0) return true;
  TilePlan plan = plan_tiles<T>(call);
  const int64_t tiles = plan.tiles, channel_tasks = ceil_div(layout.blocks, kWidthBlocks), groups = layout.groups;
  const int64_t work = tiles * kTile * layout.segments * layout.padded * groups * channel_tasks * kWidth;
  bool fits = true;
  const auto wave_of = [&](int64_t images) {
    return Wave{0, images, room<char>(Scratch::activations, plan.part * T::kActivations),
                room<RowScale>(Scratch::scales, images), room<float>(Scratch::sums, images * groups * plan.sums)};
  };

  if (call.images >= parallel.threads) {
    // Each thread takes images whole, several together where they are small: the decoded weights serve them all.
    const int64_t together = smaller(ceil_div(kTaskTiles / 2, tiles), ceil_div(call.images, parallel.threads));
    plan.part = together * plan.copy.image;
    parallel_for(parallel, ceil_div(call.images, together), 1 + 4 * kTaskWork / (work * together),
                 [&](int64_t begin, int64_t end) {
      const TileConfig config(kTile);
      Wave wave = wave_of(together);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        wave.first = chunk * together;
        wave.images = smaller(call.images - wave.first, together);
        if (!pack_tiles<T>(call, plan, {nullptr, 1}, wave)) __atomic_store_n(&fits, false, __ATOMIC_RELAXED);
        const int64_t next = wave.first + wave.images, coming = smaller(call.images - next, together);
        const int64_t slices = wave.images * tiles / 4 * groups * ceil_div(layout.blocks, 2) + 1;
        Ahead ahead = ahead_of(call, next, chunk + 1 < end ? coming : 0, slices);
        for (int64_t g = 0; g < groups; ++g)
          for (int64_t block = 0; block < layout.blocks; block += kWidthBlocks)
            for (int64_t t = 0; t < tiles; t += kTaskTiles)
              multiply_pixels<T>(call, plan, wave, 0, wave.images, g, block, t, smaller(tiles, t + kTaskTiles), &ahead);
      }
    });
    return fits;
  }

  // Fewer images than threads: all are packed first, then the threads share out tiles and channels.
  plan.part = call.images * plan.copy.image;
  const Wave wave = wave_of(call.images);
  if (!pack_tiles<T>(call, plan, parallel, wave)) return false;
  int64_t span = ceil_div(tiles, ceil_div(2 * parallel.threads, channel_tasks * groups));
  span = span < 4 ? 4 : span > kTaskTiles ? kTaskTiles : (span + 1) / 2 * 2;
  const int64_t spans = ceil_div(tiles, span), tasks = call.images * groups * channel_tasks * spans;
  parallel_for(parallel, tasks, 1 + 4 * kTaskWork * spans / work, [&](int64_t begin, int64_t end) {
    const TileConfig config(kTile);
    Ahead nothing{};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t = task % spans * span, block = task / spans % channel_tasks * kWidthBlocks;
      const int64_t g = task / (spans * channel_tasks) % groups, i = task / (spans * channel_tasks * groups);
      multiply_pixels<T>(call, plan, wave, i, i + 1, g, block, t, smaller(tiles, t + span), &nothing);
    }
  });
  return true;
}
