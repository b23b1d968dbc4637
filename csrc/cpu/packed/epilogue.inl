// Reading activations, rounding them to operands, and writing outputs.
//
// Included inside the namespace of a translation unit that has set the target, after decode.inl.
#pragma once

BQNN_INLINE Float load_activations(const float* x, int count) { return load_first(x, count); }
BQNN_INLINE Float load_activations(const Bf16* x, int count) { return load_bfloat16_first(x, count); }

BQNN_INLINE void store_outputs(float* y, Float value, int count) { store_first(y, value, count); }
BQNN_INLINE void store_outputs(Bf16* y, Float value, int count) { store_bfloat16_first(y, value, count); }

// The largest magnitude of n numbers; a NaN counts as larger than everything.
template <class X>
inline float largest(const X* x, int64_t n) {
  constexpr int kChains = 4;  // a single one would wait for each comparison
  Int most[kChains] = {};     // magnitudes of floats compare as integers, NaN above infinity
  const auto see = [&](int64_t i, int chain, int count) __attribute__((always_inline)) {
    const Int bits = as_int(abs(load_activations(x + i, count)));
    most[chain] = select(bits > most[chain], bits, most[chain]);
  };
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) see(i + chain * kLanes, chain, kLanes);
  for (; i < n; i += kLanes) see(i, 0, lanes_left(n - i));
  float value = 0.0f;
  int32_t bits = 0;
  for (const Int& of_chain : most)
    for (int lane = 0; lane < kLanes; ++lane) bits = of_chain[lane] > bits ? of_chain[lane] : bits;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Activations rounded to what the operands can hold, still floats; those of pairs are rounded when they are stored.
template <class Op>
BQNN_INLINE Float rounded(Float x, bool bf16, const RowScale& row) {
  if constexpr (Op::kHalf) return x;
  if constexpr (!Op::kInt8) return bf16 ? widen(round_to_bfloat16(x)) : x;
  const Float q = (x * row.lift) * row.factor;  // NaN is what an infinite scale brings back: here any number will do
#if BQNN_LANES == 16
  return q;
#else
  return min(max(round(q), broadcast(-127.0f)), broadcast(127.0f));
#endif
}

// To the nearest integer, and where there is none to any.
BQNN_INLINE Int integers(Float rounded) {
#if BQNN_LANES == 16
  return (Int)_mm512_maskz_cvtps_epi32(0xFFFF, (__m512)rounded);
#else
  return to_int(rounded);
#endif
}

template <class Op>
BQNN_INLINE void store_operands(typename Op::Element* to, Float rounded, int count) {
  if constexpr (Op::kHalf) {
    store_bfloat16_first(to, rounded, count);
  } else if constexpr (Op::kInt8 && sizeof(typename Op::Element) < 4) {
    const Int q = integers(rounded) + static_cast<int>(Op::kZero);
#if BQNN_LANES == 16
    _mm512_mask_cvtepi32_storeu_epi8(to, (__mmask16)((1u << count) - 1u), (__m512i)q);
#else
    for (int i = 0; i < count; ++i) to[i] = static_cast<typename Op::Element>(q[i]);
#endif
  } else {
    store_first(to, rounded, count);
  }
}

// The operands of one number a lane, in its low bits, without kZero; integers have their sign above.
template <class Op>
BQNN_INLINE UInt operand_bits(Float rounded) {
  if constexpr (Op::kHalf) return bfloat16_lanes(rounded);
  if constexpr (Op::kInt8 && sizeof(typename Op::Element) < 4)
    return (UInt)integers(rounded);
  return (UInt)rounded;
}

template <class Op, class X>
__attribute__((noinline)) void pack_row(const X* x, int64_t n, bool bf16, const RowScale& row,
                                        typename Op::Element* to) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = lanes_left(n - i);
    store_operands<Op>(to + i, rounded<Op>(load_activations(x + i, count), bf16, row), count);
  }
}

// What turns the products of a strip's channels into outputs; the pointers are at its first channel.
struct Epilogue {
  const float* bias;      // or null
  const float* step;      // of the rounded levels, "int8" only
  const uint32_t* shift;  // what its products have too much where kZero is not 0, likewise
  float least;            // as least_output has it
};

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

// Outputs of n channels at one position; products go on to the end of a block.
template <class Op, class Y>
inline void finish_row(const typename Op::Product* products, int64_t n, const Epilogue& channels, float scale, Y* y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = lanes_left(n - i);
    store_outputs(y + i, Finish<Op>(channels, i, count)(load_lanes(products + i), scale), count);
  }
}

template <class Op, class Call>
inline Epilogue epilogue(const Call& call, int64_t group, int64_t block) {
  const PackedLayout& layout = *call.weight;
  const int64_t lane = (group * layout.blocks + block) * kBlock;
  const int64_t channel = group * layout.group_channels() + block * kBlock;
  Epilogue e{call.bias ? call.bias + channel : nullptr, nullptr, nullptr, least_output(call.relu)};
  if constexpr (Op::kInt8) e.step = layout.int8_scales() + lane, e.shift = layout.int8_shifts() + lane;
  return e;
}
