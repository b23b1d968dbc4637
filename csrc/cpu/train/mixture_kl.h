// mixture_kl: a bound on the divergence from a mixture of Gaussians, a spike at each level and a slab at zero; its sum
// over the weights and its gradients.
#pragma once

#include "cpu/base/isa.h"
#include "cpu/base/parallel.h"
#include "cpu/train/prior.h"

namespace bqnn {

struct MixtureKl {
  PriorWeights weights;
  float slab_sigma2;   // positive
  double spike_width;  // the deviation of a spike, in narrowest gaps
  double slab_share;   // the slab's weight in the mixture; the spikes share what is left
};

// The sum over all weights, in nats.
float mixture_kl(const Parallel& parallel, Isa isa, const MixtureKl& prior);

// Fills the gradients of `grad` times the sum; recomputes what they need. Where several gaps of a codebook are the
// narrowest one, each gets an equal part of the gradient by the spikes' deviation.
void mixture_kl_backward(const Parallel& parallel, Isa isa, const MixtureKl& prior, float grad,
                         const PriorGradients& gradients);

// --- what a kernel is given -------------------------------------------------------------------------------------

// A component is a N(c, v) of share rho. Of log2(rho exp(-KL(q || component))), without what all components have in
// common, `share` is log2(rho / sqrt(v)), and `exponent` the factor of sigma^2 + (mu - c)^2, -log2(e) / (2 v).
struct MixtureComponent {
  float share, exponent, inverse_variance;
};

struct MixtureKlCodebook {
  int num_levels;
  float level[kMaxLevels];
  MixtureComponent spike, slab;
};

// Returns the block's sum.
using MixtureKlFwdKernel = double (*)(const MixtureKlCodebook& codebook, const PriorBlock& block);

// Writes grad_weight and grad_log_sigma2, [count], and the block's sums of the gradients by the levels, as far as the
// distances to them go, and by the logarithm of the spikes' variance, [num_levels + 1].
using MixtureKlBwdKernel = void (*)(const MixtureKlCodebook& codebook, const PriorBlock& block, float grad,
                                    float* grad_weight, float* grad_log_sigma2, double* sums);

}  // namespace bqnn
