// packed_conv2d with few output channels: lanes are pixels of a row and weights are broadcast, so that 12 channels, or
// one of a depthwise layer, leave no lanes of a block empty. Works on a zero-padded copy of each image, a plane for
// every kUnit inputs, of which a lane holds those of one pixel.
//
// Included inside the namespace of a translation unit that has set the target, after panel_conv2d.inl.
#pragma once

constexpr int kRegisters = BQNN_LANES == 16 ? 32 : 16;
constexpr int kMostChannels = BQNN_LANES == 16 ? 12 : 6;  // that are multiplied together
constexpr int kMostRuns = 8;                              // of pixels, likewise
constexpr int kRunRoom = kMostRuns * kLanes;              // products of a channel
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

// What becomes of the products of some channels and a few runs of pixels: they are kept in a room,
// [channels][kRunRoom].
template <class Op>
struct KeepProducts {
  static constexpr bool kWrites = false;

  template <int kChannels, int kVectors>
  BQNN_INLINE void operator()(const UInt (&product)[kChannels][kVectors], typename Op::Product* room) const {
#pragma GCC unroll 12
    for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) __builtin_memcpy(room + c * kRunRoom + v * kLanes, &product[c][v], sizeof(UInt));
  }
};

// Or they are made outputs, a plane a channel, in the registers where all runs are whole vectors.
template <class Op, class Y>
struct WritePlanes {
  static constexpr bool kWrites = true;
  Epilogue channels;
  int64_t first;  // of the epilogue's channels
  float scale;
  const PixelRun* runs;
  bool whole;
  Y* plane;
  int64_t size;  // of a plane

  template <int kChannels, int kVectors>
  BQNN_INLINE void operator()(const UInt (&product)[kChannels][kVectors], typename Op::Product* room) const {
    if (whole) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 12
        for (int c = 0; c < kChannels; ++c)
          store_outputs(plane + c * size + runs[v].pixel, Finish<Op>(channels, first + c)(product[c][v], scale), kLanes);
      return;
    }
    KeepProducts<Op>{}(product, room);
    for (int c = 0; c < kChannels; ++c) {
      const Finish<Op> finish(channels, first + c);
      for (int v = 0; v < kVectors; ++v)
        store_outputs(plane + c * size + runs[v].pixel, finish(load_lanes(room + c * kRunRoom + v * kLanes), scale),
                      runs[v].lanes);
    }
  }
};

