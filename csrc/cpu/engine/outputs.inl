// What becomes of products, a row a position: scaled, shifted, added to a residual, activated, and stored.

// What turns the products of some channels into outputs.
template <class Y, class R>
struct Finish {
  const ConvCall& call;
  const Numbers<Y> out{call.y};
  const Numbers<R> added{call.residual};
  const Activation act = call.conv->activation;
  const bool integers = call.conv->integers, residual = call.residual.data != nullptr;
  const bool clamps = act.function == Function::clamp || act.function == Function::none;
  // Where all that is left is clamping, an output in bytes is clamped once, after it was divided by its scale: that is
  // monotone, so that the result is the same.
  Float low = broadcast(act.function == Function::clamp ? act.low : -__builtin_inff());
  Float high = broadcast(act.function == Function::clamp ? act.high : __builtin_inff());

  explicit Finish(const ConvCall& of) : call(of) {
    if constexpr (sizeof(Y) == 1) {
      low = max(low * out.inverse, broadcast(-out.zero));
      high = min(high * out.inverse, broadcast(255.0f - out.zero));
    }
  }

  // The channels of a vector: their scales and what is added.
  struct Channels {
    Float scale, bias;
    UInt shift;
  };
  BQNN_INLINE Channels channels(int64_t channel) const {
    const Conv& conv = *call.conv;
    return {load(conv.scale + channel), load(conv.bias + channel), load_lanes(conv.shift + channel)};
  }

  BQNN_INLINE Float value(const uint32_t* products, const Channels& of, const char* residual_at,
                          int64_t channel) const {
    const UInt product = load_lanes(products);
    Float y = (integers ? to_float((Int)(product - of.shift)) : (Float)product) * of.scale + of.bias;
    if (residual) y += added.read(reinterpret_cast<const R*>(residual_at) + channel);
    return y;
  }

  BQNN_INLINE Int bytes(Float y) const {
    return clamps ? out.quantize(y, low, high) : out.quantize(activate(act, y));
  }

  BQNN_INLINE void store(Y* to, Float y, int count) const {
    if constexpr (sizeof(Y) == 1)
      store_bytes(to, bytes(y), count);
    else
      out.write(to, clamps ? min(high, max(low, y)) : activate(act, y), count);
  }
};

template <class Y, class R>
inline void finish(const ConvCall& call, const uint32_t* products, const Positions& at, int64_t count, int64_t channel,
                   int64_t width) {
  const Finish<Y, R> finish(call);
  int64_t c = 0;
  if constexpr (sizeof(Y) == 1)
    for (; c + 2 * kLanes <= width; c += 2 * kLanes) {
      const int64_t first = channel + c, second = first + kLanes;
      const auto of_first = finish.channels(first), of_second = finish.channels(second);
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t* from = products + at.row[i] * kWidth + c;
        const Int x = finish.bytes(finish.value(from, of_first, at.residual[i], first));
        const Int y = finish.bytes(finish.value(from + kLanes, of_second, at.residual[i], second));
        store_bytes_of_two(reinterpret_cast<uint8_t*>(at.y[i]) + first, x, y);
      }
    }
  for (; c < width; c += kLanes) {
    const int lanes = lanes_left(width - c);
    const auto of = finish.channels(channel + c);
    for (int64_t i = 0; i < count; ++i)
      finish.store(reinterpret_cast<Y*>(at.y[i]) + channel + c,
                   finish.value(products + at.row[i] * kWidth + c, of, at.residual[i], channel + c), lanes);
  }
}

inline void finish_batch(const ConvCall& call, const uint32_t* products, const Positions& at, int64_t count,
                         int64_t channel, int64_t width) {
  with_element(call.y.dtype, [&](auto* y) {
    with_element(call.residual.dtype, [&](auto* residual) {
      finish<std::remove_pointer_t<decltype(y)>, std::remove_pointer_t<decltype(residual)>>(call, products, at, count,
                                                                                           channel, width);
    });
  });
}
