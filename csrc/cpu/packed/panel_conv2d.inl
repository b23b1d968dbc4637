// The driver of packed_conv2d: a zero-padded channels-last copy of each image and group, then tasks of some output
// pixels, of one or several images, by a strip of channels.
//
// Included inside the namespace of a translation unit that has set the target, after panel.inl.
#pragma once

// Where things stand in the copy: [image][group][height][width][inputs], in bytes.
struct ConvPlan {
  int64_t pixel, row, plane, image;
  int64_t wave;       // images that are copied and multiplied together
  int64_t positions;  // output pixels of an image
};

// As many images as the L2 caches hold, and enough pixels to repay decoding the weights and waking threads.
inline int64_t images_of_wave(const Conv2dCall& call, int64_t image_bytes, int threads) {
  constexpr int64_t kCache = 1 << 20, kEnough = 1 << 12;
  const int64_t least = ceil_div(kEnough, call.out_height * call.out_width);
  int64_t wave = kCache * threads / image_bytes;
  if (wave < least && wave < 4 * threads) wave = least;
  if (wave > call.images) wave = call.images;
  return wave < 1 ? 1 : wave;
}

template <class Op>
inline ConvPlan plan_conv2d(const Conv2dCall& call, int threads, int64_t* offsets) {
  const PackedLayout& layout = *call.weight;
  ConvPlan p;
  p.pixel = layout.inputs * static_cast<int64_t>(sizeof(typename Op::Element));
  p.row = (call.width + 2 * call.padding_w) * p.pixel;
  p.plane = ((call.height + 2 * call.padding_h) * p.row + 127) / 64 * 64;  // the last lane reads beyond
  p.image = layout.groups * p.plane;
  p.positions = call.out_height * call.out_width;
  p.wave = images_of_wave(call, p.image, threads);
  const int columns = layout.segments / layout.kernel_h;  // 1, or kernel_w where dilation sets them apart
  for (int s = 0; s < layout.segments; ++s)
    offsets[s] = s / columns * call.dilation_h * p.row + s % columns * layout.dilation_w * p.pixel;
  return p;
}

// Copies a few pixels of a few channels, both up to kLanes.
template <class Op, class X>
__attribute__((noinline)) void pack_square(const X* from, int64_t plane, int channels, int pixels, bool bf16,
                                           const RowScale& scale, typename Op::Element* to, int64_t pixel) {
  UInt v[kLanes];
#pragma GCC unroll 16
  for (int c = 0; c < kLanes; ++c)  // beyond the last channel the first again
    v[c] = (UInt)rounded<Op>(load_activations(from + (c < channels ? c : 0) * plane, pixels), bf16, scale);
  transpose(v);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (i < pixels) store_operands<Op>(to + i * pixel, (Float)v[i], channels);
}

// Copies n pixels of some channels, those of a pixel side by side and pixels `all` apart.
template <class Op, class X>
inline void pack_channels(const X* from, int64_t n, int64_t channels, int64_t all, bool bf16, const RowScale& scale,
                          typename Op::Element* to) {
  if (channels >= kLanes) {
    for (int64_t i = 0; i < n; ++i) pack_row<Op>(from + i * all, channels, bf16, scale, to + i * channels);
    return;
  }
  X line[kLanes];
  int filled = 0;
  const auto store_line = [&] {
    store_operands<Op>(to, rounded<Op>(load_activations(line, filled), bf16, scale), filled);
    to += filled, filled = 0;
  };
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < channels; ++c) {
      line[filled++] = from[i * all + c];
      if (filled == kLanes) store_line();
    }
  store_line();
}

// Copies row h of one group of an image.
template <class Op, class X>
inline void pack_pixels(const Conv2dCall& call, const X* image, int64_t group, int64_t h, const RowScale& scale,
                        typename Op::Element* to) {
  const PackedLayout& layout = *call.weight;
  const bool bf16 = layout.precision == Precision::bf16;
  const int64_t inputs = layout.inputs, width = call.width, all = inputs * layout.groups;
  if (call.channels_last) {
    const X* from = image + h * width * all + group * inputs;
    if (layout.groups == 1) return pack_row<Op>(from, width * inputs, bf16, scale, to);
    return pack_channels<Op>(from, width, inputs, all, bf16, scale, to);
  }
  if (inputs == 1) return pack_row<Op>(image + (group * call.height + h) * width, width, bf16, scale, to);
  for (int64_t c = 0; c < inputs; c += kLanes) {
    const int channels = static_cast<int>(inputs - c < kLanes ? inputs - c : kLanes);
    const X* from = image + ((group * inputs + c) * call.height + h) * width;
    for (int64_t w = 0; w < width; w += kLanes) {
      const int pixels = static_cast<int>(width - w < kLanes ? width - w : kLanes);
      pack_square<Op>(from + w, call.height * width, channels, pixels, bf16, scale, to + w * inputs + c, inputs);
    }
  }
}

