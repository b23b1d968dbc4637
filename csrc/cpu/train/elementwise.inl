// All elementwise kernels and their table, for the instruction set whose translation unit includes this, in that
// one's namespace. What is included here includes nothing itself.

#include "cpu/simd/vec.inl"

#include "cpu/simd/lanes.inl"

#include "cpu/train/assign_codes.inl"
#include "cpu/simd/bfloat16.inl"
#include "cpu/simd/elements.inl"
#include "cpu/train/mixture_kl.inl"
#include "cpu/train/philox.inl"
#include "cpu/train/spike_slab_kl.inl"

#include "cpu/train/noise.inl"
#include "cpu/train/sample.inl"

#include "cpu/train/moment.inl"

extern const Elementwise kElementwise = {
    assign_codes_kernel,
    spike_slab_kl_fwd_kernel,
    spike_slab_kl_bwd_kernel,
    mixture_kl_fwd_kernel,
    mixture_kl_bwd_kernel,
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
