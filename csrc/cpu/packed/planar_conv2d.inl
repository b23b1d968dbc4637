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
  return static_cast<int>(smaller((kRegisters - 1) / (channels + 1), kMostRuns));
}

// Some pixels of an output row: the first, counted through an image, and how many.
struct PixelRun {
  int64_t pixel;
  int lanes;
};

// Outputs of some channels of a group at some runs of pixels, a plane a channel: they are made of sums in the registers.
template <class Op, class Y>
struct Planes {
  static constexpr bool kWrites = true;
  Epilogue channels;
  int64_t first, size;
  const PixelRun* runs;
  float scale;
  Y* plane;
  bool whole = true;  // whether each run is a whole vector

  // Also brings the lines of the outputs towards the core.
  Planes(const PackedCall& call, int64_t image, int64_t group, int64_t channel, int64_t count, const PixelRun* of,
         int64_t vectors, float of_image)
      : channels(epilogue<Op>(call, group, 0)), first(channel), runs(of), scale(of_image) {
    size = call.out_height * call.out_width;
    plane = static_cast<Y*>(call.y.data) + call.y.offset + image * call.y.image_stride +
            (group * call.weight->group_channels + channel) * size;
    for (int64_t v = 0; v < vectors; ++v) {
      whole &= runs[v].lanes == kLanes;
      for (int64_t c = 0; c < count; ++c) __builtin_prefetch(plane + c * size + runs[v].pixel, 1);
    }
  }
  BQNN_INLINE void write(int64_t c, int64_t v, UInt product, int lanes) const {
    store_numbers(plane + c * size + runs[v].pixel, Finish<Op>(channels, first + c)(product, scale), lanes);
  }
};

// Sums of channels-last outputs are kept until they are transposed.
struct Kept {
  static constexpr bool kWrites = false;
  template <class... Of>
  explicit Kept(const Of&...) {}
};

// Products of kChannels channels and a few runs of pixels. weight [lanes][kBlock], from the first of the channels on;
// offset [lanes] leads from a run to what a lane of K multiplies; sums [kChannels][kRunRoom] has room for those kept.
template <class Op, class Out, int kChannels, int kVectors>
__attribute__((noinline)) void multiply_runs(const uint32_t* const* runs, const int64_t* offset,
                                             const uint32_t* weight, int64_t lanes, typename Op::Product* sums,
                                             const Out& out) {
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
    const auto each = [&](const auto& f) BQNN_LAMBDA {
      BQNN_UNROLL(8) for (int v = 0; v < kVectors; ++v)
        BQNN_UNROLL(12) for (int c = 0; c < kChannels; ++c) {
          auto* kept = sums + c * kRunRoom + v * kLanes;
          f(c, v, kept, Op::add(first > 0 ? load_lanes(kept) : UInt{}, sum[c][v]));
        }
    };
    if constexpr (Out::kWrites)
      if (end == lanes && out.whole)
        return each([&](int c, int v, auto*, UInt product) BQNN_LAMBDA { out.write(c, v, product, kLanes); });
    each([&](int, int, auto* kept, UInt product) BQNN_LAMBDA { __builtin_memcpy(kept, &product, sizeof product); });
  }
  if constexpr (Out::kWrites)
    for (int64_t c = 0; c < kChannels; ++c)
      for (int64_t v = 0; v < kVectors; ++v)
        out.write(c, v, load_lanes(sums + c * kRunRoom + v * kLanes), out.runs[v].lanes);
}

// The kernels of some channels: of as many runs as fit the registers, and of one.
template <class Op, class Out>
struct PlanarKernel {
  decltype(&multiply_runs<Op, Out, 1, 1>) many, one;
  int64_t channels, vectors;

  // Whether so many runs take less time one by one: sums wait for the one before, four cycles.
  bool one_by_one(int64_t runs) const { return runs * (channels < 4 ? 4 : channels) < channels * vectors; }
};

