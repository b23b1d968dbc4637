// What moves numbers: into the arena and out of it, and from one place of it to another.

// Numbers that are `step` apart, in somebody else's memory, which ends after the last of them.
BQNN_INLINE Float read_lanes(const float* at, int64_t step, int lanes) {
  if (step == 1) return load_first(at, lanes);
  float values[kLanes] = {};
  for (int j = 0; j < lanes; ++j) values[j] = at[j * step];
  return load(values);
}
BQNN_INLINE Float read_lanes(const uint8_t* at, int64_t step, int lanes) {
  if (step == 1 && lanes == kLanes) return to_float(load_bytes(at));
  float values[kLanes] = {};
  for (int j = 0; j < lanes; ++j) values[j] = static_cast<float>(at[j * step]);
  return load(values);
}

// Reads rows of an image that is somebody else's. A few pixels of a channel are converted together.
template <class X, class Y>
inline void read_rows(const Outside& from, const View& to, int64_t begin, int64_t end) {
  const Shape& shape = to.shape;
  const Numbers<Y> numbers(to);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / shape.height, h = unit % shape.height;
    const X* x = reinterpret_cast<const X*>(from.data) + image * from.image + h * from.row;
    Y* y = elements<Y>(to, image, h);
    const bool by_pixel = shape.channels == 1 || from.channel != 1;
    const int64_t outer = by_pixel ? shape.channels : shape.width, inner = by_pixel ? shape.width : shape.channels;
    const int64_t outer_x = by_pixel ? from.channel : from.pixel, inner_x = by_pixel ? from.pixel : from.channel;
    const int64_t outer_y = by_pixel ? 1 : to.pixel, inner_y = by_pixel ? to.pixel : 1;
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t i = 0; i < inner; i += kLanes) {
        const int lanes = lanes_left(inner - i);
        const X* at = x + o * outer_x + i * inner_x;
        Y* to = y + o * outer_y + i * inner_y;
        const Float value = read_lanes(at, inner_x, lanes);
        if (inner_y == 1) {
          numbers.write(to, value, lanes);
          continue;
        }
        Y stored[kLanes];
        numbers.write(stored, value, kLanes);
        if (lanes == kLanes)
          BQNN_UNROLL(16) for (int j = 0; j < kLanes; ++j) to[j * inner_y] = stored[j];
        else
          for (int j = 0; j < lanes; ++j) to[j * inner_y] = stored[j];
      }
  }
}

inline void run_read(const Outside& from, const View& to, int64_t begin, int64_t end) {
  with_element(from.bytes ? Dtype::uint8 : Dtype::float32, [&](auto* x) {
    with_element(to.dtype, [&](auto* y) {
      read_rows<std::remove_pointer_t<decltype(x)>, std::remove_pointer_t<decltype(y)>>(from, to, begin, end);
    });
  });
}

// Outputs are float32.
inline void run_write(const View& from, const Outside& to, int64_t begin, int64_t end) {
  const Shape& shape = from.shape;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / shape.height, h = unit % shape.height;
    const float* x = elements<float>(from, image, h);
    float* y = reinterpret_cast<float*>(to.data) + image * to.image + h * to.row;
    if (shape.width == 1 && to.channel == 1) {
      __builtin_memcpy(y, x, static_cast<size_t>(shape.channels) * sizeof *y);
      continue;
    }
    for (int64_t c = 0; c < shape.channels; ++c)
      for (int64_t w = 0; w < shape.width; ++w) y[c * to.channel + w * to.pixel] = x[w * from.pixel + c];
  }
}

template <class X>
inline void move_rows(const MoveCall& call, int64_t begin, int64_t end) {
  const View &x = call.x, &y = call.y;
  const Shape &shape = y.shape, &count = call.count;
  const X number = [&] {
    if constexpr (sizeof(X) == 1) return static_cast<X>(Numbers<X>(y).quantize(broadcast(call.number))[0]);
    return static_cast<X>(call.number);
  }();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / shape.height, h = unit % shape.height;
    if (call.reshape) {
      const Shape& of = x.shape;
      for (int64_t c = 0; c < shape.channels; ++c)
        for (int64_t w = 0; w < shape.width; ++w) {
          const int64_t at = (c * shape.height + h) * shape.width + w;
          elements<X>(y, image, h, w)[c] =
              elements<X>(x, image, at / of.width % of.height, at % of.width)[at / (of.width * of.height)];
        }
      continue;
    }
    const int64_t row = h - call.to.height;
    const bool all = count.channels == shape.channels && count.width == shape.width && count.height == shape.height;
    if (call.fill && !all)
      for (int64_t w = 0; w < shape.width; ++w)
        for (X *at = elements<X>(y, image, h, w), *last = at + shape.channels; at < last; ++at) *at = number;
    if (row < 0 || row >= count.height) continue;
    for (int64_t w = 0; w < count.width; ++w) {
      const X* at = elements<X>(x, image, call.from.height + row * call.step.height,
                                call.from.width + w * call.step.width) + call.from.channels;
      X* to = elements<X>(y, image, h, call.to.width + w) + call.to.channels;
      if (call.step.channels == 1)
        __builtin_memcpy(to, at, static_cast<size_t>(count.channels) * sizeof *to);
      else
        for (int64_t c = 0; c < count.channels; ++c) to[c] = at[c * call.step.channels];
    }
  }
}

inline void run_move(const MoveCall& call, int64_t begin, int64_t end) {
  with_element(call.y.dtype, [&](auto* x) { move_rows<std::remove_pointer_t<decltype(x)>>(call, begin, end); });
}
