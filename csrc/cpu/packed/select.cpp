#include "cpu/packed/call.h"

namespace bqnn {

#define BQNN_DECLARE(isa)                          \
  namespace isa {                                  \
  void linear(const LinearCall&, const Parallel&); \
  void conv2d(const Conv2dCall&, const Parallel&); \
  }

BQNN_DECLARE(scalar)
#if defined(__x86_64__)
BQNN_DECLARE(avx2)
BQNN_DECLARE(avx512)
BQNN_DECLARE(amx)
#endif

#undef BQNN_DECLARE

const PackedKernels& packed_kernels(Isa isa) {
#if defined(__x86_64__)
  static constexpr PackedKernels kKernels[kIsas] = {{scalar::linear, scalar::conv2d},
                                                    {avx2::linear, avx2::conv2d},
                                                    {avx512::linear, avx512::conv2d},
                                                    {amx::linear, amx::conv2d}};
  return kKernels[static_cast<int>(isa)];
#else
  static constexpr PackedKernels kKernels = {scalar::linear, scalar::conv2d};
  (void)isa;
  return kKernels;
#endif
}

}  // namespace bqnn
