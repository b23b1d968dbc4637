// What becomes of products: outputs, in whatever dtype and format the call has them.

// What turns the products of some blocks into outputs; the pointers are at their first channel.
struct Epilogue {
  const float* bias;      // or null
  const float* step;      // of the rounded levels, "int8" only
  const uint32_t* shift;  // what products have too much where kZero is not 0, "int8" only
  float least;            // what smaller outputs become: 0 is ReLU, and minus infinity leaves them as they are
};

template <class Op>
inline Epilogue epilogue(const PackedCall& call, int64_t group, int64_t block) {
  const PackedLayout& layout = *call.weight;
  const int64_t lane = (group * layout.blocks + block) * kBlock, channel = group * layout.group_channels + block * kBlock;
  const float least = call.activation == Activation::relu ? 0.0f : -__builtin_inff();
  Epilogue e{call.bias ? call.bias + channel : nullptr, nullptr, nullptr, least};
  if constexpr (Op::kInt8) e.step = layout.int8_scales() + lane, e.shift = layout.int8_shifts() + lane;
  return e;
}

// Makes outputs of the products of some channels at one position, or of one channel at some: each operation rounded by
// itself.
template <class Op>
struct Finish {
  Float bias = {}, step = {};
  UInt shift = {};
  bool has_bias;
  float least;

  // Channels i, i + 1, ..., of which `count` count; the layout's own vectors go on to the end of a block.
  BQNN_INLINE Finish(const Epilogue& of, int64_t i, int count) : has_bias(of.bias != nullptr), least(of.least) {
    if (has_bias) bias = load_first(of.bias + i, count);
    if constexpr (Op::kInt8) step = load(of.step + i);
    if constexpr (kShifted) shift = load_lanes(of.shift + i);
  }
  // Channel i.
  BQNN_INLINE Finish(const Epilogue& of, int64_t i) : has_bias(of.bias != nullptr), least(of.least) {
    if (has_bias) bias = broadcast(of.bias[i]);
    if constexpr (Op::kInt8) step = broadcast(of.step[i]);
    if constexpr (kShifted) shift = of.shift[i] - UInt{};
  }

  // The last operation is one instruction, and leaves NaN and -0.0 as torch's ReLU does.
  BQNN_INLINE Float operator()(UInt products, float scale) const {
    if constexpr (kShifted) products -= shift;
    Float value = (Float)products;
    if constexpr (Op::kInt8) value = (to_float((Int)products) * step) * scale;
    if (has_bias) value += bias;
    return max(broadcast(least), value);
  }

 private:
  static constexpr bool kShifted = Op::kInt8 && Op::kZero != 0;
  static_assert(!kShifted || Op::kZero == kInt8Offset, "the layout's shift is of another offset");
};

// Writes rows of a matrix from `first` on, `width` channels from a block on. Products go on to the end of a block, and
// are `stride` apart from those of the next row; each row has its scale.
template <class Op>
inline void finish_rows(const PackedCall& call, const typename Op::Product* products, int64_t stride, int64_t first,
                        int64_t count, int64_t block, int64_t width, const float* scales) {
  const Epilogue channels = epilogue<Op>(call, 0, block);
  with_elements(call.y, [&](auto* y) {
    y += first * call.y.image_stride + block * kBlock;
    for (int64_t row = 0; row < count; ++row, y += call.y.image_stride, products += stride)
      for (int64_t i = 0; i < width; i += kLanes) {
        const int lanes = lanes_left(width - i);
        store_numbers(y + i, Finish<Op>(channels, i, lanes)(load_lanes(products + i), Op::kInt8 ? scales[row] : 1.0f),
                      lanes);
      }
  });
}

// Writes `count` outputs of `width` channels from a block on, from output pixel `first` of an image on; products of a
// pixel are `stride` apart from those of the next.
template <class Op>
inline void finish_pixels(const PackedCall& call, const typename Op::Product* products, int64_t stride, int64_t image,
                          int64_t first, int64_t count, int64_t group, int64_t block, int64_t width, float scale) {
  const int64_t positions = call.out_height * call.out_width, pitch = call.y.pixel_stride;
  const int64_t channel = group * call.weight->group_channels + block * kBlock;
  const Epilogue channels = epilogue<Op>(call, group, block);
  with_elements(call.y, [&](auto* y) {
    y += image * call.y.image_stride;
    for (int64_t c = 0; c < width; c += kLanes) {
      const int lanes = lanes_left(width - c);
      if (call.y.format == Format::channels_last) {
        const Finish<Op> finish(channels, c, lanes);
        auto* to = y + first * pitch + channel + c;
        for (int64_t i = 0; i < count; ++i)
          store_numbers(to + i * pitch, finish(load_lanes(products + i * stride + c), scale), lanes);
        continue;
      }
      auto* to = y + (channel + c) * positions + first;
      for (int64_t i = 0; i < count; i += kLanes, to += kLanes) {
        const int pixels = lanes_left(count - i);
        UInt v[kLanes];
        BQNN_UNROLL(16) for (int p = 0; p < kLanes; ++p)
          v[p] = load_lanes(products + (i + (p < pixels ? p : 0)) * stride + c);
        transpose(v);
        BQNN_UNROLL(16) for (int of = 0; of < kLanes; ++of)
          if (of < lanes) store_numbers(to + of * positions, Finish<Op>(channels, c + of)(v[of], scale), pixels);
      }
    }
  });
}
