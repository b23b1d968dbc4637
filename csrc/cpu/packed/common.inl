// What the vector and the tile kernels are both made of.
//
// A translation unit defines BQNN_LANES and includes this file inside a namespace of its own.

#include "cpu/simd/vec.inl"
#include "cpu/simd/lanes.inl"
#include "cpu/simd/bfloat16.inl"
#include "cpu/simd/words.inl"
#include "cpu/simd/transpose.inl"
#include "cpu/simd/sizes.inl"
#include "cpu/packed/shared.inl"
#include "cpu/packed/operands.inl"
#include "cpu/packed/decode.inl"
#include "cpu/packed/pack.inl"
#include "cpu/packed/epilogue.inl"