// Products of kChannels channels and a few runs of pixels. weight [lanes][kBlock], from the first of the channels on;
// offset [lanes] leads from a run to what a lane of K multiplies; room is for sums that are not whole yet.
template <class Op, class Out, int kChannels, int kVectors>
__attribute__((noinline)) void multiply_runs(const uint32_t* const* runs, const int64_t* offset,
                                             const uint32_t* weight, int64_t lanes, typename Op::Product* room,
                                             const Out& out) {
  const uint32_t* x[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) x[v] = runs[v];
  UInt product[kChannels][kVectors];
  for (int64_t first = 0; first < lanes; first += kLanesOfSum) {
    const int64_t end = lanes - first < kLanesOfSum ? lanes : first + kLanesOfSum;
    typename Op::Sum sum[kChannels][kVectors] = {};
    for (int64_t k = first; k < end; ++k, weight += kBlock) {
      UInt pixels[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) pixels[v] = load_lanes(x[v] + offset[k]);
#pragma GCC unroll 12
      for (int c = 0; c < kChannels; ++c) {
        const UInt w = weight[c] - UInt{};
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[c][v] = Op::dot(pixels[v], w, sum[c][v]);
      }
    }
#pragma GCC unroll 12
    for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        product[c][v] = Op::add(first > 0 ? load_lanes(room + c * kRunRoom + v * kLanes) : UInt{}, sum[c][v]);
    if (end < lanes) KeepProducts<Op>{}(product, room);
  }
  out(product, room);
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

// Where things stand in the copy: [image][group][unit][height][width], in lanes.
struct PlanarPlan {
  int64_t units;  // of the inputs of a group
  int64_t row, plane, image;
  int64_t wave;  // images that are copied and multiplied together
};

template <class Op>
inline int64_t units_of(const PackedLayout& layout) {
  return ceil_div(layout.inputs, Op::kUnit);
}

template <class Op>
inline PlanarPlan plan_planes(const Conv2dCall& call, int threads) {
  const PackedLayout& layout = *call.weight;
  PlanarPlan p;
  p.units = units_of<Op>(layout);
  p.row = call.width + 2 * call.padding_w;
  p.plane = (call.height + 2 * call.padding_h) * p.row;
  if (p.plane % 256 == 0) p.plane += kBlock;  // planes would meet in a few sets of the caches
  p.image = p.units * layout.groups * p.plane;
  p.wave = images_of_wave(call, p.image * 4, threads);
  return p;
}

// A lane of inputs that are 0.
template <class Op>
inline uint32_t zero_lane() {
  const auto zero = static_cast<typename Op::Element>(Op::kZero);
  uint32_t lane = 0;
  for (int j = 0; j < Op::kUnit; ++j)
    __builtin_memcpy(reinterpret_cast<char*>(&lane) + j * sizeof zero, &zero, sizeof zero);
  return lane;
}

// Rows of pixels whose kUnit inputs, of which there are `inputs`, are a plane each; in the copy they are `row` apart.
template <class Op, class X>
__attribute__((noinline)) void join_planes(const X* from, int64_t height, int64_t width, unsigned inputs, bool bf16,
                                           const RowScale& scale, uint32_t* to, int64_t row) {
  const int64_t plane = height * width;
  const auto join = [&](const X* x, uint32_t* lanes, int count) __attribute__((always_inline)) {
    UInt lane = {};
#pragma GCC unroll 4
    for (unsigned j = 0; j < Op::kUnit; ++j)
      if (j < inputs) {
        const unsigned up = j * (32 / Op::kUnit);
        const UInt bits = operand_bits<Op>(rounded<Op>(load_activations(x + j * plane, count), bf16, scale));
        lane = (lane & ((1u << up) - 1)) | bits << up;
      }
    store_first(reinterpret_cast<float*>(lanes), (Float)(lane ^ zero_lane<Op>()), count);
  };
  for (int64_t h = 0; h < height; ++h, from += width, to += row) {
    int64_t w = 0;
    for (; w + kLanes <= width; w += kLanes) join(from + w, to + w, kLanes);
    if (w < width) join(from + w, to + w, static_cast<int>(width - w));
  }
}

// From pixels of kUnits lanes, one after the other, to rows of them.
template <int kUnits>
__attribute__((noinline)) void part_lanes(const char* line, int64_t width, uint32_t* to, int64_t plane) {
  UInt index = {};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) index[i] = static_cast<uint32_t>(i * kUnits);
  for (int64_t w = 0; w < width; w += kLanes, line += kLanes * kUnits * 4) {
    UInt v[4];
#pragma GCC unroll 4
    for (int i = 0; i < kUnits; ++i) v[i] = load_lanes(line + i * kLanes * 4);
#pragma GCC unroll 4
    for (unsigned u = 0; u < kUnits; ++u) {
      UInt pixels = __builtin_shuffle(v[0], v[kUnits > 1], index + u);
      if constexpr (kUnits > 2)
        pixels = (UInt)select((Mask)(index + u < 2 * kLanes), (Int)pixels,
                              (Int)__builtin_shuffle(v[2], v[kUnits - 1], index + u));
      store_first(reinterpret_cast<float*>(to + u * plane + w), (Float)pixels, lanes_left(width - w));
    }
  }
}

// From pixels `pixel` bytes apart to rows of their lanes.
__attribute__((noinline)) inline void part_pixels(const char* line, int64_t pixel, int64_t width, int64_t units,
                                                  uint32_t* to, int64_t plane) {
  if (pixel == units * 4) {
    if (units == 1) return part_lanes<1>(line, width, to, plane);
    if (units == 2) return part_lanes<2>(line, width, to, plane);
    if (units == 4) return part_lanes<4>(line, width, to, plane);
  }
  for (int64_t w = 0; w < width; w += kLanes) {
    const int pixels = lanes_left(width - w);
    for (int64_t u = 0; u < units; u += kLanes) {
      UInt v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) v[i] = load_lanes(line + (w + (i < pixels ? i : 0)) * pixel + u * 4);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (u + i < units) store_first(reinterpret_cast<float*>(to + (u + i) * plane + w), (Float)v[i], pixels);
    }
  }
}

