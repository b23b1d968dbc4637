// What becomes of products, a row a position: scaled, shifted, added to a residual, activated, and stored.

struct NoResidual {};

// Bytes of integers, folded: see Bytes.
template <class R, bool kClamps>
struct FoldedFinish {
  using Y = uint8_t;
  static constexpr bool kStoresTogether = true;
  const Conv& conv;
  const Float ratio = broadcast(conv.bytes.ratio), low = broadcast(conv.bytes.low), high = broadcast(conv.bytes.high);

  explicit FoldedFinish(const ConvCall& call) : conv(*call.conv) {}

  // The channels of a vector.
  struct Channels {
    Float scale, bias;
  };
  BQNN_INLINE Channels channels(int64_t channel) const {
    return {load(conv.scale + channel), load(conv.bias + channel)};
  }

  BQNN_INLINE Int value(UInt product, const Channels& of, const char* residual_at, int64_t channel) const {
    Float y = to_float((Int)product) * of.scale + of.bias;
    if constexpr (!std::is_same_v<R, NoResidual>)
      y += Numbers<R>::stored(reinterpret_cast<const R*>(residual_at) + channel) * ratio;
    if constexpr (kClamps) y = min(max(y, low), high);
    return nearest_integers(y);
  }
  static BQNN_INLINE void store(Y* to, Int y, int count) { store_saturated(to, y, count); }
};

// Bytes of integers that are activated, by one function: which one is known where the loops are compiled.
template <Function kFunction>
struct ActivatedFinish {
  using Y = uint8_t;
  static constexpr bool kStoresTogether = true;
  const Conv& conv;
  const Numbers<uint8_t> out;

  explicit ActivatedFinish(const ConvCall& call) : conv(*call.conv), out(call.y) {}

  struct Channels {
    Float scale, bias;
    UInt shift;
  };
  BQNN_INLINE Channels channels(int64_t channel) const {
    return {load(conv.scale + channel), load(conv.bias + channel), load_lanes(conv.shift + channel)};
  }

  BQNN_INLINE Int value(UInt product, const Channels& of, const char*, int64_t) const {
    return out.quantize(activate({kFunction}, to_float((Int)(product - of.shift)) * of.scale + of.bias));
  }
  static BQNN_INLINE void store(Y* to, Int y, int count) { store_saturated(to, y, count); }
};

// Everything else.
template <class Out, class R>
struct Finish {
  using Y = Out;
  static constexpr bool kStoresTogether = false;
  const ConvCall& call;
  const Numbers<Y> out{call.y};
  const Numbers<R> added{call.residual};
  const Activation act = call.conv->activation;
  const bool integers = call.conv->integers, residual = call.residual.data != nullptr;
  const bool clamps = act.function == Function::clamp || act.function == Function::none;
  const Float low = broadcast(act.function == Function::clamp ? act.low : -__builtin_inff());
  const Float high = broadcast(act.function == Function::clamp ? act.high : __builtin_inff());

  explicit Finish(const ConvCall& of) : call(of) {}

  struct Channels {
    Float scale, bias;
    UInt shift;
  };
  BQNN_INLINE Channels channels(int64_t channel) const {
    const Conv& conv = *call.conv;
    return {load(conv.scale + channel), load(conv.bias + channel), load_lanes(conv.shift + channel)};
  }

  BQNN_INLINE Float value(UInt product, const Channels& of, const char* residual_at, int64_t channel) const {
    Float y = (integers ? to_float((Int)(product - of.shift)) : (Float)product) * of.scale + of.bias;
    if (residual) y += added.read(reinterpret_cast<const R*>(residual_at) + channel);
    return clamps ? min(high, max(low, y)) : activate(act, y);
  }
  BQNN_INLINE void store(Y* to, Float y, int count) const { out.write(to, y, count); }
};

// Whether a call is one of hard-swish: of all functions but clamping, the one that takes no longer than the rest.
inline bool is_hardswish(const ConvCall& call) {
  return call.conv->activation.function == Function::hardswish && call.residual.data == nullptr;
}

// Whether bytes are made of integers, in one of the ways that with_bytes_finish knows.
inline bool finishes_bytes(const ConvCall& call) {
  if (!call.conv->integers || call.y.dtype != Dtype::uint8) return false;
  if (!call.conv->bytes.folded) return is_hardswish(call);
  return call.residual.data == nullptr || call.residual.dtype == Dtype::uint8;
}

