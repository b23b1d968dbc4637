// Pooling, with channels in the lanes.

// A window along an axis, cut to what there is of the input.
struct Range {
  int64_t first, last;  // last is not of it
};

BQNN_INLINE Range window_range(int64_t out, int64_t stride, int64_t padding, int64_t kernel, int64_t dilation,
                               int64_t size) {
  int64_t first = out * stride - padding, last = first + (kernel - 1) * dilation + 1;
  if (first < 0) first += (dilation - 1 - first) / dilation * dilation;
  return {first, last < size ? last : size};
}

// Many numbers of a row of channels at once: stored numbers have the order of what they stand for.
template <class X>
inline void max_pool_rows(const PoolCall& call, int64_t begin, int64_t end) {
  constexpr int kCount = static_cast<int>(4 * BQNN_LANES / sizeof(X));
  typedef X Many __attribute__((vector_size(4 * BQNN_LANES)));
  const Window& of = call.window;
  const Shape &shape = call.y.shape, &size = call.x.shape;
  const X least = sizeof(X) == 1 ? X{} : static_cast<X>(-__builtin_inff());
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / shape.height, h = unit % shape.height;
    const Range rows = window_range(h, of.stride_h, of.top, of.kernel_h, of.dilation_h, size.height);
    for (int64_t w = 0; w < shape.width; ++w) {
      const Range columns = window_range(w, of.stride_w, of.left, of.kernel_w, of.dilation_w, size.width);
      X* y = elements<X>(call.y, image, h, w);
      for (int64_t c = 0; c < shape.channels; c += kCount) {
        Many most = least - Many{};
        for (int64_t r = rows.first; r < rows.last; r += of.dilation_h)
          for (int64_t s = columns.first; s < columns.last; s += of.dilation_w) {
            Many value;
            __builtin_memcpy(&value, elements<X>(call.x, image, r, s) + c, sizeof value);
            if constexpr (sizeof(X) == 1)
              most = value > most ? value : most;
            else
              most = (value > most) | (value != value) ? value : most;  // a NaN stays
          }
        const int64_t left = shape.channels - c;
        if (left >= kCount) {
          __builtin_memcpy(y + c, &most, sizeof most);
        } else {
          X all[kCount];
          __builtin_memcpy(all, &most, sizeof most);
          for (int64_t i = 0; i < left; ++i) y[c + i] = all[i];
        }
      }
    }
  }
}

// The same of few channels, whose pixels follow each other: the largest of the rows first, as if they were one pixel,
// then of the columns.
inline void max_pool_few_channels(const PoolCall& call, int64_t begin, int64_t end) {
  constexpr int kCount = 16;
  typedef uint8_t Many __attribute__((vector_size(kCount)));
  typedef uint8_t Row __attribute__((vector_size(4 * BQNN_LANES)));
  const auto larger = [](auto a, const uint8_t* p) BQNN_LAMBDA {
    auto b = a;
    __builtin_memcpy(&b, p, sizeof b);
    return a > b ? a : b;
  };
  const Window& of = call.window;
  const Shape &shape = call.y.shape, &size = call.x.shape;
  const int64_t channels = shape.channels, bytes = size.width * channels;
  uint8_t* row = room<uint8_t>(Scratch::products, bytes + kSlack);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / shape.height, h = unit % shape.height;
    const Range rows = window_range(h, of.stride_h, of.top, of.kernel_h, of.dilation_h, size.height);
    for (int64_t i = 0; i < bytes; i += static_cast<int64_t>(sizeof(Row))) {
      Row most = {};
      for (int64_t r = rows.first; r < rows.last; r += of.dilation_h)
        most = larger(most, elements<uint8_t>(call.x, image, r) + i);
      __builtin_memcpy(row + i, &most, sizeof most);
    }
    uint8_t *y = elements<uint8_t>(call.y, image, h), *last = y + shape.width * channels;
    for (int64_t w = 0; w < shape.width; ++w, y += channels) {
      const Range columns = window_range(w, of.stride_w, of.left, of.kernel_w, of.dilation_w, size.width);
      Many most = {};
      const uint8_t *x = row + columns.first * channels, *end = row + columns.last * channels;
      for (; x < end; x += of.dilation_w * channels) most = larger(most, x);
      // What is written beyond the pixel is the next one's, which comes after it.
      __builtin_memcpy(y, &most, y + kCount <= last ? kCount : static_cast<size_t>(channels));
    }
  }
}

