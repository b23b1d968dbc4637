#include "cpu/train/elementwise.h"

namespace bqnn {

const Elementwise& elementwise(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return avx512::kElementwise;
  if (isa == Isa::avx2) return avx2::kElementwise;
#endif
  return scalar::kElementwise;
}

}  // namespace bqnn
