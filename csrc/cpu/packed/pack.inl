// From activations to operands: reading, rounding, and the zero-padded channels-last copy that convolutions multiply.

// Activations rounded to what the operands can hold, still floats; those of pairs are rounded when they are stored.
template <class Op>
BQNN_INLINE Float rounded(Float x, bool bf16, const RowScale& row) {
  if constexpr (Op::kBfloat16) return x;
  if constexpr (!Op::kInt8) return bf16 ? widen(round_to_bfloat16(x)) : x;
  const Float q = (x * row.lift) * row.factor;  // NaN is what an infinite scale brings back: here any number will do
#if BQNN_LANES == 16
  return q;
#else
  return min(max(round(q), broadcast(-127.0f)), broadcast(127.0f));
#endif
}

template <class Op>
BQNN_INLINE void store_operands(typename Op::Element* to, Float rounded, int count) {
  if constexpr (Op::kBfloat16) {
#if BQNN_LANES == 16
    store_bits16(to, bfloat16_operands(rounded), count);
#endif
  } else if constexpr (Op::kInt8 && sizeof(typename Op::Element) < 4) {
    const Int q = integers(rounded) + static_cast<int>(Op::kZero);
#if BQNN_LANES == 16
    if (count == kLanes)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xFFFF, (__m512i)q));
    else
      _mm512_mask_cvtepi32_storeu_epi8(to, (__mmask16)((1u << count) - 1u), (__m512i)q);
#else
    for (int i = 0; i < count; ++i) to[i] = static_cast<typename Op::Element>(q[i]);
#endif
  } else {
    store_first(to, rounded, count);
  }
}

template <class Element>
inline void fill(char* from, const char* to, Element value) {
  for (auto* at = reinterpret_cast<Element*>(from); reinterpret_cast<char*>(at) < to; ++at) *at = value;
}

// What writes the activations of one row of a matrix, or of one image, as operands.
template <class Operand>
struct Packer {
  using Op = Operand;
  using Element = typename Op::Element;
  RowScale scale;
  bool bf16;

  Packer(const PackedCall& call, const RowScale& rule) : scale(rule), bf16(call.weight->precision == Precision::bf16) {}
  BQNN_INLINE void operator()(Float x, Element* to, int count) const {
    store_operands<Op>(to, rounded<Op>(x, bf16, scale), count);
  }
  void zeros(char* from, const char* to) const { fill(from, to, static_cast<Element>(Op::kZero)); }
  bool fits() const { return true; }

  using Local = const Packer&;  // what a loop works on: nothing changes
  void keep(const Packer&) {}
};

template <class P, class X>
__attribute__((noinline)) void pack_row(P& packer, const X* x, int64_t n, typename P::Element* to) {
  typename P::Local pack = packer;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = lanes_left(n - i);
    pack(load_numbers(x + i, count), to + i, count);
  }
  packer.keep(pack);
}

// Packs row `row` of a matrix, and zeros up to `padded` operands; returns the row's scale.
template <class Op>
inline float pack_matrix_row(const PackedCall& call, int64_t row, int64_t padded, typename Op::Element* to) {
  const int64_t columns = call.weight->columns;
  return with_elements(call.x, [&](const auto* x) {
    x += row * call.x.image_stride;
    Packer<Op> packer(call, Op::kInt8 ? row_scale(largest(x, columns)) : RowScale{});
    pack_row(packer, x, columns, to);
    for (int64_t k = columns; k < padded; ++k) to[k] = static_cast<typename Op::Element>(Op::kZero);
    return packer.scale.scale;
  });
}

// Where things stand in the copy of images: [image][group][height][width][inputs], in bytes.
struct CopyPlan {
  int64_t pixel, row, plane, image;
};

// The copy of images whose elements have so many bytes, and the offsets of its segments from a pixel. A plane goes on
// for `beyond` bytes.
inline CopyPlan plan_copy(const PackedCall& call, int64_t element, int64_t beyond, int64_t* offsets) {
  const PackedLayout& layout = *call.weight;
  CopyPlan p;
  p.pixel = layout.inputs * element;
  p.row = (call.width + 2 * int64_t{call.padding_w}) * p.pixel;
  p.plane = ((call.height + 2 * int64_t{call.padding_h}) * p.row + beyond + 63) / 64 * 64;
  p.image = layout.groups * p.plane;
  const int columns = layout.segments / layout.kernel_h;  // 1, or kernel_w where dilation sets them apart
  for (int64_t s = 0; s < layout.segments; ++s)
    offsets[s] = s / columns * call.dilation_h * p.row + s % columns * layout.dilation_w * p.pixel;
  return p;
}

