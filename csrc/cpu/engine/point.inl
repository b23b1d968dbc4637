// Operators that treat each element by itself, and softmax. y may lie where a or b does: no element is read, or
// computed, once it has been written.

// Calls f(first channel, how many count) for the channels in vectors, each channel once.
template <class F>
BQNN_INLINE void for_each_once(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(c, kLanes);
  if (c < channels) f(c, static_cast<int>(channels - c));
}

// y = f(a, b) over rows of y; b has the elements of a, or one in place of an axis.
template <class A, class B, class Y, class F>
inline void each_pair(const PointCall& call, int64_t begin, int64_t end, const F& f) {
  const Shape &shape = call.y.shape, &other = call.b.shape;
  const Numbers<A> as(call.a);
  const Numbers<B> bs(call.b);
  const Numbers<Y> ys(call.y);
  const bool one_channel = other.channels == 1 && shape.channels > 1;
  const int64_t pixel = other.width == 1 ? 0 : call.b.pixel;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / shape.height, h = unit % shape.height;
    const A* a = elements<A>(call.a, image, h);
    const B* b = elements<B>(call.b, image, other.height == 1 ? 0 : h);
    Y* y = elements<Y>(call.y, image, h);
    for (int64_t w = 0; w < shape.width; ++w, a += call.a.pixel, b += pixel, y += call.y.pixel) {
      if (one_channel) {
        const Float value = broadcast(bs.read(b)[0]);
        for_each_once(shape.channels, [&](int64_t c, int lanes) {
          ys.write(y + c, f(as.read(a + c), value), lanes);
        });
      } else {
        for_each_once(shape.channels, [&](int64_t c, int lanes) {
          ys.write(y + c, f(as.read(a + c), bs.read(b + c)), lanes);
        });
      }
    }
  }
}

// y = f(a, channel) over rows of y. Pixels that lie side by side are one where f does not look at the channel.
template <class A, class Y, class F>
inline void each_one(const PointCall& call, int64_t begin, int64_t end, bool by_channel, const F& f) {
  const Shape& shape = call.y.shape;
  const Numbers<A> as(call.a);
  const Numbers<Y> ys(call.y);
  const bool flat = !by_channel && call.a.pixel == shape.channels && call.y.pixel == shape.channels;
  const int64_t pixels = flat ? 1 : shape.width, channels = flat ? shape.channels * shape.width : shape.channels;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / shape.height, h = unit % shape.height;
    const A* a = elements<A>(call.a, image, h);
    Y* y = elements<Y>(call.y, image, h);
    for (int64_t w = 0; w < pixels; ++w, a += call.a.pixel, y += call.y.pixel)
      for_each_once(channels, [&](int64_t c, int lanes) {
        ys.write(y + c, f(as.read(a + c), c), lanes);
      });
  }
}

// Calls f with what an activation does to a vector. Nothing and clamping, which are nearly all there is, ask nothing in
// between.
template <class F>
BQNN_INLINE void with_activation(const Activation& act, const F& f) {
  if (act.function == Function::none) return f([&](Float x) BQNN_LAMBDA { return x; });
  if (act.function == Function::clamp)
    return f([low = broadcast(act.low), high = broadcast(act.high)](Float x) BQNN_LAMBDA {
      return min(high, max(low, x));
    });
  f([&](Float x) BQNN_LAMBDA { return activate(act, x); });
}

// Calls f(first element, how many) for the elements [0, count): vectors that are stored together, then one by one.
template <class F, class G>
BQNN_INLINE void for_bytes(int64_t count, const F& together, const G& single) {
  constexpr int kTogether = kBytesTogether * kLanes;
  int64_t c = 0;
  for (; c + kTogether <= count; c += kTogether) together(c);
  for (; c < count; c += kLanes) single(c, lanes_left(count - c));
}

