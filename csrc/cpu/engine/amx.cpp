#include <algorithm>
#include <array>
#include <type_traits>

#include "cpu/base/scratch.h"
#include "cpu/engine/kernels.h"
#include "cpu/packed/call.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(BQNN_EMULATE_TILES)
#include "tests/tiles.h"
#endif

#pragma GCC push_options
#pragma GCC target("fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,amx-tile,amx-bf16,amx-int8")
#define BQNN_LANES 16

namespace bqnn::engine::amx {

#include "cpu/simd/vec.inl"
#include "cpu/simd/lanes.inl"
#include "cpu/simd/bfloat16.inl"
#include "cpu/simd/words.inl"
#include "cpu/simd/sizes.inl"
#include "cpu/simd/tiles.inl"
#include "cpu/packed/operands.inl"
#include "cpu/packed/decode.inl"
#include "cpu/engine/values.inl"
#include "cpu/engine/panels.inl"
#include "cpu/engine/place.inl"
#include "cpu/engine/outputs.inl"
#include "cpu/engine/tiles.inl"

}  // namespace bqnn::engine::amx

#pragma GCC pop_options

#endif
