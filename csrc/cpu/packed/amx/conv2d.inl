// packed_conv2d on AMX, for one operand class: a zero-padded channels-last copy of each image's groups, and an implicit
// matrix product over it.
#pragma once

// The numbers that all tasks of a call share. Positions are output pixels in the order in which tiles take them: with
// stride 1 an image can be one line of all pixels of the padded rows (the few between the rows are computed and left
// unused), else every output row is a line of its own.
struct ConvPlan {
  int64_t padded_w, pixel, plane;    // pixels in a padded row; bytes of a pixel, and of a group's padded image
  int64_t lines, line_tiles, pitch;  // tiles of a line; positions from an output row to the next
  int64_t steps;                     // of a segment
  int64_t image, part;               // bytes of all groups of an image, of all images of a part
  int64_t sums;                      // of activations, of a group's padded image
  const int64_t *offset, *tile;      // [segments], [tiles]: bytes from a position's first activation to a segment's,
                                     // and from an image to a tile's first activation
  int64_t tiles() const { return lines * line_tiles; }
};

template <class Op>
inline ConvPlan plan_conv2d(const Conv2dCall& call) {
  const PackedLayout& layout = *call.weight;
  ConvPlan p;
  p.padded_w = call.width + 2 * call.padding_w;
  p.pixel = layout.inputs * Op::kElement;
  const int64_t padded_h = call.height + 2 * call.padding_h;
  // The last tile and the last step of a segment read beyond the image.
  const int64_t beyond = (kTile * call.stride_w + 2 * call.padding_w) * p.pixel + 128;
  p.plane = (padded_h * p.padded_w * p.pixel + beyond + 63) / 64 * 64;
  p.image = layout.groups * p.plane;
  p.sums = Op::kAffine ? padded_h * p.padded_w + kTile * call.stride_w : 0;
  const int64_t flat = ((call.out_height - 1) * p.padded_w + call.out_width + kTile - 1) / kTile;
  const int64_t by_rows = call.out_height * ((call.out_width + kTile - 1) / kTile);
  if (call.stride_h == 1 && call.stride_w == 1 && flat < by_rows) {
    p.lines = 1, p.line_tiles = flat, p.pitch = p.padded_w;
  } else {
    p.lines = call.out_height, p.line_tiles = (call.out_width + kTile - 1) / kTile, p.pitch = p.line_tiles * kTile;
  }
  p.steps = layout.padded * Op::kElement / 64;
  auto* offset = reinterpret_cast<int64_t*>(
      scratch(Scratch::tables, static_cast<size_t>(layout.segments + p.tiles()) * sizeof(int64_t)));
  auto* tile = offset + layout.segments;
  const int columns = layout.segments / layout.kernel_h;  // 1, or kernel_w where dilation sets them apart
  for (int s = 0; s < layout.segments; ++s)
    offset[s] = (s / columns * call.dilation_h * p.padded_w + s % columns * layout.dilation_w) * p.pixel;
  for (int64_t line = 0; line < p.lines; ++line)
    for (int64_t t = 0; t < p.line_tiles; ++t)
      tile[line * p.line_tiles + t] = (line * call.stride_h * p.padded_w + t * kTile * call.stride_w) * p.pixel;
  p.offset = offset;
  p.tile = tile;
  return p;
}

