// packed_conv2d by tables of sums: those of some inputs of the pixels that a rectangle of output pixels sees, each
// pixel's once, then all channels.
//
// Included inside the namespace of the AVX-512 translation unit, after lut.inl and panel_conv2d.inl.
#pragma once

constexpr int kSumPixels = 32;  // of a rectangle, about

// A rectangle of output pixels, and the pixels of the padded copy that it sees: a table of each for some groups of
// inputs, [height][width][groups].
struct SumTile {
  int64_t out_height, out_width;
  int64_t height, width;
  int64_t groups;
};

template <class Sums>
inline SumTile plan_tile(const Conv2dCall& call) {
  const PackedLayout& layout = *call.weight;
  const int64_t taps = layout.taps();
  SumTile t;
  t.out_width = call.out_width < kLanes ? call.out_width : kLanes;  // as finish_pixels takes them
  t.out_height = kSumPixels / t.out_width < call.out_height ? kSumPixels / t.out_width : call.out_height;
  t.height = (t.out_height - 1) * call.stride_h + (layout.kernel_h - 1) * call.dilation_h + 1;
  t.width = (t.out_width - 1) * call.stride_w + (layout.kernel_w - 1) * layout.dilation_w + 1;
  int64_t step = 1;  // groups of inputs whose numbers fill whole words
  while (step * taps % Sums::kGroups != 0) ++step;
  const int64_t steps = kTablesRoom / (t.height * t.width * step * Sums::kTable * 4);
  t.groups = step * (steps < 1 ? 1 : steps);
  return t;
}

template <class Sums, int kBlocks>
__attribute__((noinline)) void add_pixel_sums(CodeStream codes, int64_t count, const float* tables,
                                              const int64_t* pixel, int64_t pixels, const int64_t* offsets,
                                              float* sums, int64_t stride, bool first) {
  for (int64_t i = 0; i < pixels; i += kSumRows) {
    const float* row[kSumRows];
    for (int r = 0; r < kSumRows; ++r) row[r] = tables + pixel[i + r];
    add_sums<Sums, kSumRows, kBlocks>(codes, 0, count, row, [&](int64_t j) { return offsets[j]; }, sums + i * stride,
                                      stride, first);
  }
}

// Tables of groups [first, first + t.groups) of the inputs, zeros beyond the last, of height * width pixels of the
// copy.
template <class Sums>
__attribute__((noinline)) void make_tables(const PackedLayout& layout, const ConvPlan& plan, const SumTile& t,
                                           const Sums& of, const char* corner, int64_t first, int64_t height,
                                           int64_t width, float* tables) {
  const int64_t whole = layout.inputs / Sums::kWeights, rest = layout.inputs % Sums::kWeights;
  for (int64_t h = 0; h < height; ++h)
    for (int64_t w = 0; w < width; ++w) {
      const auto* x = reinterpret_cast<const float*>(corner + h * plan.row + w * plan.pixel);
      float* to = tables + (h * t.width + w) * t.groups * Sums::kTable;
      int64_t group = first;
      for (; group < first + t.groups && group < whole; ++group, to += Sums::kTable)
        of.make(x + group * Sums::kWeights, to);
      for (; group < first + t.groups; ++group, to += Sums::kTable) {
        float last[Sums::kWeights] = {};
        for (int64_t j = 0; group == whole && j < rest; ++j) last[j] = x[group * Sums::kWeights + j];
        of.make(last, to);
      }
    }
}