template <class Element>
inline void fill(char* from, const char* to, Element value) {
  for (auto* at = reinterpret_cast<Element*>(from); reinterpret_cast<char*>(at) < to; ++at) *at = value;
}

// Copies row h, counted with the border, of one group of an image to its place.
template <class Op, class X>
inline void pack_padded_row(const Conv2dCall& call, const ConvPlan& plan, const X* image, int64_t group, int64_t h,
                            const RowScale& scale, char* to) {
  using Element = typename Op::Element;
  constexpr auto kZero = static_cast<Element>(Op::kZero);
  const int64_t left = call.padding_w * plan.pixel, inner = call.width * plan.pixel;
  h -= call.padding_h;
  if (h < 0 || h >= call.height) return fill(to, to + plan.row, kZero);
  fill(to, to + left, kZero);
  pack_pixels<Op>(call, image, group, h, scale, reinterpret_cast<Element*>(to + left));
  fill(to + left + inner, to + plan.row, kZero);
}

// The rules by which images of `size` numbers are rounded. A few images are read by all threads.
template <class X>
inline void image_scales(const Parallel& parallel, const X* x, int64_t images, int64_t size, RowScale* scales) {
  constexpr int64_t kPart = 1 << 14;
  const int64_t parts = ceil_div(size, kPart);
  auto* most = reinterpret_cast<float*>(
      scratch(Scratch::row_scales, static_cast<size_t>(images * parts) * sizeof(float)));
  parallel_for(parallel, images * parts, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = i % parts * kPart;
      most[i] = largest(x + i / parts * size + from, size - from < kPart ? size - from : kPart);
    }
  });
  for (int64_t i = 0; i < images; ++i) scales[i] = row_scale(largest(most + i * parts, parts));
}

// Whether there are images for every thread.
inline bool images_for_all(int64_t images, int threads) { return images >= 4 * threads || images % threads == 0; }

// Calls pack(image, row) for all rows of the images, [images][size], when an image's scale is known. Where there are
// images for every thread, each packs what it has read for the scale and still has in its cache.
template <class Op, class X, class F>
inline void pack_images(const Parallel& parallel, const X* x, int64_t images, int64_t size, int64_t rows,
                        RowScale* scales, const F& pack) {
  constexpr int64_t kGrain = 1 << 14;  // numbers
  if (Op::kInt8 && images_for_all(images, parallel.threads))
    return parallel_for(parallel, images, 1 + kGrain / size, [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        scales[image] = row_scale(largest(x + image * size, size));
        for (int64_t row = 0; row < rows; ++row) pack(image, row);
      }
    });
  if constexpr (Op::kInt8) image_scales(parallel, x, images, size, scales);
  parallel_for(parallel, images * rows, 1 + kGrain * rows / size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack(i / rows, i % rows);
  });
}

// Copies a wave of images; `scales` becomes theirs.
template <class Op, class X>
inline void pack_wave(const Conv2dCall& call, const ConvPlan& plan, const Parallel& parallel, const X* x,
                      int64_t images, RowScale* scales, char* activations) {
  const int64_t groups = call.weight->groups, rows = call.height + 2 * call.padding_h;
  const int64_t size = call.weight->inputs * groups * call.height * call.width;
  if (call.channels_last && groups == 1 && call.padding_h + call.padding_w == 0)  // no border: an image is one row
    return pack_images<Op>(parallel, x, images, size, 1, scales, [&](int64_t image, int64_t) {
      pack_row<Op>(x + image * size, size, call.weight->precision == Precision::bf16,
                   Op::kInt8 ? scales[image] : RowScale{},
                   reinterpret_cast<typename Op::Element*>(activations + image * plan.image));
    });
  pack_images<Op>(parallel, x, images, size, groups * rows, scales, [&](int64_t image, int64_t i) {
    pack_padded_row<Op>(call, plan, x + image * size, i / rows, i % rows, Op::kInt8 ? scales[image] : RowScale{},
                        activations + image * plan.image + i / rows * plan.plane + i % rows * plan.row);
  });
}

// Where the activations of `count` output pixels of a wave begin, and kTile more that may be read as well.
inline void place_pixels(const Conv2dCall& call, const ConvPlan& plan, const char* activations, int64_t first,
                         int64_t count, const char** position) {
  int64_t image = first / plan.positions, h = first % plan.positions / call.out_width, w = first % call.out_width;
  const int64_t step = call.stride_w * plan.pixel;
  for (int64_t i = 0; i < count; w = 0) {
    const int64_t left = call.out_width - w, end = i + (left < count - i ? left : count - i);
    const char* at = activations + image * plan.image + h * call.stride_h * plan.row + w * step;
    for (; i < end; ++i, at += step) position[i] = at;
    if (++h == call.out_height) h = 0, ++image;
  }
  for (int64_t i = count; i < count + kTile; ++i) position[i] = position[count - 1];
}

