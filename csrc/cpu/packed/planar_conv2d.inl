// packed_conv2d with few output channels: lanes are pixels of a row and weights are broadcast, so that 12 channels, or
// one of a depthwise layer, leave no lanes of a block empty.

constexpr int kRegisters = BQNN_LANES == 16 ? 32 : 16;
constexpr int kMostChannels = BQNN_LANES == 16 ? 12 : 6;  // channels that are multiplied together at most
constexpr int kMostRuns = 8;                              // runs of pixels that are multiplied together at most
constexpr int kRunRoom = kMostRuns * kLanes;              // products that a channel has of these runs
// Lanes of K added up in one sum: a float's error grows with the number of terms, and beyond some it is no integer.
constexpr int64_t kLanesOfSum = 2 * kChunk;
static_assert(kLanesOfSum * 127 * 127 <= 1 << 24, "floats are not all the integers");

// Vectors of pixels whose sums for so many channels fit the registers, beside the pixels themselves and a weight.
constexpr int planar_vectors(int channels) {
  const int fit = (kRegisters - 1) / (channels + 1);
  return fit < kMostRuns ? fit : kMostRuns;
}

// Some pixels of an output row: the first, counted through an image, and how many.
struct PixelRun {
  int64_t pixel;
  int lanes;
};

// Products [kChannels][kRunRoom] of kChannels channels and a few runs of pixels. weight [lanes][kBlock], from the first
// of the channels on; offset [lanes] leads from a run to what a lane of K multiplies.
template <class Op, int kChannels, int kVectors>
__attribute__((noinline)) void multiply_runs(const uint32_t* const* runs, const int64_t* offset,
                                             const uint32_t* weight, int64_t lanes, typename Op::Product* products) {
  const uint32_t* x[kVectors];
  BQNN_UNROLL(8) for (int v = 0; v < kVectors; ++v) x[v] = runs[v];
  for (int64_t first = 0; first < lanes; first += kLanesOfSum) {
    const int64_t end = smaller(lanes, first + kLanesOfSum);
    typename Op::Sum sum[kChannels][kVectors] = {};
    for (int64_t k = first; k < end; ++k, weight += kBlock) {
      UInt pixels[kVectors];
      BQNN_UNROLL(8) for (int v = 0; v < kVectors; ++v) pixels[v] = load_lanes(x[v] + offset[k]);
      BQNN_UNROLL(12) for (int c = 0; c < kChannels; ++c) {
        const UInt w = weight[c] - UInt{};
        BQNN_UNROLL(8) for (int v = 0; v < kVectors; ++v) sum[c][v] = Op::dot(pixels[v], w, sum[c][v]);
      }
    }
    BQNN_UNROLL(12) for (int c = 0; c < kChannels; ++c)
      BQNN_UNROLL(8) for (int v = 0; v < kVectors; ++v) {
        typename Op::Product* to = products + c * kRunRoom + v * kLanes;
        const UInt product = Op::add(first > 0 ? load_lanes(to) : UInt{}, sum[c][v]);
        __builtin_memcpy(to, &product, sizeof product);
      }
  }
}

// The kernels of some channels: of as many runs as fit the registers, and of one.
template <class Op>
struct PlanarKernel {
  decltype(&multiply_runs<Op, 1, 1>) many, one;
  int64_t channels, vectors;

  // Whether so many runs take less time one by one: sums wait for the one before, four cycles.
  bool one_by_one(int64_t runs) const { return runs * (channels < 4 ? 4 : channels) < channels * vectors; }
};

template <class Op, int kChannels = kMostChannels>
inline PlanarKernel<Op> planar_kernel(int64_t channels) {
  if constexpr (kChannels > 1)
    if (channels < kChannels) return planar_kernel<Op, kChannels - 1>(channels);
  constexpr int kVectors = planar_vectors(kChannels);
  return {&multiply_runs<Op, kChannels, kVectors>, &multiply_runs<Op, kChannels, 1>, kChannels, kVectors};
}