// Bytes of bytes, folded: see Bytes. Here a number a channel, which the pixels of a row have in common.
template <bool kClamps>
inline void folded_affine(const PointCall& call, int64_t begin, int64_t end) {
  constexpr int kTogether = kBytesTogether;
  const Shape& shape = call.y.shape;
  const Float low = broadcast(call.bytes.low), high = broadcast(call.bytes.high);
  const auto value = [&](const uint8_t* a, Float scale, Float shift) BQNN_LAMBDA {
    const Float x = Numbers<uint8_t>::stored(a) * scale + shift;
    return nearest_integers(kClamps ? min(max(x, low), high) : x);
  };
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / shape.height, h = unit % shape.height;
    const uint8_t* row = elements<uint8_t>(call.a, image, h);
    uint8_t* result = elements<uint8_t>(call.y, image, h);
    int64_t c = 0;
    for (; c + kTogether * kLanes <= shape.channels; c += kTogether * kLanes) {
      Float scale[kTogether], shift[kTogether];
      BQNN_UNROLL(4) for (int v = 0; v < kTogether; ++v)
        scale[v] = load(call.scale + c + v * kLanes), shift[v] = load(call.shift + c + v * kLanes);
      const uint8_t* a = row + c;
      uint8_t* y = result + c;
      for (int64_t w = 0; w < shape.width; ++w, a += call.a.pixel, y += call.y.pixel) {
        Int bytes[kTogether];
        BQNN_UNROLL(4) for (int v = 0; v < kTogether; ++v) bytes[v] = value(a + v * kLanes, scale[v], shift[v]);
        store_saturated_together(y, bytes);
      }
    }
    for (; c < shape.channels; c += kLanes) {
      const int lanes = lanes_left(shape.channels - c);
      const Float scale = load(call.scale + c), shift = load(call.shift + c);
      const uint8_t* a = row + c;
      uint8_t* y = result + c;
      int64_t w = 0;
      for (; w + kTogether <= shape.width; w += kTogether) {
        uint8_t* to[kTogether];
        Int bytes[kTogether];
        BQNN_UNROLL(4) for (int i = 0; i < kTogether; ++i, a += call.a.pixel, y += call.y.pixel)
          to[i] = y, bytes[i] = value(a, scale, shift);
        store_saturated(to, bytes, lanes);
      }
      for (; w < shape.width; ++w, a += call.a.pixel, y += call.y.pixel)
        store_saturated(y, value(a, scale, shift), lanes);
    }
  }
}

// What a folded step reads beside a, or does with it.
enum class Beside { nothing, added, multiplied };

// The same with one scale for all channels.
template <Beside kBeside, bool kClamps>
inline void folded_rows(const PointCall& call, int64_t begin, int64_t end) {
  constexpr bool kMultiplies = kBeside == Beside::multiplied;
  constexpr bool kOther = kMultiplies || kBeside == Beside::added;
  const Shape& shape = call.y.shape;
  const Float zero = broadcast(static_cast<float>(call.a.zero)), zero_of_b = broadcast(static_cast<float>(call.b.zero));
  const Float scale = broadcast(call.scale[0]), shift = broadcast(call.shift[0]);
  const Float ratio = broadcast(call.bytes.ratio), low = broadcast(call.bytes.low), high = broadcast(call.bytes.high);
  const Shape& other = call.b.shape;
  const bool flat = call.a.pixel == shape.channels && call.y.pixel == shape.channels &&
                    (!kOther || (call.b.pixel == shape.channels && other == shape));
  const int64_t pixels = flat ? 1 : shape.width, channels = flat ? shape.channels * shape.width : shape.channels;
  const int64_t pixel = other.width == 1 ? 0 : call.b.pixel;
  const bool one_channel = kOther && other.channels == 1 && shape.channels > 1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / shape.height, h = unit % shape.height;
    const uint8_t* a = elements<uint8_t>(call.a, image, h);
    const uint8_t* b = kOther ? elements<uint8_t>(call.b, image, other.height == 1 ? 0 : h) : nullptr;
    uint8_t* y = elements<uint8_t>(call.y, image, h);
    for (int64_t w = 0; w < pixels; ++w, a += call.a.pixel, b += pixel, y += call.y.pixel) {
      const auto value = [&](int64_t c) BQNN_LAMBDA {
        Float x = Numbers<uint8_t>::stored(a + c), other;
        if constexpr (kOther)
          other = one_channel ? broadcast(static_cast<float>(b[0])) : Numbers<uint8_t>::stored(b + c);
        if constexpr (kMultiplies) x = (x - zero) * (other - zero_of_b);
        x = x * scale + shift;
        if constexpr (kBeside == Beside::added) x += other * ratio;
        if constexpr (kClamps) x = min(max(x, low), high);
        return nearest_integers(x);
      };
      for_bytes(
          channels,
          [&](int64_t c) BQNN_LAMBDA {
            Int bytes[kBytesTogether];
            BQNN_UNROLL(4) for (int v = 0; v < kBytesTogether; ++v) bytes[v] = value(c + v * kLanes);
            store_saturated_together(y + c, bytes);
          },
          [&](int64_t c, int lanes) BQNN_LAMBDA { store_saturated(y + c, value(c), lanes); });
    }
  }
}

