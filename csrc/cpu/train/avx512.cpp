#include "cpu/train/elementwise.h"

#if defined(__x86_64__)

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16")
#define BQNN_LANES 16

namespace bqnn::avx512 {
#include "cpu/train/elementwise.inl"
}  // namespace bqnn::avx512

#pragma GCC pop_options

#endif
