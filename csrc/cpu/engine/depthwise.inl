// Depthwise convolutions: sums of taps, with channels in the lanes. Bytes are multiplied four taps at a time: those of a
// channel are brought together in a lane.

#if BQNN_LANES == 4
constexpr int kDepthwiseChannels = 2 * kLanes, kBytePixels = 1;
#else
constexpr int kDepthwiseChannels = 32, kBytePixels = BQNN_LANES == 16 ? 4 : 2;
#endif
constexpr int kDepthwiseVectors = kDepthwiseChannels / kLanes;
constexpr int kFloatPixels = 4;  // pixels of a row that share the loads of their taps

// Where the bytes of the taps lie from a pixel's first one on, four of a quad after another; what is missing at the end
// has a weight of zero.
inline const int64_t* tap_offsets(const ConvCall& call) {
  const Window& w = call.conv->window;
  const int64_t taps = w.kernel_h * w.kernel_w, all = 4 * ceil_div(taps, 4);
  auto* offsets = room<int64_t>(Scratch::offsets, all);
  for (int64_t t = 0; t < all; ++t) {
    const int64_t tap = smaller(t, taps - 1);
    offsets[t] = call.x.bytes(tap / w.kernel_w * w.dilation_h * call.x.row +
                              tap % w.kernel_w * w.dilation_w * call.x.pixel);
  }
  return offsets;
}

#if BQNN_LANES >= 8
// Sums of 32 channels, eight in each vector; until they are sorted, the first four of which lie 16 before the others.
struct DepthwiseSums {
  __m256i sum[4] = {};

  static BQNN_INLINE __m256i load_32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

  // Adds the products of four taps of 32 channels and their weights.
  BQNN_INLINE void add(const uint8_t* x, const int64_t* offset, const __m256i* weight) {
    const __m256i a = load_32(x + offset[0]), b = load_32(x + offset[1]);
    const __m256i c = load_32(x + offset[2]), d = load_32(x + offset[3]);
    const __m256i ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d);
    const __m256i more_ab = _mm256_unpackhi_epi8(a, b), more_cd = _mm256_unpackhi_epi8(c, d);
    sum[0] = dot(_mm256_unpacklo_epi16(ab, cd), weight[0], sum[0]);
    sum[1] = dot(_mm256_unpackhi_epi16(ab, cd), weight[1], sum[1]);
    sum[2] = dot(_mm256_unpacklo_epi16(more_ab, more_cd), weight[2], sum[2]);
    sum[3] = dot(_mm256_unpackhi_epi16(more_ab, more_cd), weight[3], sum[3]);
  }

  static BQNN_INLINE __m256i dot(__m256i x, __m256i w, __m256i sum) {
#if BQNN_LANES == 16
    return _mm256_dpbusd_epi32(sum, x, w);
#else
    // Two products of 255 and 64, which no weight exceeds, fit 16 bits.
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
#endif
  }

  // The weights of a quad in the order of the sums.
  static BQNN_INLINE void load_weights(const int8_t* w, __m256i* weight) {
    BQNN_UNROLL(4) for (int v = 0; v < 4; ++v) {
      const auto *low = reinterpret_cast<const __m128i*>(w + 16 * v), *high = low + 4;
      weight[v] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)), _mm_loadu_si128(high), 1);
    }
  }

  BQNN_INLINE void sorted(UInt* to) const {
    const __m256i all[4] = {
        _mm256_permute2x128_si256(sum[0], sum[1], 0x20), _mm256_permute2x128_si256(sum[2], sum[3], 0x20),
        _mm256_permute2x128_si256(sum[0], sum[1], 0x31), _mm256_permute2x128_si256(sum[2], sum[3], 0x31)};
    BQNN_UNROLL(4) for (int v = 0; v < kDepthwiseVectors; ++v)
#if BQNN_LANES == 16
      to[v] = (UInt)_mm512_inserti64x4(_mm512_castsi256_si512(all[2 * v]), all[2 * v + 1], 1);
#else
      to[v] = (UInt)all[v];
#endif
  }
};
#endif

