// What any processor runs: vectors of four, which are SSE2 on x86-64 and NEON on AArch64.
#include <algorithm>
#include <array>
#include <type_traits>

#include "cpu/base/few.h"
#include "cpu/base/scratch.h"
#include "cpu/engine/kernels.h"
#include "cpu/packed/call.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define BQNN_LANES 4
#define BQNN_NAME "scalar"

namespace bqnn::engine::scalar {
#include "cpu/engine/engine.inl"
}  // namespace bqnn::engine::scalar