// The weights of a group, [unit][r][s][kBlock] lanes.
template <class Op>
inline void decode_units(const PackedLayout& layout, int64_t group, uint32_t* weight) {
  constexpr unsigned kBits = 32 / Op::kUnit, kMask = 0xFFFFFFFFu >> (32 - kBits);
  Codebook book;
  read_codebook<Op>(layout, {layout.level_table()}, group, 0, &book);
  const int64_t padded = layout.segments * layout.padded, taps = layout.taps();
  auto* panel = room<uint32_t>(Scratch::panel, padded / Op::kUnit * kBlock);
  decode<Op>(layout, book, layout.block(group, 0), padded, panel, kBlock);
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t input = 0; input < layout.inputs; ++input) {
      const int64_t at = tap * layout.inputs + input, from = at / layout.segment * layout.padded + at % layout.segment;
      const uint32_t* lane = panel + from / Op::kUnit * kBlock;
      uint32_t* to = weight + (input / Op::kUnit * taps + tap) * kBlock;
      const unsigned down = from % Op::kUnit * kBits, up = input % Op::kUnit * kBits;
      for (int i = 0; i < kBlock; i += kLanes) {
        UInt value = (load_lanes(lane + i) >> down & kMask) << up;
        if (up > 0) value |= load_lanes(to + i);
        __builtin_memcpy(to + i, &value, sizeof value);
      }
    }
}

// Writes the outputs of a group's channels at some runs of pixels.
template <class Op>
inline void finish_runs(const PackedCall& call, const typename Op::Product* products, const PixelRun* runs,
                        int64_t vectors, int64_t image, int64_t group, float scale) {
  const int64_t count = call.weight->group_channels, size = call.out_height * call.out_width;
  const Epilogue channels = epilogue<Op>(call, group, 0);
  with_elements(call.y, [&](auto* y) {
    y += image * call.y.image_stride;
    if (call.y.format == Format::contiguous) {
      for (int64_t c = 0; c < count; ++c) {
        const Finish<Op> finish(channels, c);
        auto* plane = y + (group * count + c) * size;
        BQNN_UNROLL(2) for (int64_t v = 0; v < vectors; ++v)
          store_numbers(plane + runs[v].pixel, finish(load_lanes(products + c * kRunRoom + v * kLanes), scale),
                        runs[v].lanes);
      }
      return;
    }
    for (int64_t c = 0; c < count; c += kLanes) {
      const int lanes = lanes_left(count - c);
      const Finish<Op> finish(channels, c, lanes);
      for (int64_t v = 0; v < vectors; ++v) {
        UInt square[kLanes];
        BQNN_UNROLL(16) for (int i = 0; i < kLanes; ++i)
          square[i] = load_lanes(products + (c + (i < lanes ? i : 0)) * kRunRoom + v * kLanes);
        transpose(square);
        auto* to = y + runs[v].pixel * call.y.pixel_stride + group * count + c;
        BQNN_UNROLL(16) for (int i = 0; i < kLanes; ++i)
          if (i < runs[v].lanes) store_numbers(to + i * call.y.pixel_stride, finish(square[i], scale), lanes);
      }
    }
  });
}

// Brings the lines of contiguous outputs towards the core before they are written.
inline void fetch_outputs(const PackedCall& call, const PixelRun* runs, int64_t vectors, int64_t image,
                          int64_t channel, int64_t channels) {
  if (call.y.format != Format::contiguous) return;
  const int64_t size = call.out_height * call.out_width;
  with_elements(call.y, [&](auto* y) {
    y += image * call.y.image_stride + channel * size;
    for (int64_t i = 0; i < channels; ++i)
      for (int64_t v = 0; v < vectors; ++v) __builtin_prefetch(y + i * size + runs[v].pixel, 1);
  });
}