// Calls f with what finishes such a call.
template <class F>
BQNN_INLINE void with_bytes_finish(const ConvCall& call, const F& f) {
  if (!call.conv->bytes.folded) return f(ActivatedFinish<Function::hardswish>(call));
  const bool clamps = !kSaturates || !call.conv->bytes.saturates;
  if (call.residual.data == nullptr)
    return clamps ? f(FoldedFinish<NoResidual, true>(call)) : f(FoldedFinish<NoResidual, false>(call));
  return clamps ? f(FoldedFinish<uint8_t, true>(call)) : f(FoldedFinish<uint8_t, false>(call));
}

// Calls f with what finishes a call.
template <class F>
BQNN_INLINE void with_finish(const ConvCall& call, const F& f) {
  if (finishes_bytes(call)) return with_bytes_finish(call, f);
  if (call.conv->bytes.folded) return f(FoldedFinish<float, true>(call));
  with_element(call.y.dtype, [&](auto* y) BQNN_LAMBDA {
    with_element(call.residual.dtype, [&](auto* residual) BQNN_LAMBDA {
      f(Finish<std::remove_pointer_t<decltype(y)>, std::remove_pointer_t<decltype(residual)>>(call));
    });
  });
}

// The channels of kVectorsOfRow vectors of a run, `stride` from one vector to the next, the first `lanes` of each.
// Bytes of a few positions are stored together.
template <int kVectorsOfRow, class F>
BQNN_INLINE void finish_vectors(const F& finish, const Positions& at, const Run& run, const uint32_t* products,
                                int64_t channel, int64_t stride, int lanes) {
  using Y = typename F::Y;
  typename F::Channels of[kVectorsOfRow];
  BQNN_UNROLL(4) for (int v = 0; v < kVectorsOfRow; ++v) of[v] = finish.channels(channel + v * stride);
  char* y = run.y + channel * static_cast<int64_t>(sizeof(Y));
  const char* residual = run.residual;
  int64_t i = 0;
  const auto each = [&](const auto& f) BQNN_LAMBDA {
    BQNN_UNROLL(4) for (int v = 0; v < kVectorsOfRow; ++v)
      f(v, reinterpret_cast<Y*>(y) + v * stride,
        finish.value(load_lanes(products + v * stride), of[v], residual, channel + v * stride));
    products += kWidth, y += at.step_y, residual += at.step_residual;
  };
  if constexpr (F::kStoresTogether && kBytesTogether % kVectorsOfRow == 0) {
    constexpr int kRows = kBytesTogether / kVectorsOfRow;
    for (; i + kRows <= run.count; i += kRows) {
      uint8_t* to[kBytesTogether];
      Int bytes[kBytesTogether];
      BQNN_UNROLL(4) for (int r = 0; r < kRows; ++r)
        each([&](int v, uint8_t* p, Int value) BQNN_LAMBDA {
          to[r * kVectorsOfRow + v] = p, bytes[r * kVectorsOfRow + v] = value;
        });
      store_saturated(to, bytes, lanes);
    }
  }
  for (; i < run.count; ++i)
    each([&](int, Y* p, auto value) BQNN_LAMBDA { finish.store(p, value, lanes); });
}

// The channels [channel, channel + width) of positions, whose products are rows of kWidth.
template <class F>
inline void finish_rows(const F& finish, const Positions& at, const uint32_t* products, int64_t channel,
                        int64_t width) {
  for (int64_t r = 0; r < at.num_runs; ++r) {
    const Run& run = at.runs[r];
    const uint32_t* row = products + run.row * kWidth;
    if (kVectors == 2 && width > kLanes) {  // the second vector begins where it is whole
      finish_vectors<2>(finish, at, run, row, channel, width - kLanes, kLanes);
      continue;
    }
    int64_t c = 0;
    for (; c + kLanes <= width; c += kLanes)
      finish_vectors<1>(finish, at, run, row + c, channel + c, 0, kLanes);
    if (c < width) finish_vectors<1>(finish, at, run, row + c, channel + c, 0, static_cast<int>(width - c));
  }
}

inline void finish_batch(const ConvCall& call, const uint32_t* products, const Positions& at, int64_t channel,
                         int64_t width) {
  with_finish(call, [&](const auto& finish) { finish_rows(finish, at, products, channel, width); });
}