template <class Op>
inline void fill_lanes(uint32_t* to, int64_t count) {
  fill(reinterpret_cast<char*>(to), reinterpret_cast<char*>(to + count), zero_lane<Op>());
}

// Copies one plane of an image that is contiguous; `fresh`, its border too.
template <class Op, class X>
inline void pack_plane(const Conv2dCall& call, const PlanarPlan& plan, const X* image, int64_t index,
                       const RowScale& scale, bool fresh, uint32_t* to) {
  const PackedLayout& layout = *call.weight;
  const int64_t first = index % plan.units * Op::kUnit, left = layout.inputs - first;
  const auto inputs = static_cast<unsigned>(left < Op::kUnit ? left : Op::kUnit);
  const int64_t size = call.height * call.width;
  const X* from = image + (index / plan.units * layout.inputs + first) * size;
  to += index * plan.plane;
  if (fresh && call.padding_h + call.padding_w > 0) fill_lanes<Op>(to, plan.plane);
  to += call.padding_h * plan.row + call.padding_w;
  join_planes<Op>(from, call.height, call.width, inputs, layout.precision == Precision::bf16, scale, to, plan.row);
}

// Copies row h, counted with the border, of one group of an image that is channels-last; `fresh`, the border too.
template <class Op, class X>
inline void pack_planar_row(const Conv2dCall& call, const PlanarPlan& plan, const X* image, int64_t group, int64_t h,
                            const RowScale& scale, bool fresh, uint32_t* to) {
  using Element = typename Op::Element;
  const int64_t left = call.padding_w, end = left + call.width;
  const bool border = h < call.padding_h || h >= call.padding_h + call.height;
  to += group * plan.units * plan.plane + h * plan.row;
  for (int64_t u = 0; fresh && u < plan.units; ++u) {
    uint32_t* row = to + u * plan.plane;
    fill_lanes<Op>(row, border ? plan.row : left);
    if (!border) fill_lanes<Op>(row + end, left);
  }
  if (border) return;
  const int64_t pixel = call.weight->inputs * static_cast<int64_t>(sizeof(Element));
  char* line = scratch(Scratch::panel, static_cast<size_t>(call.width * pixel + 64));
  pack_pixels<Op>(call, image, group, h - call.padding_h, scale, reinterpret_cast<Element*>(line));
  part_pixels(line, pixel, call.width, plan.units, to + left, plan.plane);
}

// `fresh`: the memory does not hold the borders yet, which are the same for all images.
template <class Op, class X>
inline void pack_planes(const Conv2dCall& call, const PlanarPlan& plan, const Parallel& parallel, const X* x,
                        int64_t images, bool fresh, RowScale* scales, uint32_t* planes) {
  const int64_t groups = call.weight->groups, size = call.weight->inputs * groups * call.height * call.width;
  const int64_t rows = call.height + 2 * call.padding_h, parts = groups * (call.channels_last ? rows : plan.units);
  pack_images<Op>(parallel, x, images, size, parts, scales, [&](int64_t image, int64_t i) {
    const RowScale scale = Op::kInt8 ? scales[image] : RowScale{};
    uint32_t* to = planes + image * plan.image;
    const X* from = x + image * size;
    if (call.channels_last) return pack_planar_row<Op>(call, plan, from, i / rows, i % rows, scale, fresh, to);
    pack_plane<Op>(call, plan, from, i, scale, fresh, to);
  });
}