// Sums of kPixels pixels, `step` bytes apart, for the channels of a block, [kPixels][kDepthwiseVectors].
template <int kPixels>
BQNN_INLINE void sum_bytes(const uint8_t* x, int64_t step, const int64_t* offset, int64_t quads, const int8_t* weights,
                           int64_t channels, UInt* sum) {
#if BQNN_LANES >= 8
  DepthwiseSums sums[kPixels];
  for (int64_t q = 0; q < quads; ++q, offset += 4, weights += 4 * channels) {
    __m256i weight[4];
    DepthwiseSums::load_weights(weights, weight);
    BQNN_UNROLL(4) for (int p = 0; p < kPixels; ++p) sums[p].add(x + p * step, offset, weight);
  }
  BQNN_UNROLL(4) for (int p = 0; p < kPixels; ++p) sums[p].sorted(sum + p * kDepthwiseVectors);
#else
  for (int v = 0; v < kPixels * kDepthwiseVectors; ++v) sum[v] = UInt{};
  for (int64_t q = 0; q < quads; ++q, weights += 4 * channels)
    for (int t = 0; t < 4; ++t)
      for (int i = 0; i < kPixels * kDepthwiseChannels; ++i) {
        const int pixel = i / kDepthwiseChannels, channel = i % kDepthwiseChannels;
        const int number = x[pixel * step + offset[4 * q + t] + channel];
        sum[i / kLanes][i % kLanes] += static_cast<uint32_t>(number * weights[4 * channel + t]);
      }
#endif
}

// The same of floats, and two vectors of channels.
template <int kPixels>
BQNN_INLINE void sum_floats(const float* x, const Conv& conv, int64_t row, int64_t pixel, int64_t channel, UInt* sum) {
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

// The channels [channel, channel + channels) of a pixel, from the sums of their vectors.
template <class F, int kVectorsOfPixel>
BQNN_INLINE void finish_pixel(const F& finish, const typename F::Channels* of, const UInt* sum, typename F::Y* y,
                              const char* residual, int64_t channel, int64_t channels) {
  constexpr int kTogether = F::kStoresTogether && kVectorsOfPixel % kBytesTogether == 0 ? kBytesTogether : 1;
  const auto value = [&](int v) BQNN_LAMBDA { return finish.value(sum[v], of[v], residual, channel + v * kLanes); };
  int v = 0;
  if constexpr (kTogether > 1)
    for (; v < kVectorsOfPixel && (v + kTogether) * kLanes <= channels; v += kTogether) {
      Int bytes[kTogether];
      BQNN_UNROLL(4) for (int i = 0; i < kTogether; ++i) bytes[i] = value(v + i);
      store_saturated_together(y + v * kLanes, bytes);
    }
  for (; v < kVectorsOfPixel; ++v)
    if (v * kLanes < channels) finish.store(y + v * kLanes, value(v), lanes_left(channels - v * kLanes));
}

template <class X, class F>
inline void depthwise_rows(const ConvCall& call, const F& finish, int64_t begin, int64_t end) {
  using Y = typename F::Y;
  constexpr bool kBytes = std::is_same_v<X, uint8_t>;
  constexpr int kPixels = kBytes ? kBytePixels : kFloatPixels, kVectorsOfPixel = kBytes ? kDepthwiseVectors : 2;
  const Conv& conv = *call.conv;
  const Window& window = conv.window;
  const Shape& shape = call.y.shape;
  const int64_t step = window.stride_w * call.x.pixel, padded = conv.channels() + kSlack / 2;
  const int64_t* offsets = kBytes ? tap_offsets(call) : nullptr;
  const int64_t quads = ceil_div(window.kernel_h * window.kernel_w, 4);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / shape.height, h = unit % shape.height;
    const X* row = elements<X>(call.x, image, h * window.stride_h - window.top, -window.left);
    for (int64_t c = 0; c < shape.channels; c += kVectorsOfPixel * kLanes) {
      typename F::Channels of[kVectorsOfPixel];
      BQNN_UNROLL(4) for (int v = 0; v < kVectorsOfPixel; ++v) of[v] = finish.channels(c + v * kLanes);
      const auto pixels = [&](auto count, int64_t w) BQNN_LAMBDA {
        constexpr int kCount = decltype(count)::value;
        UInt sum[kCount * kVectorsOfPixel];
        const X* x = row + w * step + c;
        if constexpr (kBytes)
          sum_bytes<kCount>(x, step, offsets, quads, conv.integer_taps + 4 * c, padded, sum);
        else
          sum_floats<kCount>(x, conv, call.x.row, call.x.pixel, c, sum);
        BQNN_UNROLL(4) for (int p = 0; p < kCount; ++p) {
          const char* residual = call.residual.data == nullptr ? nullptr : call.residual.at(image, h, w + p);
          Y* y = elements<Y>(call.y, image, h, w + p) + c;
          finish_pixel<F, kVectorsOfPixel>(finish, of, sum + p * kVectorsOfPixel, y, residual, c, shape.channels - c);
        }
      };
      int64_t w = 0;
      for (; w + kPixels <= shape.width; w += kPixels) pixels(Constant<kPixels>{}, w);
      for (; w < shape.width; ++w) pixels(Constant<1>{}, w);
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
