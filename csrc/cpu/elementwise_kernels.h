// All elementwise kernels and their table, for the instruction set whose translation unit includes this, in that
// one's namespace. What is included here includes nothing itself.

#include "vec.h"

#include "lanes_kernel.h"

#include "assign_codes_kernel.h"
#include "bfloat16_kernel.h"
#include "elements_kernel.h"
#include "philox_kernel.h"
#include "spike_slab_kl_kernel.h"

#include "noise_kernel.h"
#include "sample_kernel.h"

#include "moment_kernel.h"

extern const Elementwise kElementwise = {
    assign_codes_kernel,
    spike_slab_kl_fwd_kernel,
    spike_slab_kl_bwd_kernel,
    random_words,
    add_noise_tile,
    noise_gradient_tile,
    multiply_tile,
    square_tile,
    add_square_gradient_tile,
    sample_block,
    sample_backward_block,
    categorical_block,
    gaussian_block,
    categorical_backward_block,
    gaussian_backward_block,
};