template <bool kClamps>
inline void run_folded(const PointCall& call, int64_t begin, int64_t end) {
  switch (call.op) {
    case Op::affine: return folded_affine<kClamps>(call, begin, end);
    case Op::add:
    case Op::sub: return folded_rows<Beside::added, kClamps>(call, begin, end);
    case Op::mul: return folded_rows<Beside::multiplied, kClamps>(call, begin, end);
    default: return folded_rows<Beside::nothing, kClamps>(call, begin, end);
  }
}

template <class A, class Y>
inline void point_rows(const PointCall& call, int64_t begin, int64_t end) {
  with_activation(call.activation, [&](const auto& act) BQNN_LAMBDA {
    if (call.op == Op::affine)
      return each_one<A, Y>(call, begin, end, true, [&](Float a, int64_t c) BQNN_LAMBDA {
        return act(a * load(call.scale + c) + load(call.shift + c));
      });
    if (call.op == Op::activation)
      return each_one<A, Y>(call, begin, end, false,
                            [&](Float a, int64_t) BQNN_LAMBDA { return act(a); });
    with_element(call.b.dtype, [&](auto* null) {
      using B = std::remove_pointer_t<decltype(null)>;
      if (call.op == Op::add)
        each_pair<A, B, Y>(call, begin, end, [&](Float a, Float b) BQNN_LAMBDA { return act(a + b); });
      else if (call.op == Op::sub)
        each_pair<A, B, Y>(call, begin, end, [&](Float a, Float b) BQNN_LAMBDA { return act(a - b); });
      else
        each_pair<A, B, Y>(call, begin, end, [&](Float a, Float b) BQNN_LAMBDA { return act(a * b); });
    });
  });
}

inline void run_point(const PointCall& call, int64_t begin, int64_t end) {
  if (call.bytes.folded) {
    const bool clamps = !kSaturates || !call.bytes.saturates;
    return (clamps ? run_folded<true> : run_folded<false>)(call, begin, end);
  }
  with_element(call.a.dtype, [&](auto* a) {
    with_element(call.y.dtype, [&](auto* y) {
      point_rows<std::remove_pointer_t<decltype(a)>, std::remove_pointer_t<decltype(y)>>(call, begin, end);
    });
  });
}

// Over the channels of each pixel; y is float32 and holds what is added up.
template <class X>
inline void softmax_rows(const PointCall& call, int64_t begin, int64_t end) {
  const Shape& shape = call.y.shape;
  const Numbers<X> numbers(call.a);
  for (int64_t unit = begin; unit < end; ++unit)
    for (int64_t w = 0; w < shape.width; ++w) {
      const X* x = elements<X>(call.a, unit / shape.height, unit % shape.height, w);
      float* y = elements<float>(call.y, unit / shape.height, unit % shape.height, w);
      float most = -__builtin_inff();
      for (int64_t c = 0; c < shape.channels; c += kLanes) {
        const int lanes = lanes_left(shape.channels - c);
        const Float value = numbers.read(x + c);
        for (int i = 0; i < lanes; ++i) {
          y[c + i] = value[i];
          most = value[i] > most || value[i] != value[i] ? value[i] : most;
        }
      }
      double total = 0.0;
      for (int64_t c = 0; c < shape.channels; c += kLanes) {
        const int lanes = lanes_left(shape.channels - c);
        const Float shifted = load_first(y + c, lanes) - most, power = exp(shifted);
        for (int i = 0; i < lanes; ++i) {
          total += power[i];
          y[c + i] = call.op == Op::softmax ? power[i] : shifted[i];
        }
      }
      const float log_total = log(broadcast(static_cast<float>(total)))[0];
      for (int64_t c = 0; c < shape.channels; ++c)
        y[c] = call.op == Op::softmax ? static_cast<float>(y[c] / total) : y[c] - log_total;
    }
}

inline void run_softmax(const PointCall& call, int64_t begin, int64_t end) {
  with_element(call.a.dtype, [&](auto* x) { softmax_rows<std::remove_pointer_t<decltype(x)>>(call, begin, end); });
}