template <class Sums, class X>
void run_sums_conv2d_of(const Conv2dCall& call, const SumTile& t, const Parallel& parallel) {
  const PackedLayout& layout = *call.weight;
  const int64_t groups = layout.groups, taps = layout.taps(), in_group = layout.group_channels();
  const int64_t all_inputs = ceil_div(layout.inputs, Sums::kWeights);
  const int64_t segments = layout.segments, words = t.groups * taps / Sums::kGroups;
  auto* offsets = reinterpret_cast<int64_t*>(
      scratch(Scratch::offsets, static_cast<size_t>(segments + t.groups * taps) * sizeof(int64_t)));
  const ConvPlan plan = plan_conv2d<FloatOperand>(call, parallel.threads, offsets);
  int64_t* at = offsets + segments;  // from a pixel's first table to that of each number
  for (int64_t group = 0; group < t.groups; ++group)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t h = tap / layout.kernel_w * call.dilation_h, w = tap % layout.kernel_w * layout.dilation_w;
      at[group * taps + tap] = ((h * t.width + w) * t.groups + group) * Sums::kTable;
    }
  char* activations = scratch(Scratch::activations, static_cast<size_t>(plan.wave * plan.image));
  const int64_t down = ceil_div(call.out_height, t.out_height), across = ceil_div(call.out_width, t.out_width);
  const int64_t units = ceil_div(layout.blocks, kSumUnit);

  for (int64_t first_image = 0; first_image < call.images; first_image += plan.wave) {
    const int64_t images = call.images - first_image < plan.wave ? call.images - first_image : plan.wave;
    const X* x = static_cast<const X*>(call.x) + first_image * layout.inputs * groups * call.height * call.width;
    X* y = static_cast<X*>(call.y) + first_image * layout.channels * plan.positions;
    pack_wave<FloatOperand>(call, plan, parallel, x, images, nullptr, activations);

    const int64_t tiles = images * groups * down * across;
    const int64_t parts = parts_of_channels(tiles, units, parallel.threads);
    const int64_t most = ceil_div(units, parts) * kSumUnit * kBlock;  // channels of a part
    const int64_t work = t.out_height * t.out_width * most * layout.columns;
    parallel_for(parallel, tiles * parts, 1 + kTaskWork / work, [&](int64_t begin, int64_t end) {
      const Sums of(layout);
      auto* tables = reinterpret_cast<float*>(
          scratch(Scratch::tables, static_cast<size_t>(t.height * t.width * t.groups * Sums::kTable) * 4));
      auto* sums = reinterpret_cast<float*>(
          scratch(Scratch::products, static_cast<size_t>((kSumPixels + kSumRows) * most) * 4));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task % parts, tile = task / parts, group = tile / (down * across) % groups;
        const int64_t image = tile / (down * across) / groups;
        const int64_t h = tile / across % down * t.out_height, w = tile % across * t.out_width;
        const int64_t height = call.out_height - h < t.out_height ? call.out_height - h : t.out_height;
        const int64_t width = call.out_width - w < t.out_width ? call.out_width - w : t.out_width;
        const int64_t first_block = units * part / parts * kSumUnit, next = units * (part + 1) / parts * kSumUnit;
        const int64_t last_block = next < layout.blocks ? next : layout.blocks;
        int64_t pixel[kSumPixels + kSumRows];  // from the first table to those of a pixel
        for (int64_t i = 0; i < height * width + kSumRows; ++i) {
          const int64_t of_tile = i < height * width ? i : height * width - 1;
          pixel[i] = (of_tile / width * call.stride_h * t.width + of_tile % width * call.stride_w) * t.groups *
                     Sums::kTable;
        }
        const char* corner = activations + image * plan.image + group * plan.plane + h * call.stride_h * plan.row +
                             w * call.stride_w * plan.pixel;
        for (int64_t input = 0; input < all_inputs; input += t.groups) {
          make_tables(layout, plan, t, of, corner, input,
                      t.height - (t.out_height - height) * call.stride_h,
                      t.width - (t.out_width - width) * call.stride_w, tables);
          const int64_t word = input * taps / Sums::kGroups, left = layout.number_words() - word;
          for_blocks<4>(first_block, last_block, [&](int64_t block, auto blocks) {
            CodeStream codes = Sums::stream(layout, group, block);
            codes.words += word * codes.word;
            add_pixel_sums<Sums, blocks.value>(codes, left < words ? left : words, tables, pixel, height * width, at,
                                               sums + (block - first_block) * kBlock, most, input == 0);
          });
        }
        const int64_t in = first_block * kBlock, wide = in_group - in < most ? in_group - in : most;
        const Epilogue channels = epilogue<FloatOperand>(call, group, first_block);
        const int64_t run = width == call.out_width ? height * width : width;  // pixels that follow each other
        for (int64_t i = 0; i < height * width; i += run)
          finish_pixels<FloatOperand>(call, sums + i * most, most, (h + i / width) * call.out_width + w, run,
                                      group * in_group + in, wide, channels, 1.0f,
                                      y + image * layout.channels * plan.positions);
      }
    });
  }
}

template <class Sums, class X>
inline bool run_sums_conv2d_with(const Conv2dCall& call, const Parallel& parallel) {
  const SumTile t = plan_tile<Sums>(call);
  // Strides may leave out most of the pixels that have tables.
  if (t.height * t.width > t.out_height * t.out_width * call.weight->taps()) return false;
  run_sums_conv2d_of<Sums, X>(call, t, parallel);
  return true;
}

// Whether this was a call that sums suit, and all of y is written.
template <class X>
inline bool run_sums_conv2d(const Conv2dCall& call, const Parallel& parallel) {
  const PackedLayout& layout = *call.weight;
  if (layout.numbers == 0 || layout.blocks < kLeastSumBlocks || call.out_height * call.out_width == 0) return false;
  return (layout.num_levels == 2 ? run_sums_conv2d_with<NumberSums<2>, X>
                                 : run_sums_conv2d_with<NumberSums<3>, X>)(call, parallel);
}