// Copies a few pixels of a few channels, both up to kLanes.
template <class P, class X>
__attribute__((noinline)) void pack_square(P& packer, const X* from, int64_t plane, int channels, int pixels,
                                           typename P::Element* to, int64_t pixel) {
  typename P::Local pack = packer;
  UInt v[kLanes];
  BQNN_UNROLL(16) for (int c = 0; c < kLanes; ++c)  // beyond the last channel the first again
    v[c] = (UInt)load_numbers(from + (c < channels ? c : 0) * plane, pixels);
  transpose(v);
  BQNN_UNROLL(16) for (int i = 0; i < kLanes; ++i)
    if (i < pixels) pack((Float)v[i], to + i * pixel, channels);
  packer.keep(pack);
}

// Copies n pixels of some channels, those of a pixel side by side and pixels `pitch` apart.
template <class P, class X>
inline void pack_channels(P& packer, const X* from, int64_t n, int64_t channels, int64_t pitch,
                          typename P::Element* to) {
  if (channels >= kLanes) {
    for (int64_t i = 0; i < n; ++i) pack_row(packer, from + i * pitch, channels, to + i * channels);
    return;
  }
  X line[kLanes];
  int filled = 0;
  const auto store_line = [&] {
    packer(load_numbers(line, filled), to, filled);
    to += filled, filled = 0;
  };
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < channels; ++c) {
      line[filled++] = from[i * pitch + c];
      if (filled == kLanes) store_line();
    }
  store_line();
}

// Copies row h of one group of an image.
template <class P, class X>
inline void pack_pixels(const PackedCall& call, P& packer, const X* image, int64_t group, int64_t h,
                        typename P::Element* to) {
  const int64_t inputs = call.weight->inputs, width = call.width, pitch = call.x.pixel_stride;
  if (call.x.format == Format::channels_last) {
    const X* from = image + h * width * pitch + group * inputs;
    if (pitch == inputs) return pack_row(packer, from, width * inputs, to);
    return pack_channels(packer, from, width, inputs, pitch, to);
  }
  if (inputs == 1) return pack_row(packer, image + (group * call.height + h) * width, width, to);
  for (int64_t c = 0; c < inputs; c += kLanes) {
    const X* from = image + ((group * inputs + c) * call.height + h) * width;
    for (int64_t w = 0; w < width; w += kLanes)
      pack_square(packer, from + w, call.height * width, lanes_left(inputs - c), lanes_left(width - w),
                  to + w * inputs + c, inputs);
  }
}

// Copies row h, counted with the border, of one group of an image to its place; with the last one what lies beyond.
template <class P, class X>
inline void pack_padded_row(const PackedCall& call, const CopyPlan& plan, P& packer, const X* image, int64_t group,
                            int64_t h, char* plane) {
  char *to = plane + h * plan.row, *end = to + plan.row;
  h -= call.padding_h;
  const bool border = h < 0 || h >= call.height;
  if (!border) {
    const int64_t left = call.padding_w * plan.pixel;
    packer.zeros(to, to + left);
    pack_pixels(call, packer, image, group, h, reinterpret_cast<typename P::Element*>(to + left));
    to += left + call.width * plan.pixel;
  }
  packer.zeros(to, end);
  if (h == call.height + call.padding_h - 1) packer.zeros(end, plane + plan.plane);
}

// Whether the activations of an image are one run.
inline bool is_dense(const PackedCall& call) {
  return call.x.format == Format::contiguous || call.x.pixel_stride == call.weight->inputs * call.weight->groups;
}

// Activations of an image.
inline int64_t image_size(const PackedCall& call) {
  return call.weight->inputs * call.weight->groups * call.height * call.width;
}

