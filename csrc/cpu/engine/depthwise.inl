// Depthwise convolutions: sums of taps, with channels in the lanes. Integers are multiplied in 16 bits, in which a few
// products are added up before they are widened.

constexpr int kDepthwisePixels = 4;  // pixels of a row that share the loads of their taps

typedef int16_t Short __attribute__((vector_size(4 * BQNN_LANES)));  // of twice as many channels as there are lanes

BQNN_INLINE Short load_bytes_as_shorts(const uint8_t* p) {
#if BQNN_LANES == 16
  return (Short)_mm512_maskz_cvtepu8_epi16(~0u, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif BQNN_LANES == 8
  return (Short)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Short x = {};
  for (int i = 0; i < 2 * kLanes; ++i) x[i] = p[i];
  return x;
#endif
}

// Adds the two halves of a vector to sums of 32 bits.
BQNN_INLINE void add_halves(Short x, Int* low, Int* high) {
#if BQNN_LANES == 16
  const auto all = (__m512i)x;
  *low += (Int)_mm512_maskz_cvtepi16_epi32(0xFFFF, _mm512_castsi512_si256(all));
  *high += (Int)_mm512_maskz_cvtepi16_epi32(0xFFFF, _mm512_maskz_extracti64x4_epi64(0xFF, all, 1));
#elif BQNN_LANES == 8
  const auto all = (__m256i)x;
  *low += (Int)_mm256_cvtepi16_epi32(_mm256_castsi256_si128(all));
  *high += (Int)_mm256_cvtepi16_epi32(_mm256_extracti128_si256(all, 1));
#else
  for (int i = 0; i < kLanes; ++i) (*low)[i] += x[i], (*high)[i] += x[i + kLanes];
#endif
}

// Sums of kPixels pixels for the channels of two vectors, [kPixels][2].
template <int kPixels>
BQNN_INLINE void sum_taps(const uint8_t* x, const Conv& conv, int64_t row, int64_t pixel, int64_t channel, UInt* sum) {
  const Window& w = conv.window;
  const int64_t step = w.stride_w * pixel, channels = conv.channels() + kSlack / 2;
  const int together = 32767 / (255 * (conv.most_integer > 0 ? conv.most_integer : 1));
  const int16_t* tap = conv.integer_taps + channel;
  Short part[kPixels] = {};
  Int total[kPixels][2] = {};
  int left = together;
  for (int64_t r = 0; r < w.kernel_h; ++r)
    for (int64_t s = 0; s < w.kernel_w; ++s, tap += channels) {
      Short weight;
      __builtin_memcpy(&weight, tap, sizeof weight);
      const uint8_t* from = x + r * w.dilation_h * row + s * w.dilation_w * pixel;
      BQNN_UNROLL(4) for (int p = 0; p < kPixels; ++p) part[p] += load_bytes_as_shorts(from + p * step) * weight;
      if (--left > 0) continue;
      BQNN_UNROLL(4) for (int p = 0; p < kPixels; ++p)
        add_halves(part[p], &total[p][0], &total[p][1]), part[p] = Short{};
      left = together;
    }
  BQNN_UNROLL(4) for (int p = 0; p < kPixels; ++p) {
    add_halves(part[p], &total[p][0], &total[p][1]);
    sum[2 * p] = (UInt)total[p][0], sum[2 * p + 1] = (UInt)total[p][1];
  }
}

// The same for floats.
template <int kPixels>
BQNN_INLINE void sum_taps(const float* x, const Conv& conv, int64_t row, int64_t pixel, int64_t channel, UInt* sum) {
  const Window& w = conv.window;
  const int64_t step = w.stride_w * pixel, channels = conv.channels() + kSlack / 2;
  const float* tap = conv.taps + channel;
  Float total[kPixels][2] = {};
  for (int64_t r = 0; r < w.kernel_h; ++r)
    for (int64_t s = 0; s < w.kernel_w; ++s, tap += channels) {
      const Float low = load(tap), high = load(tap + kLanes);
      const float* from = x + r * w.dilation_h * row + s * w.dilation_w * pixel;
      BQNN_UNROLL(4) for (int p = 0; p < kPixels; ++p) {
        total[p][0] = multiply_add(load(from + p * step), low, total[p][0]);
        total[p][1] = multiply_add(load(from + p * step + kLanes), high, total[p][1]);
      }
    }
  BQNN_UNROLL(4) for (int p = 0; p < kPixels; ++p) sum[2 * p] = (UInt)total[p][0], sum[2 * p + 1] = (UInt)total[p][1];
}

template <class X, class F>
inline void depthwise_rows(const ConvCall& call, const F& finish, int64_t begin, int64_t end) {
  using Y = typename F::Y;
  const Conv& conv = *call.conv;
  const Window& window = conv.window;
  const Shape& shape = call.y.shape;
  const int64_t step = window.stride_w * call.x.pixel;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / shape.height, h = unit % shape.height;
    const X* row = elements<X>(call.x, image, h * window.stride_h - window.top, -window.left);
    for (int64_t c = 0; c < shape.channels; c += 2 * kLanes) {
      const int first = lanes_left(shape.channels - c);
      const int second = shape.channels - c > kLanes ? lanes_left(shape.channels - c - kLanes) : 0;
      const auto of_first = finish.channels(c), of_second = finish.channels(c + kLanes);
      const auto write = [&](const UInt* sum, int64_t w) BQNN_LAMBDA {
        const char* residual = call.residual.data == nullptr ? nullptr : call.residual.at(image, h, w);
        Y* y = elements<Y>(call.y, image, h, w) + c;
        finish.store(y, finish.value(sum[0], of_first, residual, c), first);
        if (second > 0) finish.store(y + kLanes, finish.value(sum[1], of_second, residual, c + kLanes), second);
      };
      UInt sum[2 * kDepthwisePixels];
      int64_t w = 0;
      for (; w + kDepthwisePixels <= shape.width; w += kDepthwisePixels) {
        sum_taps<kDepthwisePixels>(row + w * step + c, conv, call.x.row, call.x.pixel, c, sum);
        BQNN_UNROLL(4) for (int p = 0; p < kDepthwisePixels; ++p) write(sum + 2 * p, w + p);
      }
      for (; w < shape.width; ++w) {
        sum_taps<1>(row + w * step + c, conv, call.x.row, call.x.pixel, c, sum);
        write(sum, w);
      }
    }
  }
}

inline void run_depthwise(const ConvCall& call, int64_t begin, int64_t end) {
  with_element(call.x.dtype, [&](auto* x) {
    with_finish(call, [&](const auto& finish) {
      depthwise_rows<std::remove_pointer_t<decltype(x)>>(call, finish, begin, end);
    });
  });
}
