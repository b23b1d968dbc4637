// All elementwise kernels and their table, for the instruction set whose translation unit includes this, in that
// one's namespace. What is included here includes nothing itself.

#include "vec.h"

#include "assign_codes_kernel.h"
#include "spike_slab_kl_kernel.h"

extern const Elementwise kElementwise = {
    assign_codes_kernel,
    spike_slab_kl_fwd_kernel,
    spike_slab_kl_bwd_kernel,
};