// Packs row h of an image, of every group, and sums its channels; false where a number does not fit.
template <class Op, class X>
inline bool pack_pixels(const Conv2dCall& call, const ConvPlan& plan, const X* image, int64_t h, RowScale scale,
                        char* to, float* sums) {
  const PackedLayout& layout = *call.weight;
  const int64_t inputs = layout.inputs, groups = layout.groups, size = call.height * call.width;
  const int64_t row_bytes = plan.padded_w * plan.pixel, left = call.padding_w * plan.pixel;
  bool fits = true;
  for (int64_t g = 0; g < groups; ++g) {
    char* row = to + g * plan.plane + (h + call.padding_h) * row_bytes;
    // The zeros on the left, and on the right those of this row with the next one's on the left.
    for (int part = 0; part < Op::kParts && left > 0; ++part) {
      char* at = row + part * plan.part;
      if (h == 0) __builtin_memset(at, 0, static_cast<size_t>(left));
      __builtin_memset(at + row_bytes - left, 0, static_cast<size_t>(2 * left));
    }
    row += left;
    float* sum = Op::kAffine ? sums + g * plan.sums + (h + call.padding_h) * plan.padded_w + call.padding_w : nullptr;
    if (call.channels_last) {
      if constexpr (Op::kAffine)
        add_channels(image + h * call.width * inputs * groups + g * inputs, inputs, inputs * groups, call.width, sum);
      // A group's channels of a pixel, or of the whole row where there is one group, are one run.
      const int64_t run = groups == 1 ? call.width * inputs : inputs, runs = groups == 1 ? 1 : call.width;
      for (int64_t i = 0; i < runs; ++i)
        fits &= Op::pack_run(image + (h * call.width + i) * inputs * groups + g * inputs, run, scale,
                             row + i * plan.pixel, plan.part);
      continue;
    }
    for (int64_t c = 0; c < inputs; c += 16) {
      const int channels = static_cast<int>(inputs - c < 16 ? inputs - c : 16);
      const X* from = image + (g * inputs + c) * size + h * call.width;
      for (int64_t w = 0; w < call.width; w += 16) {
        const int64_t pixels = call.width - w < 16 ? call.width - w : 16;
        __m512 v[16];
        for (int i = 0; i < 16; ++i)
          v[i] = i < channels ? load_activations(from + i * size + w, first_lanes(pixels)) : _mm512_setzero_ps();
        if constexpr (Op::kAffine) add_channels(v, first_lanes(pixels), c == 0, sum + w);
        transpose(v);
        fits &= Op::pack_square(v, static_cast<int>(pixels), channels, scale, row + w * plan.pixel + c * Op::kElement,
                                plan.pixel, plan.part);
      }
    }
  }
  return fits;
}

// The rows of zeros above and below an image, and what is read beyond it.
template <class Op>
inline void pack_borders(const Conv2dCall& call, const ConvPlan& plan, char* to, float* sums) {
  if constexpr (Op::kAffine)
    __builtin_memset(sums, 0, static_cast<size_t>(call.weight->groups * plan.sums) * sizeof(float));
  const int64_t border = call.padding_h * plan.padded_w * plan.pixel;
  const int64_t end = (call.padding_h + call.height) * plan.padded_w * plan.pixel;
  for (int64_t g = 0; g < call.weight->groups; ++g)
    for (int part = 0; part < Op::kParts; ++part) {
      char* plane = to + g * plan.plane + part * plan.part;
      __builtin_memset(plane, 0, static_cast<size_t>(border));
      __builtin_memset(plane + end, 0, static_cast<size_t>(plan.plane - end));
    }
}

// Writes the outputs of `width` channels from `channel` on whose positions are in [first, last) of one image;
// products [last - first][kWidth]; `sums` of the group.
template <class Op, class Y>
inline void finish_pixels(const Conv2dCall& call, const ConvPlan& plan, typename Op::Product* products,
                          const float* sums, int64_t first, int64_t last, int64_t channel, int64_t lane, int64_t width,
                          float scale, Y* image) {
  const PackedLayout& layout = *call.weight;
  const float* bias = call.bias ? call.bias + channel : nullptr;
  const float* step = Op::kInt8 ? layout.int8_scales() + lane : nullptr;
  const float least = least_output(call.relu);
  const int64_t size = call.out_height * call.out_width;
  for (int64_t h = first / plan.pitch; h < call.out_height && h * plan.pitch < last; ++h) {
    const int64_t origin = h * plan.pitch, from = first > origin ? first - origin : 0;
    const int64_t to = last - origin < call.out_width ? last - origin : call.out_width;
    auto* row = products + (origin - first) * kWidth;
    if constexpr (Op::kAffine)
      apply_levels(call, sums, plan.padded_w, h, from, to - from, width, row + from * kWidth);
    if (call.channels_last) {
      finish_row(row + from * kWidth, to - from, width, bias, step, scale, least,
                 image + (h * call.out_width + from) * layout.channels + channel, layout.channels);
      continue;
    }
    for (int64_t w = from; w < to; w += 16) {
      const int64_t pixels = to - w < 16 ? to - w : 16;
      const __mmask16 lanes = first_lanes(pixels);
      for (int64_t c = 0; c < width; c += 16) {
        __m512 v[16];
        for (int i = 0; i < 16; ++i) v[i] = load_products(row + (w + (i < pixels ? i : 0)) * kWidth + c);
        transpose(v);
        Y* out = image + (channel + c) * size + h * call.out_width + w;
        for (int i = 0; i < 16 && c + i < width; ++i) {
          __m512 value = v[i];
          if (Op::kInt8)
            value = _mm512_mul_ps(_mm512_mul_ps(value, _mm512_set1_ps(step[c + i])), _mm512_set1_ps(scale));
          if (bias) value = _mm512_add_ps(value, _mm512_set1_ps(bias[c + i]));
          value = _mm512_max_ps(_mm512_set1_ps(least), value);
          store_activations(out + i * size, value, lanes);
        }
      }
    }
  }
}