// Writes `count` outputs of `width` channels, from output pixel `first` of an image on; products of a pixel are
// `stride` apart from those of the next.
template <class Op, class Y>
inline void finish_pixels(const Conv2dCall& call, const typename Op::Product* products, int64_t stride, int64_t first,
                          int64_t count, int64_t channel, int64_t width, const Epilogue& strip, float scale, Y* image) {
  const int64_t channels = call.weight->channels, positions = call.out_height * call.out_width;
  for (int64_t c = 0; c < width; c += kLanes) {
    const int lanes = lanes_left(width - c);
    if (call.channels_last) {
      const Finish<Op> finish(strip, c, lanes);
      Y* to = image + first * channels + channel + c;
      const auto store = [&](int width) __attribute__((always_inline)) {
        for (int64_t i = 0; i < count; ++i)
          store_outputs(to + i * channels, finish(load_lanes(products + i * stride + c), scale), width);
      };
      if (lanes == kLanes)
        store(kLanes);
      else
        store(lanes);
      continue;
    }
    Y* to = image + (channel + c) * positions + first;
    for (int64_t i = 0; i < count; i += kLanes, to += kLanes) {
      const int pixels = lanes_left(count - i);
      UInt v[kLanes];
#pragma GCC unroll 16
      for (int p = 0; p < kLanes; ++p) v[p] = load_lanes(products + (i + (p < pixels ? p : 0)) * stride + c);
      transpose(v);
#pragma GCC unroll 16
      for (int of = 0; of < kLanes; ++of)
        if (of < lanes) store_outputs(to + of * positions, Finish<Op>(strip, c + of)(v[of], scale), pixels);
    }
  }
}

template <class Op, class X>
void run_conv2d(const Conv2dCall& call, const Parallel& parallel) {
  using Product = typename Op::Product;
  const PackedLayout& layout = *call.weight;
  const int64_t groups = layout.groups, in_group = layout.group_channels();
  auto* offsets = reinterpret_cast<int64_t*>(
      scratch(Scratch::offsets, static_cast<size_t>(layout.segments) * sizeof(int64_t)));
  const ConvPlan plan = plan_conv2d<Op>(call, parallel.threads, offsets);
  const int64_t positions = plan.positions;
  if (call.images == 0 || positions == 0) return;
  auto* scales = reinterpret_cast<RowScale*>(
      scratch(Scratch::scales, static_cast<size_t>(plan.wave) * sizeof(RowScale)));
  char* activations = scratch(Scratch::activations, static_cast<size_t>(plan.wave * plan.image));
  const int64_t strips = ceil_div(layout.blocks, kStripBlocks);

  for (int64_t first_image = 0; first_image < call.images; first_image += plan.wave) {
    const int64_t images = call.images - first_image < plan.wave ? call.images - first_image : plan.wave;
    const X* x = static_cast<const X*>(call.x) + first_image * layout.inputs * groups * call.height * call.width;
    X* y = static_cast<X*>(call.y) + first_image * layout.channels * positions;
    pack_wave<Op>(call, plan, parallel, x, images, scales, activations);

    const int64_t pixels = images * positions;
    const int64_t chunk = rows_of_task(pixels, plan.pixel, strips * groups, parallel.threads);
    const int64_t work = (chunk < pixels ? chunk : pixels) * kWidth * layout.columns;
    const int64_t tasks = ceil_div(pixels, chunk) * groups * strips;
    parallel_for(parallel, tasks, 1 + kTaskWork / work, [&](int64_t begin, int64_t end) {
      const auto room = static_cast<size_t>(chunk);
      auto* products = reinterpret_cast<Product*>(scratch(Scratch::products, room * kWidth * sizeof(Product)));
      auto** position = reinterpret_cast<const char**>(scratch(Scratch::positions, (room + kTile) * sizeof(char*)));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / strips % groups, first_block = task % strips * kStripBlocks;
        const int64_t first = task / strips / groups * chunk;
        const int64_t count = pixels - first < chunk ? pixels - first : chunk;
        const int blocks = static_cast<int>(layout.blocks - first_block < kStripBlocks ? 1 : kStripBlocks);
        place_pixels(call, plan, activations + group * plan.plane, first, count, position);
        multiply_strip<Op>(layout, group, first_block, blocks, position, count, offsets, products);
        const int64_t in = first_block * kBlock, width = in_group - in < kWidth ? in_group - in : kWidth;
        const Epilogue strip = epilogue<Op>(call, group, first_block);
        for (int64_t done = 0; done < count;) {
          const int64_t image = (first + done) / positions, from = (first + done) % positions;
          const int64_t here = positions - from < count - done ? positions - from : count - done;
          finish_pixels<Op>(call, products + done * kWidth, kWidth, from, here, group * in_group + in, width, strip,
                            Op::kInt8 ? scales[image].scale : 1.0f, y + image * layout.channels * positions);
          done += here;
        }
      }
    });
  }
}
