// Float products at two to four levels on AVX-512: a few codes of a channel are one number, and a table of one or two
// registers has, for each of its values, the sum of what those weights add. So one permute and one addition take four,
// three or two weights of 16 channels, where a multiplication takes one. The permute looks at 4 or 5 bits: those above
// need no clearing.
//
// Tables are made where they are used, in the L1 cache, and all channels pass by: of some columns of a few rows, or of
// some inputs of the pixels that a few output pixels see, each of them once.
//
// Included inside the namespace of the AVX-512 translation unit, after packed_few_rows.h.
#pragma once

constexpr int kSumRows = 4;                 // rows, or pixels, that share what is read and shifted of the codes
constexpr int kSumUnit = kNumberBlocks;     // blocks of a unit of tasks
constexpr int kSumPixels = 32;              // of a task, about
constexpr int64_t kTablesRoom = 24 * 1024;  // bytes
// Below, with more than a few rows, decoding for a product takes less than making the tables.
constexpr int64_t kLeastSumBlocks = 8;

// Where the codes of some blocks stand.
struct CodeStream {
  const char* words;
  int64_t block, word;  // bytes from one to the next
};

// The numbers of packed_layout.h.
template <int kLevels>
struct NumberSums {
  static constexpr int kWeights = numbers_of(kLevels).weights, kShift = numbers_of(kLevels).bits;
  static constexpr int kGroups = numbers_of(kLevels).in_word;  // of a word: sums that are looked up
  static constexpr int kWordWeights = kGroups * kWeights, kVectors = kShift - 3, kTable = kVectors * 16;
  Float level[kWeights][kVectors];

  explicit NumberSums(const PackedLayout& layout) {
    alignas(64) uint32_t levels[kBlock], entry[kTable];
    read_table<FloatOperand>(layout, 0, levels);
    for (int j = 0, power = 1; j < kWeights; ++j, power *= kLevels) {
      for (int i = 0; i < kTable; ++i) entry[i] = levels[i / power % kLevels];
      for (int v = 0; v < kVectors; ++v) level[j][v] = (Float)load_lanes(entry + 16 * v);
    }
  }

  static int64_t padded(const PackedLayout& layout) { return layout.number_words() * kWordWeights; }

  static CodeStream stream(const PackedLayout& layout, int64_t group, int64_t block) {
    const int64_t unit = block / kNumberBlocks, left = layout.blocks - unit * kNumberBlocks;
    const auto* words = reinterpret_cast<const char*>(layout.number_unit(group, unit)) + block % kNumberBlocks * 64;
    return {words, 64, (left < kNumberBlocks ? left : kNumberBlocks) * 64};
  }

  BQNN_INLINE void make(const float* x, float* table) const {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Float sum = level[0][v] * x[0];
#pragma GCC unroll 4
      for (int j = 1; j < kWeights; ++j) sum = multiply_add(level[j][v], broadcast(x[j]), sum);
      store(table + 16 * v, sum);
    }
  }

  // Tables of the weights of one word.
  BQNN_INLINE void make_word(const float* x, float* tables) const {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) make(x + g * kWeights, tables + g * kTable);
  }

  static BQNN_INLINE Float look_up(UInt word, const Float* table) {
    if constexpr (kVectors == 1) return (Float)permute<FloatOperand>(word, (UInt)table[0]);
    return (Float)_mm512_permutex2var_ps((__m512)table[0], (__m512i)word, (__m512)table[kVectors - 1]);
  }
};

// Pairs of weights at four levels, as the words of the layout have them.
struct PairSums {
  static constexpr int kGroups = 8, kShift = 4, kVectors = 1, kTable = 16, kWordWeights = 16;
  Float level[2];  // of the first weight of a pair and the second

  explicit PairSums(const PackedLayout& layout) {
    alignas(64) uint32_t levels[kBlock], entry[kTable];
    read_table<FloatOperand>(layout, 0, levels);
    for (int j = 0; j < 2; ++j) {
      for (int i = 0; i < kTable; ++i) entry[i] = levels[i >> (2 * j) & 3];
      level[j] = (Float)load_lanes(entry);
    }
  }

