// Depthwise convolutions: sums of taps, with channels in the lanes. Integers are multiplied as floats, which hold their
// sums exactly.

constexpr int kDepthwisePixels = 4;  // pixels of a row that share the loads of their taps

// Sums of kPixels pixels, for the channels of a vector.
template <class X, int kPixels>
BQNN_INLINE void sum_taps(const X* x, const Conv& conv, int64_t row, int64_t pixel, const float* taps, int64_t channels,
                          Float* sum) {
  const Window& w = conv.window;
  const int64_t step = w.stride_w * pixel;
  BQNN_UNROLL(4) for (int p = 0; p < kPixels; ++p) sum[p] = Float{};
  for (int64_t r = 0; r < w.kernel_h; ++r)
    for (int64_t s = 0; s < w.kernel_w; ++s, taps += channels) {
      const Float tap = load(taps);
      const X* from = x + r * w.dilation_h * row + s * w.dilation_w * pixel;
      BQNN_UNROLL(4) for (int p = 0; p < kPixels; ++p) {
        Float value;
        if constexpr (sizeof(X) == 1) {
          value = to_float(load_bytes(from + p * step));
        } else {
          value = load(from + p * step);
        }
        sum[p] = multiply_add(value, tap, sum[p]);
      }
    }
}

template <class X, class Y>
inline void depthwise_rows(const ConvCall& call, int64_t begin, int64_t end) {
  const Conv& conv = *call.conv;
  const Window& window = conv.window;
  const Shape& shape = call.y.shape;
  const int64_t padded = shape.channels + kSlack / 4;
  const Numbers<Y> out(call.y);
  const bool residual = call.residual.data != nullptr;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / shape.height, h = unit % shape.height;
    const X* x = elements<X>(call.x, image, h * window.stride_h - window.top, -window.left);
    for_channels(shape.channels, [&](int64_t c, int lanes) {
      const Float scale = load(conv.scale + c), bias = load(conv.bias + c);
      const Float shift = to_float((Int)load_lanes(conv.shift + c));
      const auto finish = [&](Float sum, int64_t w) __attribute__((always_inline)) {
        Float y = (sizeof(X) == 1 ? sum - shift : sum) * scale + bias;
        if (residual)
          with_element(call.residual.dtype, [&](auto* r) __attribute__((always_inline)) {
            using R = std::remove_pointer_t<decltype(r)>;
            y += Numbers<R>(call.residual).read(elements<R>(call.residual, image, h, w) + c);
          });
        out.write(elements<Y>(call.y, image, h, w) + c, activate(conv.activation, y), lanes);
      };
      const int64_t step = window.stride_w * call.x.pixel;
      int64_t w = 0;
      Float sum[kDepthwisePixels];
      for (; w + kDepthwisePixels <= shape.width; w += kDepthwisePixels) {
        sum_taps<X, kDepthwisePixels>(x + w * step + c, conv, call.x.row, call.x.pixel, conv.taps + c, padded, sum);
        BQNN_UNROLL(4) for (int p = 0; p < kDepthwisePixels; ++p) finish(sum[p], w + p);
      }
      for (; w < shape.width; ++w) {
        sum_taps<X, 1>(x + w * step + c, conv, call.x.row, call.x.pixel, conv.taps + c, padded, sum);
        finish(sum[0], w);
      }
    });
  }
}

inline void run_depthwise(const ConvCall& call, int64_t begin, int64_t end) {
  with_element(call.x.dtype, [&](auto* x) {
    with_element(call.y.dtype, [&](auto* y) {
      depthwise_rows<std::remove_pointer_t<decltype(x)>, std::remove_pointer_t<decltype(y)>>(call, begin, end);
    });
  });
}