// 64 channels from `block` on of a group, at the tiles [first, last) of `images` packed images.
template <class Op, class Y>
inline void multiply_pixels(const Conv2dCall& call, const ConvPlan& plan, const char* packed, const float* scales,
                            const float* sums, int64_t images, int64_t group, int64_t block, int64_t first,
                            int64_t last, Y* y, Ahead* ahead) {
  using Product = typename Op::Product;
  const PackedLayout& layout = *call.weight;
  const int64_t span = last - first, count = images * span;
  const int blocks =
      static_cast<int>(layout.blocks - block < kWidth / kBlock ? layout.blocks - block : kWidth / kBlock);
  const int64_t all_steps = layout.segments * plan.steps, panel_stride = Op::panel_bytes(all_steps);
  char* panel = scratch(Scratch::panel, static_cast<size_t>(2 * panel_stride));
  Product* products = reinterpret_cast<Product*>(
      scratch(Scratch::products, static_cast<size_t>(count * kTile) * kWidth * sizeof(Product)));
  const int together = blocks == 1 ? 1 : 2, apart = blocks == 1 ? 4 : 2;
  const Run run{layout.segments, plan.steps, plan.offset};
  for (int b = 0; b < blocks; b += together) {
    const int wide = blocks - b < together ? blocks - b : together;
    for (int i = 0; i < wide; ++i) Op::decode(layout, group, block + b + i, 0, all_steps, panel + i * panel_stride);
    int64_t image = 0, at = first;  // of the next tile
    for (int64_t t = 0; t < count; t += apart) {
      const int high = static_cast<int>(count - t < apart ? count - t : apart);
      const char* tile[kMaxTiles];
      for (int i = 0; i < high; ++i) {
        tile[i] = packed + image * plan.image + group * plan.plane + plan.tile[at];
        if (++at == last) at = first, ++image;
      }
      ahead->fetch();
      const Strip strip{tile, call.stride_w * plan.pixel, 64, plan.part};
      Op::multiply(high, wide, strip, run, panel, panel_stride, products + t * kTile * kWidth + b * kBlock, false);
    }
  }
  const int64_t channel = group * layout.group_channels() + block * kBlock,
                lane = (group * layout.blocks + block) * kBlock;
  const int64_t rest = layout.group_channels() - block * kBlock, width = rest < kWidth ? rest : kWidth;
  for (int64_t i = 0; i < images; ++i)
    finish_pixels<Op>(call, plan, products + i * span * kTile * kWidth, sums + (i * layout.groups + group) * plan.sums,
                      first * kTile, last * kTile, channel, lane, width, Op::kInt8 ? scales[i] : 1.0f,
                      y + i * layout.channels * call.out_height * call.out_width);
}

