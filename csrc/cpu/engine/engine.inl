// The engine's kernels: one source for every instruction set.
//
// A translation unit defines BQNN_LANES (16, 8 or 4) and includes this file inside a namespace of its own.

#include "cpu/simd/vec.inl"
#include "cpu/simd/lanes.inl"
#include "cpu/simd/bfloat16.inl"
#include "cpu/simd/words.inl"
#include "cpu/simd/sizes.inl"
#include "cpu/packed/operands.inl"
#include "cpu/packed/decode.inl"
#include "cpu/engine/values.inl"
#include "cpu/engine/panels.inl"
#include "cpu/engine/place.inl"
#include "cpu/engine/products.inl"
#include "cpu/engine/outputs.inl"
#include "cpu/engine/rows.inl"
#include "cpu/engine/conv.inl"
#include "cpu/engine/filtered_words.inl"
#include "cpu/engine/filtered_floats.inl"
#include "cpu/engine/winograd.inl"
#include "cpu/engine/depthwise.inl"
#include "cpu/engine/point.inl"
#include "cpu/engine/pool.inl"
#include "cpu/engine/move.inl"

extern const Kernels kernels;
const Kernels kernels{kWidth,         kLanes,     &panel_words, &make_panel, &run_conv2d, &run_winograd, nullptr,
                      &run_depthwise, &run_point, &run_softmax, &run_pool,   &run_move,   &run_read,     &run_write,
                      BQNN_NAME};
