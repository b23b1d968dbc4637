// AMX: products of 16 x 64-byte tiles of bfloat16 or 8-bit integers. Activations that bfloat16 does not hold (NaN,
// infinity) are for the AVX-512 kernels, as select.cpp has it.
#include "cpu/base/scratch.h"
#include "cpu/packed/select.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(BQNN_EMULATE_TILES)
#include "tests/tiles.h"
#endif

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,fma,amx-tile,amx-bf16,amx-int8")
#define BQNN_LANES 16

namespace bqnn::amx {

#include "cpu/packed/common.inl"
#include "cpu/simd/tiles.inl"
#include "cpu/packed/amx/tile.inl"
#include "cpu/packed/amx/operands.inl"
#include "cpu/packed/amx/linear.inl"
#include "cpu/packed/amx/affine.inl"
#include "cpu/packed/amx/conv2d.inl"

bool linear_bf16(const PackedCall& call, const Parallel& parallel) { return run_linear<Bfloat16Tiles>(call, parallel); }
bool linear_int8(const PackedCall& call, const Parallel& parallel) { return run_linear<Int8Tiles>(call, parallel); }
bool conv2d_bf16(const PackedCall& call, const Parallel& parallel) { return run_conv2d<Bfloat16Tiles>(call, parallel); }
bool conv2d_int8(const PackedCall& call, const Parallel& parallel) { return run_conv2d<Int8Tiles>(call, parallel); }
bool conv2d_fp32(const PackedCall& call, const Parallel& parallel) { return run_conv2d<SplitTiles>(call, parallel); }
bool conv2d_fp32_affine(const PackedCall& call, const Parallel& parallel) {
  return run_conv2d<AffineTiles>(call, parallel);
}

}  // namespace bqnn::amx

#pragma GCC pop_options
#endif
