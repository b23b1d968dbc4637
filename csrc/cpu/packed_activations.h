// Reading activations, rounding them to operands, and writing outputs.
//
// Included inside the namespace of a translation unit that has set the target, after packed_decode.h.
#pragma once

BQNN_INLINE float widen(float x) { return x; }
BQNN_INLINE float widen(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

BQNN_INLINE void narrow(float x, float* y) { *y = x; }
BQNN_INLINE void narrow(float x, Bf16* y) {
  x = round_to_bf16(x);
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  *y = static_cast<Bf16>(bits >> 16);
}

// The largest magnitude of n numbers; a NaN counts as larger than everything.
template <class X>
inline float largest(const X* x, int64_t n) {
  int32_t most = 0;  // magnitudes of floats compare as integers, NaN above infinity
  for (int64_t i = 0; i < n; ++i) {
    const float value = widen(x[i]);
    int32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    bits &= 0x7FFFFFFF;
    most = bits > most ? bits : most;
  }
  float value;
  __builtin_memcpy(&value, &most, sizeof value);
  return value;
}

// An activation rounded to what the operands can hold, still a float.
template <class Op>
BQNN_INLINE float rounded(float x, bool bf16, const RowScale& row) {
  if constexpr (!Op::kInt8) return bf16 ? round_to_bf16(x) : x;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: from here on floats are integers, rounded to even
  float q = ((x * row.lift) * row.factor + kShift) - kShift;
  q = q > -127.0f ? q : -127.0f;  // NaN, which an infinite scale will bring back, becomes a number
  return q < 127.0f ? q : 127.0f;
}

template <class Op>
BQNN_INLINE typename Op::Element operand(float rounded) {
  using Element = typename Op::Element;
  if constexpr (Op::kHalf) {
    Element half;
    narrow(rounded, &half);
    return half;
  }
  if constexpr (!Op::kInt8) return rounded;
  return static_cast<Element>(static_cast<int32_t>(rounded) + static_cast<int32_t>(Op::kZero));
}

template <class Op, class X>
__attribute__((noinline)) void pack_row(const X* x, int64_t n, bool bf16, const RowScale& row,
                                        typename Op::Element* to) {
  if (bf16) {
    for (int64_t i = 0; i < n; ++i) to[i] = operand<Op>(rounded<Op>(widen(x[i]), true, row));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = operand<Op>(rounded<Op>(widen(x[i]), false, row));
  }
}

// What turns the products of a strip's channels into outputs; the pointers are at its first channel.
struct Epilogue {
  const float* bias;    // or null
  const float* step;    // of the rounded levels, "int8" only
  const int32_t* sums;  // of a channel's rounded weights
  float least;          // as least_output has it
};

// The output of channel i, each operation rounded by itself.
template <class Op>
BQNN_INLINE float output(typename Op::Product product, int64_t i, const Epilogue& channels, float scale) {
  float value;
  if constexpr (Op::kInt8) {
    const uint32_t shift = static_cast<uint32_t>(Op::kZero) * static_cast<uint32_t>(channels.sums[i]);
    const auto total = static_cast<int32_t>(static_cast<uint32_t>(product) - shift);
    value = (static_cast<float>(total) * channels.step[i]) * scale;
  } else {
    value = product;
  }
  if (channels.bias) value += channels.bias[i];
  return value < channels.least ? channels.least : value;
}

// Outputs of n channels at one position.
template <class Op, class Y>
inline void finish_row(const typename Op::Product* products, int64_t n, const Epilogue& channels, float scale, Y* y) {
  for (int64_t i = 0; i < n; ++i) narrow(output<Op>(products[i], i, channels, scale), y + i);
}

template <class Op, class Call>
inline Epilogue epilogue(const Call& call, int64_t group, int64_t block) {
  const PackedLayout& layout = *call.weight;
  const int64_t lane = (group * layout.blocks + block) * kBlock;
  const int64_t channel = group * layout.group_channels() + block * kBlock;
  Epilogue e{call.bias ? call.bias + channel : nullptr, nullptr, nullptr, least_output(call.relu)};
  if constexpr (Op::kInt8) e.step = layout.int8_scales() + lane, e.sums = layout.int8_sums() + lane;
  return e;
}
