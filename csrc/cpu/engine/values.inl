// Numbers of a value in memory, float32 or quantized, and floats in registers.

typedef uint8_t Bytes __attribute__((vector_size(BQNN_LANES)));

// Numbers of an element type: how they are read and written. A vector that is read may go on beyond the last number.
template <class Element>
struct Numbers;

template <>
struct Numbers<float> {
  BQNN_INLINE explicit Numbers(const View&) {}
  BQNN_INLINE Float read(const float* p) const { return load(p); }
  BQNN_INLINE void write(float* p, Float x) const { store(p, x); }
  BQNN_INLINE void write(float* p, Float x, int count) const {
    if (count == kLanes) return store(p, x);
    float all[kLanes];
    store(all, x);
    for (int i = 0; i < count; ++i) p[i] = all[i];
  }
};

template <>
struct Numbers<uint8_t> {
  float scale, inverse, zero;

  BQNN_INLINE explicit Numbers(const View& view)
      : scale(view.scale), inverse(1.0f / view.scale), zero(static_cast<float>(view.zero)) {}
  BQNN_INLINE Float read(const uint8_t* p) const {
    Bytes bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    return (to_float(__builtin_convertvector(bytes, Int)) - zero) * scale;
  }
  // The nearest, ties to even; a NaN becomes the least.
  BQNN_INLINE Bytes quantize(Float x) const {
    const Float q = round(min(max(x * inverse, broadcast(-zero)), broadcast(255.0f - zero))) + zero;
    return __builtin_convertvector(to_int(q), Bytes);
  }
  BQNN_INLINE void write(uint8_t* p, Float x) const {
    const Bytes bytes = quantize(x);
    __builtin_memcpy(p, &bytes, sizeof bytes);
  }
  BQNN_INLINE void write(uint8_t* p, Float x, int count) const {
    const Bytes bytes = quantize(x);
    if (count == kLanes) return (void)__builtin_memcpy(p, &bytes, sizeof bytes);
    uint8_t all[kLanes];
    __builtin_memcpy(all, &bytes, sizeof bytes);
    for (int i = 0; i < count; ++i) p[i] = all[i];
  }
};

// Calls f with a null pointer of the element type.
template <class F>
BQNN_INLINE void with_element(Dtype dtype, const F& f) {
  if (dtype == Dtype::uint8) return f(static_cast<uint8_t*>(nullptr));
  return f(static_cast<float*>(nullptr));
}

template <class Element>
BQNN_INLINE Element* elements(const View& view, int64_t image, int64_t h, int64_t w = 0) {
  return reinterpret_cast<Element*>(view.data) + image * view.image + h * view.row + w * view.pixel;
}

// tanh by the exponential function.
BQNN_INLINE Float hyperbolic_tangent(Float x) {
  const Float e = exp(-2.0f * abs(x)), y = (1.0f - e) / (1.0f + e);
  return select(x < 0.0f, -y, y);
}

BQNN_INLINE Float hard_gate(Float x) { return min(max(x + 3.0f, broadcast(0.0f)), broadcast(6.0f)); }

BQNN_INLINE Float activate(const Activation& of, Float x) {
  switch (of.function) {
    case Function::clamp: return min(broadcast(of.high), max(broadcast(of.low), x));
    case Function::leaky_relu: return select(x >= 0.0f, x, x * of.low);
    case Function::hardswish: return x * hard_gate(x) / 6.0f;
    case Function::hardsigmoid: return hard_gate(x) / 6.0f;
    case Function::sigmoid: return sigmoid(x);
    case Function::silu: return x * sigmoid(x);
    case Function::gelu: return x * (0.5f * erfc(x * -0.70710678f));
    case Function::gelu_tanh: {
      const Float inner = 0.79788456f * (x + 0.044715f * x * x * x);
      return x * (0.5f * (1.0f + hyperbolic_tangent(inner)));
    }
    case Function::tanh: return hyperbolic_tangent(x);
    default: return x;
  }
}

// Calls f(first channel, how many count) for the channels in vectors. The last vector begins where it is whole, so that
// some channels are computed twice, unless there are too few for one.
template <class F>
BQNN_INLINE void for_channels(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(c, kLanes);
  if (c == channels) return;
  if (channels > kLanes)
    f(channels - kLanes, kLanes);
  else
    f(c, static_cast<int>(channels - c));
}
