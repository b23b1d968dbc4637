// packed_linear and packed_conv2d on vectors: one source for every instruction set.
//
// A translation unit defines BQNN_LANES (16, 8 or 4) and includes this file inside a namespace of its own.
#pragma once

#include "vec.h"

#include "packed_shared.h"

#include "packed_operands.h"

#include "packed_transpose.h"

#include "packed_decode.h"

#include "packed_activations.h"

#include "packed_strip.h"

#include "packed_vector_linear.h"

#include "packed_vector_conv2d.h"

#if BQNN_LANES == 16
#include "packed_few_rows.h"

#include "packed_triples.h"
#endif

void linear(const LinearCall& call, const Parallel& parallel) {
#if BQNN_LANES == 16
  if (call.half ? run_triples<Bf16>(call, parallel) : run_triples<float>(call, parallel)) return;
  if (call.half ? run_few_rows<Bf16>(call, parallel) : run_few_rows<float>(call, parallel)) return;
#endif
  const bool int8 = call.weight->precision == Precision::int8;
  if (call.half)
    (int8 ? run_linear<Int8Operand, Bf16> : run_linear<FloatOperand, Bf16>)(call, parallel);
  else
    (int8 ? run_linear<Int8Operand, float> : run_linear<FloatOperand, float>)(call, parallel);
}

void conv2d(const Conv2dCall& call, const Parallel& parallel) {
  const bool int8 = call.weight->precision == Precision::int8;
  if (call.half)
    (int8 ? run_conv2d<Int8Operand, Bf16> : run_conv2d<FloatOperand, Bf16>)(call, parallel);
  else
    (int8 ? run_conv2d<Int8Operand, float> : run_conv2d<FloatOperand, float>)(call, parallel);
}
