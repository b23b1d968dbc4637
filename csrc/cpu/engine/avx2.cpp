#include <algorithm>
#include <array>
#include <type_traits>

#include "cpu/base/few.h"
#include "cpu/base/scratch.h"
#include "cpu/engine/kernels.h"
#include "cpu/packed/call.h"

#if defined(__x86_64__)

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define BQNN_LANES 8
#define BQNN_NAME "AVX2"

namespace bqnn::engine::avx2 {
#include "cpu/engine/engine.inl"
}  // namespace bqnn::engine::avx2

#pragma GCC pop_options

#endif