template <class Op, class Out, int kChannels = kMostChannels>
inline PlanarKernel<Op, Out> planar_kernel(int64_t channels) {
  if constexpr (kChannels > 1)
    if (channels < kChannels) return planar_kernel<Op, Out, kChannels - 1>(channels);
  constexpr int kVectors = planar_vectors(kChannels);
  return {&multiply_runs<Op, Out, kChannels, kVectors>, &multiply_runs<Op, Out, kChannels, 1>, kChannels, kVectors};
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

// Writes the channels-last outputs of a group at some runs of pixels.
template <class Op>
inline void finish_runs(const PackedCall& call, const typename Op::Product* sums, const PixelRun* runs, int64_t vectors,
                        int64_t image, int64_t group, float scale) {
  const int64_t count = call.weight->group_channels, pitch = call.y.pixel_stride;
  const Epilogue channels = epilogue<Op>(call, group, 0);
  with_elements(call.y, [&](auto* y) {
    y += image * call.y.image_stride + group * count;
    for (int64_t c = 0; c < count; c += kLanes) {
      const int lanes = lanes_left(count - c);
      const Finish<Op> finish(channels, c, lanes);
      for (int64_t v = 0; v < vectors; ++v) {
        UInt square[kLanes];
        BQNN_UNROLL(16) for (int i = 0; i < kLanes; ++i)
          square[i] = load_lanes(sums + (c + (i < lanes ? i : 0)) * kRunRoom + v * kLanes);
        transpose(square);
        auto* to = y + runs[v].pixel * pitch + c;
        BQNN_UNROLL(16) for (int i = 0; i < kLanes; ++i)
          if (i < runs[v].lanes) store_numbers(to + i * pitch, finish(square[i], scale), lanes);
      }
    }
  });
}

// Output rows [row, last_row) of a group of an image, whose planes begin at `from`.
template <class Op, class Out>
inline void multiply_rows(const PackedCall& call, const PlanarPlan& plan, const uint32_t* from, const int64_t* offset,
                          const uint32_t* weight, int64_t image, int64_t group, int64_t row, int64_t last_row,
                          float scale, Ahead* ahead) {
  const int64_t count = call.weight->group_channels, lanes = plan.units * call.weight->taps();
  const int64_t together = ceil_div(count, ceil_div(count, kMostChannels)), across = ceil_div(call.out_width, kLanes);
  const int64_t last = (last_row - row) * across;
  const PlanarKernel<Op, Out> multiply = planar_kernel<Op, Out>(together);
  auto* sums = room<typename Op::Product>(Scratch::products, kBlock * kRunRoom);
  for (int64_t first = 0, vectors; first < last; first += vectors) {
    const bool one = multiply.one_by_one(last - first);
    vectors = one ? 1 : multiply.vectors;
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
      const Out out(call, image, group, channel, together, runs, vectors, scale);
      (one ? multiply.one : multiply.many)(at, offset, weight + channel, lanes, sums + channel * kRunRoom, out);
    }
    if constexpr (!Out::kWrites) finish_runs<Op>(call, sums, runs, vectors, image, group, scale);
  }
}

template <class Op>
void run_planar_conv2d(const PackedCall& call, const Parallel& parallel) {
  const PackedLayout& layout = *call.weight;
  const int64_t groups = layout.groups, taps = layout.taps(), out_height = call.out_height;
  const int64_t outputs = layout.channels * out_height * call.out_width;
  if (call.images == 0 || outputs == 0) return;
  const PlanarPlan plan = plan_planes<Op>(call);
  const auto multiply = call.y.format == Format::channels_last ? &multiply_rows<Op, Kept>
                        : call.y.dtype == Dtype::bfloat16      ? &multiply_rows<Op, Planes<Op, Bfloat16>>
                                                               : &multiply_rows<Op, Planes<Op, float>>;
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
        int64_t own = -1, &decoded = alone ? kept : own;
        Ahead ahead = alone ? ahead_of(call, first + images, next, fetches) : Ahead{};
        for (; task < last_task; ++task) {
          const int64_t band = task % bands, image = task / bands % images, group = task / bands / images;
          if (group != decoded) decode_units<Op>(layout, group, weight);
          decoded = group;
          multiply(call, plan, planes + image * plan.image + group * plan.units * plan.plane, offset, weight,
                   first + image, group, out_height * band / bands, out_height * (band + 1) / bands,
                   Op::kInt8 ? scales[image].scale : 1.0f, &ahead);
        }
      });
    }
  };

  if (groups > 1 || !images_for_all(call.images, parallel.threads))
    return run_images(parallel, 0, call.images, images_of_wave(call, plan.image * 4, parallel.threads), false);
  // Each thread takes images whole, one after the other.
  parallel_for(parallel, call.images, 1 + kTaskWork / (outputs * layout.columns),
               [&](int64_t begin, int64_t end) { run_images({nullptr, 1}, begin, end, 1, true); });
}
