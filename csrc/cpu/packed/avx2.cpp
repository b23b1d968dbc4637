#include "cpu/base/scratch.h"
#include "cpu/packed/select.h"

#if defined(__x86_64__)

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define BQNN_LANES 8

namespace bqnn::avx2 {
#include "cpu/packed/vector.inl"
}  // namespace bqnn::avx2

#pragma GCC pop_options

#endif