// The weights of a group, [unit][r][s][kBlock] lanes.
template <class Op>
inline void decode_units(const PackedLayout& layout, int64_t group, uint32_t* weight) {
  constexpr unsigned kBits = 32 / Op::kUnit, kMask = 0xFFFFFFFFu >> (32 - kBits);
  Codebook book;
  read_codebook<Op>(layout, group, 0, &book);
  const int64_t padded = layout.segments * layout.padded, taps = layout.taps();
  auto* panel =
      reinterpret_cast<uint32_t*>(scratch(Scratch::panel, static_cast<size_t>(padded / Op::kUnit * kBlock) * 4));
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

// Writes the outputs of `count` channels from `channel` on, those of a pixel side by side.
template <class Op, class Y>
inline void finish_runs(const Conv2dCall& call, const typename Op::Product* products, const PixelRun* runs,
                        int64_t vectors, int64_t channel, int64_t count, const Epilogue& channels, float scale,
                        Y* image) {
  const int64_t all = call.weight->channels;
  for (int64_t c = 0; c < count; c += kLanes) {
    const int lanes = lanes_left(count - c);
    const Finish<Op> finish(channels, c, lanes);
    for (int64_t v = 0; v < vectors; ++v) {
      UInt square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        square[i] = load_lanes(products + (c + (i < lanes ? i : 0)) * kRunRoom + v * kLanes);
      transpose(square);
      Y* to = image + runs[v].pixel * all + channel + c;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (i < runs[v].lanes) store_outputs(to + i * all, finish(square[i], scale), lanes);
    }
  }
}

// Output rows [row, last_row) of a group of an image, of which `from` is the first plane.
template <class Op, class Out, class Y>
inline void multiply_rows(const Conv2dCall& call, const PlanarPlan& plan, const uint32_t* from, const int64_t* offset,
                          const uint32_t* weight, int64_t group, int64_t row, int64_t last_row, float scale, Y* image,
                          Ahead* ahead) {
  using Product = typename Op::Product;
  const int64_t count = call.weight->group_channels(), lanes = plan.units * call.weight->taps();
  const int64_t together = ceil_div(count, ceil_div(count, kMostChannels)), across = ceil_div(call.out_width, kLanes);
  const int64_t last = (last_row - row) * across, size = call.out_height * call.out_width;
  const PlanarKernel<Op, Out> multiply = planar_kernel<Op, Out>(together);
  const Epilogue channels = epilogue<Op>(call, group, 0);
  auto* products = reinterpret_cast<Product*>(
      scratch(Scratch::products, static_cast<size_t>(kBlock * kRunRoom) * sizeof(Product)));
  for (int64_t first = 0; first < last;) {
    const bool one = multiply.one_by_one(last - first);
    const int64_t vectors = one ? 1 : multiply.vectors;
    PixelRun runs[kMostRuns];
    const uint32_t* at[kMostRuns];
    bool whole = true;
    for (int64_t i = 0; i < vectors; ++i) {
      const int64_t of = first + i < last ? first + i : first, h = row + of / across, w = of % across * kLanes;
      runs[i] = {h * call.out_width + w, first + i < last ? lanes_left(call.out_width - w) : 0};
      at[i] = from + h * call.stride_h * plan.row + w;
      whole &= runs[i].lanes == kLanes;
    }
    for (int64_t c = 0; c < count; c += together) {
      const int64_t channel = c + together <= count ? c : count - together;  // the last ones, some perhaps again
      ahead->fetch();
      Product* room = products + channel * kRunRoom;
      const auto run = one ? multiply.one : multiply.many;
      if constexpr (Out::kWrites) {
        Y* plane = image + (group * count + channel) * size;
        for (int64_t i = 0; i < together; ++i)
          for (int64_t v = 0; v < vectors; ++v) __builtin_prefetch(plane + i * size + runs[v].pixel, 1);
        run(at, offset, weight + channel, lanes, room, {channels, channel, scale, runs, whole, plane, size});
      } else {
        run(at, offset, weight + channel, lanes, room, {});
      }
    }
    if constexpr (!Out::kWrites)
      finish_runs<Op>(call, products, runs, vectors, group * count, count, channels, scale, image);
    first += vectors;
  }
}

template <class Op, class X>
void run_planar_conv2d(const Conv2dCall& call, const Parallel& parallel) {
  const PackedLayout& layout = *call.weight;
  const int64_t groups = layout.groups, taps = layout.taps();
  const int64_t outputs = layout.channels * call.out_height * call.out_width;
  if (call.images == 0 || outputs == 0) return;
  const PlanarPlan plan = plan_planes<Op>(call, parallel.threads);
  const int64_t lanes = plan.units * taps, inputs = layout.inputs * groups * call.height * call.width;
  auto* offset = reinterpret_cast<int64_t*>(scratch(Scratch::offsets, static_cast<size_t>(lanes) * sizeof(int64_t)));
  for (int64_t k = 0; k < lanes; ++k)
    offset[k] = k / taps * plan.plane + k % taps / layout.kernel_w * call.dilation_h * plan.row +
                k % layout.kernel_w * layout.dilation_w;
  const auto planes_of = [&](int64_t images) {
    return reinterpret_cast<uint32_t*>(
        scratch(Scratch::activations, static_cast<size_t>(images * plan.image + 2 * kBlock) * 4));
  };
  const auto weight_of = [&] {
    return reinterpret_cast<uint32_t*>(scratch(Scratch::tables, static_cast<size_t>(lanes * kBlock) * 4));
  };
  const X* x = static_cast<const X*>(call.x);
  X* y = static_cast<X*>(call.y);
  const auto multiply =
      call.channels_last ? &multiply_rows<Op, KeepProducts<Op>, X> : &multiply_rows<Op, WritePlanes<Op, X>, X>;

  if (groups == 1 && images_for_all(call.images, parallel.threads)) {
    // Each thread takes images whole, one after the other, and fetches the next one while it multiplies.
    const int64_t work = outputs * layout.columns;
    const Parallel alone{nullptr, 1};
    // An image takes this many multiplications or more.
    const int64_t fetches =
        ceil_div(layout.channels, kMostChannels) * (call.out_height * call.out_width / (kMostRuns * kLanes) + 1);
    parallel_for(parallel, call.images, 1 + kTaskWork / work, [&](int64_t begin, int64_t end) {
      uint32_t *weight = weight_of(), *planes = planes_of(1);
      decode_units<Op>(layout, 0, weight);
      for (int64_t image = begin; image < end; ++image) {
        RowScale scale{};
        pack_planes<Op>(call, plan, alone, x + image * inputs, 1, image == begin, &scale, planes);
        const X* next = x + (image + 1) * inputs;
        Ahead ahead{reinterpret_cast<const char*>(next),
                    reinterpret_cast<const char*>(image + 1 < end ? next + inputs : next), 0};
        ahead.slice = 64 + (ahead.end - ahead.at) / fetches;
        multiply(call, plan, planes, offset, weight, 0, 0, call.out_height, scale.scale, y + image * outputs, &ahead);
      }
    });
    return;
  }

  uint32_t* planes = planes_of(plan.wave);
  auto* scales = reinterpret_cast<RowScale*>(
      scratch(Scratch::scales, static_cast<size_t>(plan.wave) * sizeof(RowScale)));
  for (int64_t first = 0; first < call.images; first += plan.wave) {
    const int64_t images = call.images - first < plan.wave ? call.images - first : plan.wave;
    pack_planes<Op>(call, plan, parallel, x + first * inputs, images, first == 0, scales, planes);
    int64_t bands = ceil_div(4 * parallel.threads, images * groups);  // of rows
    bands = bands < call.out_height ? bands : call.out_height;
    const int64_t work = outputs / groups / bands * layout.columns;
    parallel_for(parallel, groups * images * bands, 1 + kTaskWork / (1 + work), [&](int64_t begin, int64_t end) {
      uint32_t* weight = weight_of();
      int64_t decoded = -1;
      Ahead nothing{};
      for (int64_t task = begin; task < end; ++task) {
        const int64_t band = task % bands, image = task / bands % images, group = task / bands / images;
        if (group != decoded) decode_units<Op>(layout, group, weight);
        decoded = group;
        multiply(call, plan, planes + image * plan.image + group * plan.units * plan.plane, offset, weight, group,
                 call.out_height * band / bands, call.out_height * (band + 1) / bands,
                 Op::kInt8 ? scales[image].scale : 1.0f, y + (first + image) * outputs, &nothing);
      }
    });
  }
}

// Whether lanes of pixels take less time than lanes of channels, with operands of the class Channels: by what fills the
// lanes. A block of channels alone is held up by its broadcasts, and channels-last pixels by their transposition.
template <class Op, class Channels>
inline bool planar_pays(const Conv2dCall& call) {
  const PackedLayout& layout = *call.weight;
  if (layout.blocks > 1 || call.stride_w > 1) return false;
  const int64_t width = ceil_div(call.out_width, kLanes) * kLanes, of_pixels = units_of<Op>(layout) * layout.taps();
  const int64_t of_channels = layout.segments * ceil_div(layout.segment, Channels::kUnit);
  const int64_t percent = call.channels_last ? 110 : 85;  // measured
  return percent * of_pixels * width * layout.group_channels() <= 100 * of_channels * call.out_width * kBlock;
}