// Sums of stored numbers: integers are added up as such.
template <class X, class Y>
inline void avg_pool_rows(const PoolCall& call, int64_t begin, int64_t end) {
  const Window& of = call.window;
  const Shape &shape = call.y.shape, &size = call.x.shape;
  const bool adaptive = call.op == Op::adaptive_avg_pool2d;
  const Numbers<Y> out(call.y);
  const float scale = sizeof(X) == 1 ? call.x.scale : 1.0f;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / shape.height, h = unit % shape.height;
    for (int64_t w = 0; w < shape.width; ++w) {
      Range rows, columns;
      int64_t divisor;
      if (adaptive) {
        rows = {h * size.height / shape.height, ceil_div((h + 1) * size.height, shape.height)};
        columns = {w * size.width / shape.width, ceil_div((w + 1) * size.width, shape.width)};
        divisor = (rows.last - rows.first) * (columns.last - columns.first);
      } else {
        rows = window_range(h, of.stride_h, of.top, of.kernel_h, 1, size.height);
        columns = window_range(w, of.stride_w, of.left, of.kernel_w, 1, size.width);
        // With its padding a window goes on to the border of the padded input, no further.
        const int64_t top = h * of.stride_h - of.top, left = w * of.stride_w - of.left;
        const int64_t padded_h = smaller(top + of.kernel_h, size.height + of.top) - top;
        const int64_t padded_w = smaller(left + of.kernel_w, size.width + of.left) - left;
        divisor = of.divisor > 0 ? of.divisor
                  : of.count_padding ? padded_h * padded_w
                                     : (rows.last - rows.first) * (columns.last - columns.first);
      }
      const auto divide = static_cast<float>(divisor);
      const auto taps = static_cast<int32_t>((rows.last - rows.first) * (columns.last - columns.first));
      Y* y = elements<Y>(call.y, image, h, w);
      for_channels(shape.channels, [&](int64_t c, int lanes) {
        Float value;
        if constexpr (sizeof(X) == 1) {
          Int sum = Int{} - taps * call.x.zero;
          for (int64_t r = rows.first; r < rows.last; ++r)
            for (int64_t s = columns.first; s < columns.last; ++s)
              sum += load_bytes(elements<X>(call.x, image, r, s) + c);
          value = to_float(sum);
        } else {
          Float sum = {};
          for (int64_t r = rows.first; r < rows.last; ++r)
            for (int64_t s = columns.first; s < columns.last; ++s) sum += load(elements<X>(call.x, image, r, s) + c);
          value = sum;
        }
        out.write(y + c, value * scale / divide, lanes);
      });
    }
  }
}

inline void run_pool(const PoolCall& call, int64_t begin, int64_t end) {
  with_element(call.x.dtype, [&](auto* null) {
    using X = std::remove_pointer_t<decltype(null)>;
    const int64_t channels = call.y.shape.channels;
    if (call.op == Op::max_pool2d && sizeof(X) == 1 && channels <= 16 && call.x.pixel == channels &&
        call.y.pixel == channels)
      return max_pool_few_channels(call, begin, end);
    if (call.op == Op::max_pool2d) return max_pool_rows<X>(call, begin, end);
    with_element(call.y.dtype,
                 [&](auto* y) { avg_pool_rows<X, std::remove_pointer_t<decltype(y)>>(call, begin, end); });
  });
}
