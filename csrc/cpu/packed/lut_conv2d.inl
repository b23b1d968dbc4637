// packed_conv2d by tables of sums: those of some inputs of the pixels that a rectangle of output pixels sees, each
// pixel's once, then all channels.

// Groups of kWeights inputs whose tables are made together: they fill whole words.
template <class Tables>
inline int64_t groups_of_inputs(const PackedCall& call, const LookupTile& t) {
  int64_t step = 1;
  while (step * call.weight->taps() % Tables::kInWord != 0) ++step;
  const int64_t steps = kTablesRoom / (t.height * t.width * step * Tables::kEntries * 4);
  return step * (steps < 1 ? 1 : steps);
}

template <class Tables, int kBlocks>
__attribute__((noinline)) void add_pixel_sums(IndexStream indices, int64_t count, const float* tables,
                                              const int64_t* pixel, int64_t pixels, const int64_t* offsets,
                                              float* sums, int64_t stride, bool first) {
  for (int64_t i = 0; i < pixels; i += kSumRows) {
    const float* row[kSumRows];
    for (int r = 0; r < kSumRows; ++r) row[r] = tables + pixel[i + r];
    add_sums<Tables, kSumRows, kBlocks>(
        indices, 0, count, row, [&](int64_t j) { return offsets[j]; }, sums + i * stride, stride, first);
  }
}

// Tables of groups [first, first + groups) of the inputs, zeros beyond the last, of height * width pixels of the copy,
// [height][t.width][groups].
template <class Tables>
__attribute__((noinline)) void make_tables(const PackedLayout& layout, const CopyPlan& plan, const LookupTile& t,
                                           const Tables& of, const char* corner, int64_t first, int64_t groups,
                                           int64_t height, int64_t width, float* tables) {
  const int64_t whole = layout.inputs / Tables::kWeights, rest = layout.inputs % Tables::kWeights;
  for (int64_t h = 0; h < height; ++h)
    for (int64_t w = 0; w < width; ++w) {
      const auto* x = reinterpret_cast<const float*>(corner + h * plan.row + w * plan.pixel);
      float* to = tables + (h * t.width + w) * groups * Tables::kEntries;
      int64_t group = first;
      for (; group < first + groups && group < whole; ++group, to += Tables::kEntries)
        of.make(x + group * Tables::kWeights, to);
      for (; group < first + groups; ++group, to += Tables::kEntries) {
        float last[Tables::kWeights] = {};
        for (int64_t j = 0; group == whole && j < rest; ++j) last[j] = x[group * Tables::kWeights + j];
        of.make(last, to);
      }
    }
}

template <class Tables>
void run_lookup_conv2d_of(const PackedCall& call, const Parallel& parallel) {
  const PackedLayout& layout = *call.weight;
  const LookupTile t = lookup_tile(call);
  const int64_t groups = layout.groups, taps = layout.taps(), segments = layout.segments;
  const int64_t together = groups_of_inputs<Tables>(call, t), all = ceil_div(layout.inputs, Tables::kWeights);
  const int64_t words = together * taps / Tables::kInWord, max_pixels = t.out_height * t.out_width;
  auto* offsets = room<int64_t>(Scratch::offsets, segments + together * taps);
  const CopyPlan plan = plan_copy(call, sizeof(float), 64, offsets);
  const int64_t wave = images_of_wave(call, plan.image, parallel.threads);
  int64_t* at = offsets + segments;  // from a pixel's first table to that of each index
  for (int64_t i = 0; i < together * taps; ++i) {
    const int64_t tap = i % taps, h = tap / layout.kernel_w * call.dilation_h;
    at[i] = ((h * t.width + tap % layout.kernel_w * layout.dilation_w) * together + i / taps) * Tables::kEntries;
  }
  char* activations = room<char>(Scratch::activations, wave * plan.image);
  const int64_t down = ceil_div(call.out_height, t.out_height), across = ceil_div(call.out_width, t.out_width);

  for (int64_t first_image = 0; first_image < call.images; first_image += wave) {
    const int64_t images = smaller(call.images - first_image, wave);
    pack_wave<Packer<FloatOperand>>(call, plan, parallel, first_image, images, nullptr, activations);

    const int64_t tiles = images * groups * down * across;
    const ChannelParts channels(layout.blocks, tiles, parallel.threads);
    const int64_t parts = channels.parts, most = channels.most_channels(), work = max_pixels * most * layout.columns;
    parallel_for(parallel, tiles * parts, 1 + kTaskWork / work, [&](int64_t begin, int64_t end) {
      const Tables of(layout);
      auto* tables = room<float>(Scratch::tables, t.height * t.width * together * Tables::kEntries);
      auto* sums = room<float>(Scratch::products, (max_pixels + kSumRows) * most);
      auto* pixel = room<int64_t>(Scratch::positions, max_pixels + kSumRows);  // from the first table to a pixel's
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task % parts, tile = task / parts, group = tile / (down * across) % groups;
        const int64_t image = tile / (down * across) / groups;
        const int64_t h = tile / across % down * t.out_height, w = tile % across * t.out_width;
        const int64_t height = smaller(call.out_height - h, t.out_height);
        const int64_t width = smaller(call.out_width - w, t.out_width), pixels = height * width;
        const int64_t first_block = channels.first_block(part), last_block = channels.first_block(part + 1);
        for (int64_t i = 0; i < pixels + kSumRows; ++i) {
          const int64_t of_tile = smaller(i, pixels - 1);
          pixel[i] = (of_tile / width * call.stride_h * t.width + of_tile % width * call.stride_w) * together *
                     Tables::kEntries;
        }
        const char* corner = activations + image * plan.image + group * plan.plane + h * call.stride_h * plan.row +
                             w * call.stride_w * plan.pixel;
        for (int64_t input = 0; input < all; input += together) {
          make_tables(layout, plan, t, of, corner, input, together, t.height - (t.out_height - height) * call.stride_h,
                      t.width - (t.out_width - width) * call.stride_w, tables);
          const int64_t word = input * taps / Tables::kInWord, left = layout.index_words() - word;
          for_blocks<4>(first_block, last_block, [&](int64_t block, auto blocks) {
            IndexStream indices = index_stream(layout, group, block);
            indices.words += word * indices.stride;
            add_pixel_sums<Tables, blocks.value>(indices, smaller(left, words), tables, pixel, pixels, at,
                                                 sums + (block - first_block) * kBlock, most, input == 0);
          });
        }
        const int64_t run = width == call.out_width ? pixels : width;  // pixels that follow each other
        for (int64_t i = 0; i < pixels; i += run)
          finish_pixels<FloatOperand>(call, sums + i * most, most, first_image + image,
                                      (h + i / width) * call.out_width + w, run, group, first_block,
                                      smaller(last_block * kBlock, layout.group_channels) - first_block * kBlock, 1.0f);
      }
    });
  }
}

inline void run_lookup_conv2d(const PackedCall& call, const Parallel& parallel) {
  (call.weight->num_levels == 2 ? run_lookup_conv2d_of<SumTables<2>>
                                : run_lookup_conv2d_of<SumTables<3>>)(call, parallel);
}
