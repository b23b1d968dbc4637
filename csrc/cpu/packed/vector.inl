// packed_linear and packed_conv2d on vectors: one source for every instruction set.
//
// A translation unit defines BQNN_LANES (16, 8 or 4) and includes this file inside a namespace of its own.

#include "cpu/packed/common.inl"
#include "cpu/packed/planar_pack.inl"
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

#define BQNN_KERNEL(name, ...) \
  bool name(const PackedCall& call, const Parallel& parallel) { return __VA_ARGS__(call, parallel), true; }

BQNN_KERNEL(linear_fp32, run_linear<FloatOperand>)
BQNN_KERNEL(linear_bf16, run_linear<Bfloat16Operand>)
BQNN_KERNEL(linear_int8, run_linear<Int8Operand>)
BQNN_KERNEL(conv2d_fp32, run_conv2d<FloatOperand>)
BQNN_KERNEL(conv2d_bf16, run_conv2d<Bfloat16Operand>)
BQNN_KERNEL(conv2d_int8, run_conv2d<Int8Operand>)
BQNN_KERNEL(planar_fp32, run_planar_conv2d<FloatOperand>)
BQNN_KERNEL(planar_bf16, run_planar_conv2d<Bfloat16Operand>)
BQNN_KERNEL(planar_int8, run_planar_conv2d<Int8Operand>)
#if BQNN_LANES == 16
BQNN_KERNEL(gemv_fp32, run_gemv<FloatOperand>)
BQNN_KERNEL(gemv_bf16, run_gemv<Bfloat16Operand>)
BQNN_KERNEL(gemv_int8, run_gemv<SignedOperand>)
BQNN_KERNEL(lookup_linear, run_lookup_linear)
BQNN_KERNEL(lookup_conv2d, run_lookup_conv2d)
#endif

#undef BQNN_KERNEL