  static int64_t padded(const PackedLayout& layout) { return layout.padded; }

  static CodeStream stream(const PackedLayout& layout, int64_t group, int64_t block) {
    return {reinterpret_cast<const char*>(layout.block(group, block)), layout.block_words() * 4, kBlock * 4};
  }

  BQNN_INLINE void make_word(const float* x, float* tables) const {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      const float* pair = x + g % 4 * 4 + g / 4;  // every half word has every second weight
      store(tables + g * kTable, multiply_add(level[1], broadcast(pair[2]), level[0] * pair[0]));
    }
  }

  static BQNN_INLINE Float look_up(UInt word, const Float* table) {
    return (Float)permute<FloatOperand>(word, (UInt)table[0]);
  }
};

// Adds (or, first, writes) to sums [kRows][kBlocks * 16], rows `stride` apart, what `count` words of kBlocks blocks say;
// at(i) leads from a row's tables to that of group i.
template <class Sums, int kRows, int kBlocks, class At>
BQNN_INLINE void add_sums(CodeStream codes, int64_t ahead, int64_t count, const float* const* tables, const At& at,
                          float* sums, int64_t stride, bool first) {
  Float sum[kRows][kBlocks] = {};
  const float* row[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) row[r] = tables[r];
  for (int64_t w = 0; w < count; ++w, codes.words += codes.word) {
    UInt word[kBlocks];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      word[b] = load_lanes(codes.words + b * codes.block);
      _mm_prefetch(codes.words + b * codes.block + ahead, _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int g = 0; g < Sums::kGroups; ++g) {
      const int64_t offset = at(w * Sums::kGroups + g);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Float table[Sums::kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < Sums::kVectors; ++v) table[v] = load(row[r] + offset + v * 16);
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) {
          sum[r][b] += Sums::look_up(word[b], table);
          __asm__("" : "+v"(sum[r][b]));  // or GCC looks up a whole word's sums, and spills them, before it adds one
        }
      }
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) word[b] >>= Sums::kShift;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      float* to = sums + r * stride + b * kBlock;
      store(to, first ? sum[r][b] : load(to) + sum[r][b]);
    }
}

// How many parts the channels are cut into, so that tasks keep all threads busy.
inline int64_t parts_of_channels(int64_t tasks, int64_t units, int threads) {
  int64_t parts = 1;
  while (parts < units && tasks * parts < 4 * threads && tasks * parts % threads != 0) ++parts;
  return parts;
}

// --- packed_linear ------------------------------------------------------------------------------------------------

// Words whose tables, of kRows rows, are made together.
template <class Sums, int kRows>
constexpr int64_t kSumWords = kTablesRoom / kRows / (Sums::kGroups * Sums::kTable * 4);

template <class Sums, int kRows, int kBlocks>
__attribute__((noinline)) void add_row_sums(CodeStream codes, int64_t ahead, int64_t count, const float* tables,
                                            float* sums, int64_t stride, bool first) {
  const float* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = tables + r * kSumWords<Sums, kRows> * Sums::kGroups * Sums::kTable;
  add_sums<Sums, kRows, kBlocks>(codes, ahead, count, row, [](int64_t i) { return i * Sums::kTable; }, sums, stride,
                                 first);
}

