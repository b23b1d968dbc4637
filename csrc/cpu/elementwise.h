// The kernels that treat a weight's elements one by one: a table of them for each instruction set.
//
// How to add a kernel: <op>_kernel.h holds it, in terms of vec.h; elementwise_kernels.h includes it and puts it into
// the table; the function that calls it, with threads and sums over blocks, is <op>.cpp.
#pragma once

#include "assign_codes.h"
#include "isa.h"
#include "spike_slab_kl.h"

namespace bqnn {

struct Elementwise {
  AssignCodesKernel assign_codes;
  SpikeSlabKlFwdKernel spike_slab_kl_fwd;
  SpikeSlabKlBwdKernel spike_slab_kl_bwd;
};

// The table of an instruction set; amx has no elementwise instructions of its own and takes avx512's.
const Elementwise& elementwise(Isa isa);

namespace scalar {
extern const Elementwise kElementwise;
}
namespace avx2 {
extern const Elementwise kElementwise;
}
namespace avx512 {
extern const Elementwise kElementwise;
}

}  // namespace bqnn
