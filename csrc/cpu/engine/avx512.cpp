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
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16")
#define BQNN_LANES 16
#define BQNN_NAME "AVX-512"

namespace bqnn::engine::avx512 {
#include "cpu/engine/engine.inl"
}  // namespace bqnn::engine::avx512

#pragma GCC pop_options

#endif