template <class Sums, int kRows, class X>
__attribute__((noinline)) void run_sums_of(const LinearCall& call, const Parallel& parallel) {
  constexpr int kBlocks = kRows <= 2 ? 8 : 4;
  constexpr int64_t kWords = kSumWords<Sums, kRows>, kRow = kWords * Sums::kGroups * Sums::kTable;
  const PackedLayout& layout = *call.weight;
  const int64_t padded = Sums::padded(layout), words = padded / Sums::kWordWeights;
  const int64_t row_groups = ceil_div(call.rows, kRows), units = ceil_div(layout.blocks, kSumUnit);
  const int64_t parts = parts_of_channels(row_groups, units, parallel.threads);
  const int64_t most = ceil_div(units, parts) * kSumUnit * kBlock;  // channels of a part
  const int64_t work = kRows * most * layout.columns;
  parallel_for(parallel, row_groups * parts, 1 + kTaskWork / work, [&](int64_t begin, int64_t end) {
    const Sums of(layout);
    auto* x = reinterpret_cast<float*>(scratch(Scratch::activations, static_cast<size_t>(kRows * padded) * 4));
    auto* tables = reinterpret_cast<float*>(scratch(Scratch::tables, kRows * kRow * 4));
    auto* sums = reinterpret_cast<float*>(scratch(Scratch::products, static_cast<size_t>(kRows * most) * 4));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / parts * kRows, part = task % parts;
      const int64_t count = call.rows - row < kRows ? call.rows - row : kRows;
      const int64_t first_block = units * part / parts * kSumUnit, next = units * (part + 1) / parts * kSumUnit;
      const int64_t last_block = next < layout.blocks ? next : layout.blocks;
      for (int64_t r = 0; r < count; ++r) {
        float* to = x + r * padded;
        pack_row<FloatOperand>(static_cast<const X*>(call.x) + (row + r) * layout.columns, layout.columns, false,
                               RowScale{}, to);
        for (int64_t k = layout.columns; k < padded; ++k) to[k] = 0.0f;
      }
      for (int64_t word = 0; word < words; word += kWords) {
        const int64_t here = words - word < kWords ? words - word : kWords;
        for (int64_t r = 0; r < count; ++r)
          for (int64_t w = 0; w < here; ++w)
            of.make_word(x + r * padded + (word + w) * Sums::kWordWeights,
                         tables + r * kRow + w * Sums::kGroups * Sums::kTable);
        for_blocks<kBlocks>(first_block, last_block, [&](int64_t block, auto blocks) {
          CodeStream codes = Sums::stream(layout, 0, block);
          const int64_t ahead = Sums::stream(layout, 0, block + blocks.value).words - codes.words;
          codes.words += word * codes.word;
          add_row_sums<Sums, kRows, blocks.value>(codes, ahead, here, tables, sums + (block - first_block) * kBlock,
                                                  most, word == 0);
        });
      }
      const int64_t channel = first_block * kBlock, width = last_block * kBlock - channel;
      const int64_t left = layout.channels - channel;
      const Epilogue strip = epilogue<FloatOperand>(call, 0, first_block);
      for (int64_t r = 0; r < count; ++r)
        finish_row<FloatOperand>(sums + r * most, width < left ? width : left, strip, 0.0f,
                                 static_cast<X*>(call.y) + (row + r) * layout.channels + channel);
    }
  });
}

template <class Sums, class X>
inline bool run_sums_with(const LinearCall& call, const Parallel& parallel) {
  const auto run = call.rows == 1   ? run_sums_of<Sums, 1, X>
                   : call.rows == 2 ? run_sums_of<Sums, 2, X>
                                    : run_sums_of<Sums, kSumRows, X>;
  run(call, parallel);
  return true;
}

// Whether this was a call that sums suit, and all of y is written.
template <class X>
inline bool run_sums(const LinearCall& call, const Parallel& parallel) {
  const PackedLayout& layout = *call.weight;
  const bool few = call.rows <= kFewRows;
  if (call.rows == 0 || layout.precision != Precision::fp32 || layout.codebooks > 1) return false;
  if (layout.numbers != 0 && (few || layout.blocks >= kLeastSumBlocks))
    return (layout.num_levels == 2 ? run_sums_with<NumberSums<2>, X> : run_sums_with<NumberSums<3>, X>)(call, parallel);
  // Two weights a permute: no faster than FMA where it shares its port with the additions, but nothing is decoded.
  return few && layout.bits == 2 && run_sums_with<PairSums, X>(call, parallel);
}

// --- packed_conv2d ------------------------------------------------------------------------------------------------

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

// Tables of groups [first, first + t.groups) of the inputs, zeros beyond the last, of height * width pixels of the copy.
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
