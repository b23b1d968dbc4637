// The zero-padded copy of images that lanes of pixels are read from: a plane for every kUnit inputs, of which a lane
// holds those of one pixel.

// Where things stand in the copy: [image][group][unit][height][width], in lanes.
struct PlanarPlan {
  int64_t units;  // units of kUnit inputs in a group
  int64_t row, plane, image;
};

template <class Op>
inline PlanarPlan plan_planes(const PackedCall& call) {
  PlanarPlan p;
  p.units = ceil_div(call.weight->inputs, Op::kUnit);
  p.row = call.width + 2 * int64_t{call.padding_w};
  p.plane = (call.height + 2 * int64_t{call.padding_h}) * p.row;
  if (p.plane % 256 == 0) p.plane += kBlock;  // planes would meet in a few sets of the caches
  p.image = p.units * call.weight->groups * p.plane;
  return p;
}

// A lane of inputs that are 0, which bytes alone have another number for.
template <class Op>
constexpr uint32_t zero_lane() {
  static_assert(Op::kZero == 0 || Op::kUnit == 4, "it is not repeated in each byte");
  return 0x01010101u * static_cast<uint32_t>(Op::kZero);
}

template <class Op>
inline void fill_lanes(uint32_t* to, int64_t count) {
  fill(reinterpret_cast<char*>(to), reinterpret_cast<char*>(to + count), zero_lane<Op>());
}

// The operands of one number a lane, in its low bits, without kZero; integers have their sign above.
template <class Op>
BQNN_INLINE UInt operand_bits(Float rounded) {
  if constexpr (Op::kBfloat16) return bfloat16_lanes(rounded);
  if constexpr (Op::kInt8 && sizeof(typename Op::Element) < 4) return (UInt)integers(rounded);
  return (UInt)rounded;
}

// Rows of pixels whose kUnit inputs, of which there are `inputs`, are a plane each; in the copy they are `row` apart.
template <class Op, class X>
__attribute__((noinline)) void join_planes(const X* from, int64_t height, int64_t width, unsigned inputs, bool bf16,
                                           const RowScale& scale, uint32_t* to, int64_t row) {
  const int64_t plane = height * width;
  const auto join = [&](const X* x, uint32_t* lanes, int count) __attribute__((always_inline)) {
    UInt lane = {};
    BQNN_UNROLL(4) for (unsigned j = 0; j < Op::kUnit; ++j)
      if (j < inputs) {
        const unsigned up = j * (32 / Op::kUnit);
        const UInt bits = operand_bits<Op>(rounded<Op>(load_numbers(x + j * plane, count), bf16, scale));
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
  BQNN_UNROLL(16) for (int i = 0; i < kLanes; ++i) index[i] = static_cast<uint32_t>(i * kUnits);
  for (int64_t w = 0; w < width; w += kLanes, line += kLanes * kUnits * 4) {
    UInt v[4];
    BQNN_UNROLL(4) for (int i = 0; i < kUnits; ++i) v[i] = load_lanes(line + i * kLanes * 4);
    BQNN_UNROLL(4) for (unsigned u = 0; u < kUnits; ++u) {
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
      BQNN_UNROLL(16) for (int i = 0; i < kLanes; ++i)
        v[i] = load_lanes(line + (w + (i < pixels ? i : 0)) * pixel + u * 4);
      transpose(v);
      BQNN_UNROLL(16) for (int i = 0; i < kLanes; ++i)
        if (u + i < units) store_first(reinterpret_cast<float*>(to + (u + i) * plane + w), (Float)v[i], pixels);
    }
  }
}

// Copies one plane of an image that is contiguous; `fresh`, its border too.
template <class Op, class X>
inline void pack_plane(const PackedCall& call, const PlanarPlan& plan, const X* image, int64_t index,
                       const RowScale& scale, bool fresh, uint32_t* to) {
  const PackedLayout& layout = *call.weight;
  const int64_t first = index % plan.units * Op::kUnit;
  const auto inputs = static_cast<unsigned>(smaller(layout.inputs - first, Op::kUnit));
  const X* from = image + (index / plan.units * layout.inputs + first) * call.height * call.width;
  to += index * plan.plane;
  if (fresh && call.padding_h + call.padding_w > 0) fill_lanes<Op>(to, plan.plane);
  to += call.padding_h * plan.row + call.padding_w;
  join_planes<Op>(from, call.height, call.width, inputs, layout.precision == Precision::bf16, scale, to, plan.row);
}

// Copies row h, counted with the border, of one group of an image that is channels-last; `fresh`, the border too.
template <class Op, class X>
inline void pack_planar_row(const PackedCall& call, const PlanarPlan& plan, const X* image, int64_t group, int64_t h,
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
  // Vectors of pixels are read whole, those beyond the last one too.
  char* line = room<char>(Scratch::panel, ceil_div(call.width, kLanes) * kLanes * pixel + 64);
  Packer<Op> packer(call, scale);
  pack_pixels(call, packer, image, group, h - call.padding_h, reinterpret_cast<Element*>(line));
  part_pixels(line, pixel, call.width, plan.units, to + left, plan.plane);
}

// Copies the images [first, first + images). `fresh`: the memory does not hold the borders yet, which are the same for
// all images.
template <class Op>
inline void pack_planes(const PackedCall& call, const PlanarPlan& plan, const Parallel& parallel, int64_t first,
                        int64_t images, bool fresh, RowScale* scales, uint32_t* planes) {
  const bool by_rows = call.x.format == Format::channels_last;
  const int64_t rows = call.height + 2 * int64_t{call.padding_h};
  pack_images<Op>(call, parallel, first, images, call.weight->groups * (by_rows ? rows : plan.units), scales,
                  [&](const auto* x, int64_t image, int64_t i) {
                    const RowScale scale = Op::kInt8 ? scales[image] : RowScale{};
                    uint32_t* to = planes + image * plan.image;
                    if (by_rows) return pack_planar_row<Op>(call, plan, x, i / rows, i % rows, scale, fresh, to);
                    pack_plane<Op>(call, plan, x, i, scale, fresh, to);
                  });
}
