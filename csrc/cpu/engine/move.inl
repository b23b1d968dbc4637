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

#if BQNN_LANES >= 8
// Stores the first three bytes of each lane, one after another.
BQNN_INLINE void store_colors(uint8_t* y, Int pixels) {
#if BQNN_LANES == 16
  alignas(64) static constexpr auto kOrder = [] {
    std::array<uint8_t, 64> order{};
    for (int i = 0; i < 48; ++i) order[i] = static_cast<uint8_t>(i / 3 * 4 + i % 3);
    return order;
  }();
  const __m512i bytes = _mm512_maskz_permutexvar_epi8(~0ull, _mm512_load_si512(kOrder.data()), (__m512i)pixels);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_castsi512_si256(bytes));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y + 32), _mm512_maskz_extracti32x4_epi32(0xF, bytes, 2));
#else
  const __m128i order = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
  const __m128i low = _mm_shuffle_epi8(_mm256_castsi256_si128((__m256i)pixels), order);
  const __m128i high = _mm_shuffle_epi8(_mm256_extracti128_si256((__m256i)pixels, 1), order);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm_or_si128(low, _mm_slli_si128(high, 12)));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(y + 16), _mm_srli_si128(high, 4));
#endif
}

// Bytes of pixels of three channels, which follow each other, from planes of floats; returns how many pixels it wrote.
inline int64_t read_colors(const Outside& from, const float* x, const Numbers<uint8_t>& numbers, int64_t width,
                           uint8_t* y) {
  int64_t w = 0;
  for (; w + kLanes <= width; w += kLanes, y += 3 * kLanes) {
    const auto channel = [&](int64_t c) BQNN_LAMBDA { return numbers.quantize(load(x + c * from.channel + w)); };
    store_colors(y, channel(0) | channel(1) << 8 | channel(2) << 16);
  }
  return w;
}
#endif

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
    int64_t done = 0;
#if BQNN_LANES >= 8
    if constexpr (std::is_same_v<X, float> && std::is_same_v<Y, uint8_t>)
      if (shape.channels == 3 && to.pixel == 3 && from.pixel == 1)
        done = read_colors(from, x, numbers, shape.width, y);
#endif
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t i = by_pixel ? done : 0; i < inner; i += kLanes) {
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
    const bool inside = row >= 0 && row < count.height;
    X* to = elements<X>(y, image, h, call.to.width) + call.to.channels;
    if (call.fill) {
      const int64_t before = call.to.channels, after = shape.channels - before - count.channels;
      for (int64_t w = 0; w < shape.width; ++w) {
        const bool covered = inside && w >= call.to.width && w < call.to.width + count.width;
        X* pixel = elements<X>(y, image, h, w);
        set_few(pixel, number, covered ? before : shape.channels);
        if (covered) set_few(pixel + before + count.channels, number, after);
      }
    }
    if (!inside) continue;
    const int64_t row_of_x = call.from.height + row * call.step.height;
    const X* at = elements<X>(x, image, row_of_x, call.from.width) + call.from.channels;
    if (at == to) continue;  // the input lies where it belongs
    const int64_t step = call.step.width * x.pixel;
    for (int64_t w = 0; w < count.width; ++w, at += step, to += y.pixel) {
      if (call.step.channels == 1)
        copy_few(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(at),
                 count.channels * static_cast<int64_t>(sizeof *to));
      else
        for (int64_t c = 0; c < count.channels; ++c) to[c] = at[c * call.step.channels];
    }
  }
}

inline void run_move(const MoveCall& call, int64_t begin, int64_t end) {
  with_element(call.y.dtype, [&](auto* x) { move_rows<std::remove_pointer_t<decltype(x)>>(call, begin, end); });
}
