// packed_linear and packed_conv2d on vectors: one source for every instruction set.
//
// A translation unit defines BQNN_LANES (16, 8 or 4) and includes this file inside a namespace of its own.
#pragma once

#include "cpu/simd/vec.inl"

#include "cpu/simd/lanes.inl"

#include "cpu/packed/shared.inl"

#include "cpu/simd/bfloat16.inl"

#include "cpu/packed/operands.inl"

#include "cpu/simd/transpose.inl"

#include "cpu/packed/decode.inl"

#include "cpu/packed/epilogue.inl"

#include "cpu/packed/panel.inl"

#include "cpu/packed/panel_linear.inl"

#include "cpu/packed/panel_conv2d.inl"

#include "cpu/packed/planar_conv2d.inl"

#if BQNN_LANES == 16
#include "cpu/packed/gemv_per_channel.inl"

#include "cpu/packed/gemv_linear.inl"

#include "cpu/packed/lut.inl"

#include "cpu/packed/lut_linear.inl"

#include "cpu/packed/lut_conv2d.inl"
#endif

#if BQNN_LANES != 16
using HalfOperand = FloatOperand;
#endif

template <class X>
inline void linear_of(const LinearCall& call, const Parallel& parallel) {
#if BQNN_LANES == 16
  if (run_sums<X>(call, parallel) || run_few_rows<X>(call, parallel)) return;
#endif
  const PackedLayout& layout = *call.weight;
  if (layout.precision == Precision::int8) return run_linear<Int8Operand, X>(call, parallel);
  if (layout.precision == Precision::bf16) return run_linear<HalfOperand, X>(call, parallel);
  run_linear<FloatOperand, X>(call, parallel);
}

// With lanes of pixels and the operands Planar, or lanes of channels and the operands Channels.
template <class Planar, class Channels, class X>
inline void run_operands(const Conv2dCall& call, const Parallel& parallel) {
  (planar_pays<Planar, Channels>(call) ? run_planar_conv2d<Planar, X> : run_conv2d<Channels, X>)(call, parallel);
}

template <class X>
inline void conv2d_of(const Conv2dCall& call, const Parallel& parallel) {
#if BQNN_LANES == 16
  if (run_sums_conv2d<X>(call, parallel)) return;
#endif
  const PackedLayout& layout = *call.weight;
  if (layout.precision == Precision::int8) return run_operands<Int8Operand, Int8Operand, X>(call, parallel);
  const bool bf16 = layout.precision == Precision::bf16;
  // A segment, or a pixel, of odd length would end in a pair with its neighbour, which may be infinite, times 0.
  if (bf16 && layout.inputs % 2 == 0) return run_operands<HalfOperand, HalfOperand, X>(call, parallel);
  if (bf16 && layout.segment % 2 == 0) return run_operands<FloatOperand, HalfOperand, X>(call, parallel);
  run_operands<FloatOperand, FloatOperand, X>(call, parallel);
}

void linear(const LinearCall& call, const Parallel& parallel) {
  (call.half ? linear_of<Bf16> : linear_of<float>)(call, parallel);
}

void conv2d(const Conv2dCall& call, const Parallel& parallel) {
  (call.half ? conv2d_of<Bf16> : conv2d_of<float>)(call, parallel);
}