template <class Op, class X>
inline bool run_conv2d_of(const Conv2dCall& call, const Parallel& parallel) {
  constexpr int64_t kTaskTiles = 64;  // of a task: its products stay in the L2 cache
  const PackedLayout& layout = *call.weight;
  if (call.images == 0) return true;
  ConvPlan plan = plan_conv2d<Op>(call);
  const int64_t tiles = plan.tiles(), size = call.height * call.width;
  const int64_t image_in = layout.inputs * layout.groups * size,
                image_out = layout.channels * call.out_height * call.out_width;
  const int64_t channel_tasks = (layout.blocks + kWidth / kBlock - 1) / (kWidth / kBlock);
  const X* x = static_cast<const X*>(call.x);
  X* y = static_cast<X*>(call.y);
  const int64_t work = tiles * kTile * layout.segments * layout.padded * layout.groups * channel_tasks * kWidth;
  bool fits = true;
  const auto misfit = [&fits] { __atomic_store_n(&fits, false, __ATOMIC_RELAXED); };
  const int64_t image_sums = layout.groups * plan.sums;
  const auto sums_of = [&](int64_t images) {
    return reinterpret_cast<float*>(scratch(Scratch::sums, static_cast<size_t>(images * image_sums) * sizeof(float)));
  };
  const auto scale_of = [&](int64_t image) {
    return Op::kInt8 ? row_scale(largest(x + image * image_in, image_in)) : RowScale{};
  };

  if (call.images >= parallel.threads) {
    // Each thread takes images whole, several together where they are small: the decoded weights serve them all.
    int64_t together = (kTaskTiles / 2 + tiles - 1) / tiles;
    const int64_t share = (call.images + parallel.threads - 1) / parallel.threads;
    if (together > share) together = share;
    plan.part = together * plan.image;
    const int64_t chunks = (call.images + together - 1) / together;
    parallel_for(parallel, chunks, 1 + (int64_t{1} << 22) / (work * together), [&](int64_t begin, int64_t end) {
      typename Op::Thread thread(kTile);
      char* packed = scratch(Scratch::activations, static_cast<size_t>(plan.part * Op::kParts));
      float* scales = reinterpret_cast<float*>(scratch(Scratch::scales, static_cast<size_t>(together) * sizeof(float)));
      float* sums = sums_of(together);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * together,
                      images = call.images - first < together ? call.images - first : together;
        for (int64_t i = 0; i < images; ++i) {
          const RowScale scale = scale_of(first + i);
          scales[i] = scale.scale;
          pack_borders<Op>(call, plan, packed + i * plan.image, sums + i * image_sums);
          for (int64_t h = 0; h < call.height; ++h)
            if (!pack_pixels<Op>(call, plan, x + (first + i) * image_in, h, scale, packed + i * plan.image,
                                 sums + i * image_sums))
              misfit();
        }
        const X* next = x + (first + images) * image_in;
        const int64_t coming =
            chunk + 1 < end ? (call.images - first - images < together ? call.images - first - images : together) : 0;
        Ahead ahead{reinterpret_cast<const char*>(next), reinterpret_cast<const char*>(next + coming * image_in), 0};
        ahead.slice =
            (ahead.end - ahead.at) / (images * tiles / 4 * layout.groups * ((layout.blocks + 1) / 2) + 1) + 64;
        for (int64_t g = 0; g < layout.groups; ++g)
          for (int64_t block = 0; block < layout.blocks; block += kWidth / kBlock)
            for (int64_t t = 0; t < tiles; t += kTaskTiles)
              multiply_pixels<Op>(call, plan, packed, scales, sums, images, g, block, t,
                                  tiles - t < kTaskTiles ? tiles : t + kTaskTiles, y + first * image_out, &ahead);
      }
    });
    return fits;
  }

  // Fewer images than threads: all are packed first, then the threads share out tiles and channels.
  plan.part = call.images * plan.image;
  char* packed = scratch(Scratch::activations, static_cast<size_t>(plan.part * Op::kParts));
  float* scales = reinterpret_cast<float*>(scratch(Scratch::scales, static_cast<size_t>(call.images) * sizeof(float)));
  RowScale* row_scales =
      reinterpret_cast<RowScale*>(scratch(Scratch::row_scales, static_cast<size_t>(call.images) * sizeof(RowScale)));
  float* sums = sums_of(call.images);
  for (int64_t i = 0; i < call.images; ++i) {
    row_scales[i] = scale_of(i);
    scales[i] = row_scales[i].scale;
    pack_borders<Op>(call, plan, packed + i * plan.image, sums + i * image_sums);
  }
  const int64_t row_work = layout.inputs * layout.groups * call.width;
  parallel_for(parallel, call.images * call.height, 1 + (1 << 15) / row_work, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = row / call.height;
      if (!pack_pixels<Op>(call, plan, x + i * image_in, row % call.height, row_scales[i], packed + i * plan.image,
                           sums + i * image_sums))
        misfit();
    }
  });
  if (!fits) return false;
  const int64_t wanted = (2 * parallel.threads + channel_tasks * layout.groups - 1) / (channel_tasks * layout.groups);
  int64_t span = (tiles + wanted - 1) / wanted;
  span = span < 4 ? 4 : span > kTaskTiles ? kTaskTiles : (span + 1) / 2 * 2;
  const int64_t spans = (tiles + span - 1) / span, tasks = call.images * layout.groups * channel_tasks * spans;
  parallel_for(parallel, tasks, 1 + (int64_t{1} << 22) * spans / work, [&](int64_t begin, int64_t end) {
    typename Op::Thread thread(kTile);
    Ahead nothing{};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t = task % spans * span, block = task / spans % channel_tasks * (kWidth / kBlock);
      const int64_t g = task / (spans * channel_tasks) % layout.groups,
                    i = task / (spans * channel_tasks * layout.groups);
      multiply_pixels<Op>(call, plan, packed + i * plan.image, scales + i, sums + i * image_sums, 1, g, block, t,
                          tiles - t < span ? tiles : t + span, y + i * image_out, &nothing);
    }
  });
  return true;
}

// Whether all of y is right; if not, an activation does not fit the operands.
template <class Op>
inline bool run_conv2d(const Conv2dCall& call, const Parallel& parallel) {
  return call.half ? run_conv2d_of<Op, Bf16>(call, parallel) : run_conv2d_of<Op, float>(call, parallel);
}