// The rules by which images are rounded. A few images are read by all threads.
template <class X>
inline void image_scales(const PackedCall& call, const Parallel& parallel, const X* x, int64_t images,
                         RowScale* scales) {
  const int64_t channels = call.weight->inputs * call.weight->groups;
  const int64_t length = is_dense(call) ? 1 << 14 : channels, pitch = is_dense(call) ? length : call.x.pixel_stride;
  const int64_t size = image_size(call), parts = ceil_div(size, length);
  auto* most = room<float>(Scratch::row_scales, images * parts);
  parallel_for(parallel, images * parts, 1 + (1 << 15) / length, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      most[i] = largest(x + i / parts * call.x.image_stride + i % parts * pitch,
                        smaller(length, size - i % parts * length));
  });
  for (int64_t i = 0; i < images; ++i) scales[i] = row_scale(largest(most + i * parts, parts));
}

// Whether there are images for every thread.
inline bool images_for_all(int64_t images, int threads) { return images >= 4 * threads || images % threads == 0; }

// Calls pack(x of the image, image, row) for all rows of the images [first, first + images), when an image's scale is
// known. Where there are images for every thread, each packs what it has read for the scale and still has in its cache.
template <class Op, class F>
inline void pack_images(const PackedCall& call, const Parallel& parallel, int64_t first, int64_t images, int64_t rows,
                        RowScale* scales, const F& pack) {
  constexpr int64_t kGrain = 1 << 14;  // so many numbers repay waking a thread
  const int64_t stride = call.x.image_stride, size = image_size(call);
  with_elements(call.x, [&](const auto* x) {
    x += first * stride;
    const bool whole = Op::kInt8 && images_for_all(images, parallel.threads);
    if (Op::kInt8 && !whole) image_scales(call, parallel, x, images, scales);
    const int64_t tasks = whole ? images : images * rows;
    parallel_for(parallel, tasks, 1 + kGrain * (whole ? 1 : rows) / size, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (!whole) {
          pack(x + i / rows * stride, i / rows, i % rows);
          continue;
        }
        if (is_dense(call))
          scales[i] = row_scale(largest(x + i * stride, size));
        else
          image_scales(call, {nullptr, 1}, x + i * stride, 1, scales + i);
        for (int64_t row = 0; row < rows; ++row) pack(x + i * stride, i, row);
      }
    });
  });
}

// Copies a wave of images; their scales become known, in "int8". False where one of them does not fit the operands.
// P(call, scale, more...) writes an image.
template <class P, class... More>
inline bool pack_wave(const PackedCall& call, const CopyPlan& plan, const Parallel& parallel, int64_t first,
                      int64_t images, RowScale* scales, char* activations, const More&... more) {
  using Op = typename P::Op;
  bool fits = true;
  const int64_t rows = call.height + 2 * int64_t{call.padding_h};
  // Without a border an image of one group is one row.
  const bool flat = call.x.format == Format::channels_last && call.x.pixel_stride == call.weight->inputs &&
                    call.padding_h + call.padding_w == 0;
  pack_images<Op>(call, parallel, first, images, flat ? 1 : call.weight->groups * rows, scales,
                  [&](const auto* x, int64_t image, int64_t i) {
                    P pack(call, Op::kInt8 ? scales[image] : RowScale{}, more...);
                    char* to = activations + image * plan.image;
                    if (flat) {
                      pack_row(pack, x, image_size(call), reinterpret_cast<typename Op::Element*>(to));
                      pack.zeros(to + rows * plan.row, to + plan.plane);
                    } else {
                      pack_padded_row(call, plan, pack, x, i / rows, i % rows, to + i / rows * plan.plane);
                    }
                    if (!pack.fits()) __atomic_store_n(&fits, false, __ATOMIC_RELAXED);
                  });
  return fits;
}

// As many images as the L2 caches hold, and enough pixels to repay decoding the weights and waking threads.
inline int64_t images_of_wave(const PackedCall& call, int64_t image_bytes, int threads) {
  constexpr int64_t kCache = 1 << 20, kEnough = 1 << 12;
  const int64_t least = ceil_div(kEnough, call.out_height * call.out_width);
  int64_t wave = kCache * threads / image_bytes;
  if (wave < least && wave < 4 * threads) wave = least;
  return wave < 1 ? 1 : smaller(wave, call.images);
}
