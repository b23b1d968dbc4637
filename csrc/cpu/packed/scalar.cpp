// What any processor runs: vectors of four, which are SSE2 on x86-64 and NEON on AArch64.
#include "cpu/base/scratch.h"
#include "cpu/packed/select.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define BQNN_LANES 4

namespace bqnn::scalar {
#include "cpu/packed/vector.inl"
}  // namespace bqnn::scalar