// Output rows [row, last_row) of a group of an image, whose planes begin at `from`.
template <class Op>
inline void multiply_rows(const PackedCall& call, const PlanarPlan& plan, const uint32_t* from, const int64_t* offset,
                          const uint32_t* weight, int64_t image, int64_t group, int64_t row, int64_t last_row,
                          float scale, Ahead* ahead) {
  const int64_t count = call.weight->group_channels, lanes = plan.units * call.weight->taps();
  const int64_t together = ceil_div(count, ceil_div(count, kMostChannels)), across = ceil_div(call.out_width, kLanes);
  const int64_t last = (last_row - row) * across;
  const PlanarKernel<Op> multiply = planar_kernel<Op>(together);
  auto* products = room<typename Op::Product>(Scratch::products, kBlock * kRunRoom);
  for (int64_t first = 0; first < last;) {
    const bool one = multiply.one_by_one(last - first);
    const int64_t vectors = one ? 1 : multiply.vectors;
    PixelRun runs[kMostRuns];
    const uint32_t* at[kMostRuns];
    for (int64_t i = 0; i < vectors; ++i) {
      const int64_t of = first + i < last ? first + i : first, h = row + of / across, w = of % across * kLanes;
      runs[i] = {h * call.out_width + w, first + i < last ? lanes_left(call.out_width - w) : 0};
      at[i] = from + h * call.stride_h * plan.row + w;
    }
    for (int64_t c = 0; c < count; c += together) {
      const int64_t channel = smaller(c, count - together);  // the last ones, some perhaps again
      ahead->fetch();
      fetch_outputs(call, runs, vectors, image, group * count + channel, together);
      (one ? multiply.one : multiply.many)(at, offset, weight + channel, lanes, products + channel * kRunRoom);
    }
    finish_runs<Op>(call, products, runs, vectors, image, group, scale);
    first += vectors;
  }
}

template <class Op>
void run_planar_conv2d(const PackedCall& call, const Parallel& parallel) {
  const PackedLayout& layout = *call.weight;
  const int64_t groups = layout.groups, taps = layout.taps(), out_height = call.out_height;
  const int64_t outputs = layout.channels * out_height * call.out_width;
  if (call.images == 0 || outputs == 0) return;
  const PlanarPlan plan = plan_planes<Op>(call);
  const int64_t lanes = plan.units * taps;
  auto* offset = room<int64_t>(Scratch::offsets, lanes);
  for (int64_t k = 0; k < lanes; ++k)
    offset[k] = k / taps * plan.plane + k % taps / layout.kernel_w * call.dilation_h * plan.row +
                k % layout.kernel_w * layout.dilation_w;
  // An image takes this many multiplications or more.
  const int64_t fetches = ceil_div(layout.channels, kMostChannels) * (out_height * call.out_width / kRunRoom + 1);

  // Copies the images [begin, end) a wave at a time, then multiplies bands of their rows. A thread that is alone
  // fetches the images of the next wave meanwhile.
  const auto run_images = [&](const Parallel& threads, int64_t begin, int64_t end, int64_t wave, bool alone) {
    auto* planes = room<uint32_t>(Scratch::activations, wave * plan.image + 2 * kBlock);
    auto* scales = room<RowScale>(Scratch::scales, wave);
    int64_t kept = -1;  // the group whose weights this thread has decoded before
    for (int64_t first = begin; first < end; first += wave) {
      const int64_t images = smaller(end - first, wave);
      pack_planes<Op>(call, plan, threads, first, images, first == begin, scales, planes);
      const int64_t bands = alone ? 1 : smaller(ceil_div(4 * threads.threads, images * groups), out_height);
      const int64_t work = outputs / groups / bands * layout.columns, next = smaller(end - first - images, wave);
      parallel_for(threads, groups * images * bands, 1 + kTaskWork / (1 + work), [&](int64_t task, int64_t last_task) {
        auto* weight = room<uint32_t>(Scratch::tables, lanes * kBlock);
        int64_t decoded = alone ? kept : -1;
        Ahead ahead = alone ? ahead_of(call, first + images, next, fetches) : Ahead{};
        for (; task < last_task; ++task) {
          const int64_t band = task % bands, image = task / bands % images, group = task / bands / images;
          if (group != decoded) decode_units<Op>(layout, group, weight);
          decoded = group;
          multiply_rows<Op>(call, plan, planes + image * plan.image + group * plan.units * plan.plane, offset, weight,
                            first + image, group, out_height * band / bands, out_height * (band + 1) / bands,
                            Op::kInt8 ? scales[image].scale : 1.0f, &ahead);
        }
        if (alone) kept = decoded;
      });
    }
  };

  if (groups > 1 || !images_for_all(call.images, parallel.threads)) {
    const int64_t wave = images_of_wave(call, plan.image * 4, parallel.threads);
    return run_images(parallel, 0, call.images, wave, false);
  }
  // Each thread takes images whole, one after the other.
  parallel_for(parallel, call.images, 1 + kTaskWork / (outputs * layout.columns),
               [&](int64_t begin, int64_t end) { run_images({nullptr, 1}, begin, end, 1, true); });
}
