#include "packed.h"
namespace bqnn {
namespace avx512 { __attribute__((weak)) void linear(const LinearCall&, const Parallel&) { __builtin_abort(); } __attribute__((weak)) void conv2d(const Conv2dCall&, const Parallel&) { __builtin_abort(); } }
namespace amx { void linear(const LinearCall&, const Parallel&); void conv2d(const Conv2dCall&, const Parallel&); }
const PackedKernels& packed_kernels(Isa) { static const PackedKernels k{amx::linear, amx::conv2d}; return k; }
}
