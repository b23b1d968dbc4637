// The kernels that treat a weight's elements one by one: a table of them for each instruction set.
//
// How to add a kernel: <op>_kernel.h holds it, in terms of vec.inl; elementwise.inl includes it and puts it into
// the table; the function that calls it, with threads and sums over blocks, is <op>.cpp.
#pragma once

#include "cpu/base/isa.h"
#include "cpu/train/assign_codes.h"
#include "cpu/train/mixture_kl.h"
#include "cpu/train/noise.h"
#include "cpu/train/spike_slab_kl.h"
#include "cpu/train/weights.h"

namespace bqnn {

struct Elementwise {
  AssignCodesKernel assign_codes;
  SpikeSlabKlFwdKernel spike_slab_kl_fwd;
  SpikeSlabKlBwdKernel spike_slab_kl_bwd;
  MixtureKlFwdKernel mixture_kl_fwd;
  MixtureKlBwdKernel mixture_kl_bwd;
  void (*random_words)(uint64_t seed, uint64_t first, int64_t calls, uint32_t* out);
  void (*add_noise_tile)(const PlaneShape&, const Tile&, const Plane& mean, const Plane& variance, const Noise&,
                         bool keep_slope);
  void (*noise_gradient_tile)(const PlaneShape&, const Tile&, const Plane& grad, const Plane& variance, const Noise&,
                              const Plane& out);
  void (*multiply_tile)(const PlaneShape&, const Tile&, const Plane& grad, const Plane& slope, const Plane& out);
  void (*square_tile)(const PlaneShape&, const Tile&, const Plane& x, const Plane& out);
  void (*add_square_gradient_tile)(const PlaneShape&, const Tile&, const Plane& grad, const Plane& x,
                                   const Plane& grad_square);
  void (*sample_block)(const Posterior&, const Noise&, const Block&, float* quantized);
  void (*sample_backward_block)(const Posterior&, const Noise&, const Block&, const float* grad, float* grad_log_sigma2,
                                double* level_sums);
  void (*categorical_block)(const Posterior&, const Block&, float* mean, const Elements& variance);
  void (*gaussian_block)(const Posterior&, const Block&, float* mean, const Elements& variance);
  void (*categorical_backward_block)(const Posterior&, const Block&, const float* grad_mean,
                                     const Elements& grad_variance, float* grad_weight, float* grad_log_sigma2,
                                     double* sums);
  void (*gaussian_backward_block)(const Posterior&, const Block&, const Elements& grad_variance,
                                  float* grad_log_sigma2);
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
