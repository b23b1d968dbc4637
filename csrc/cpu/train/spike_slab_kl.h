// spike_slab_kl: the divergence from the multiple spike-and-slab prior, its sum over the weights and its gradients.
#pragma once

#include "cpu/base/isa.h"
#include "cpu/base/parallel.h"
#include "cpu/train/prior.h"

namespace bqnn {

struct SpikeSlabKl {
  PriorWeights weights;
  const float* tau;  // the shape of levels, positive
};

// The sum over all weights, in nats.
float spike_slab_kl(const Parallel& parallel, Isa isa, const SpikeSlabKl& prior);

// Fills the gradients of `grad` times the sum; recomputes what they need.
void spike_slab_kl_backward(const Parallel& parallel, Isa isa, const SpikeSlabKl& prior, float grad,
                            const PriorGradients& gradients);

// --- what a kernel is given -------------------------------------------------------------------------------------

// A codebook in the form that kernels want.
struct SpikeSlabKlCodebook {
  int num_levels;
  float level[kMaxLevels];
  float upper[kMaxLevels];         // the slab is centred at level m for weights in (upper[m - 1], upper[m]]
  float exponent[kMaxLevels];      // the window is 2^(exponent * distance^2)
  float inverse_tau2[kMaxLevels];  // 1 / tau^2
};

// The divergence F from the log-uniform prior as a function of a = distance^2 / sigma^2, which is clipped, and dF/da:
// polynomials in t = x - 3/2 for a = x 2^n, 1 <= x < 2, a piece for each n. Column n & 31 is that of the piece n; the
// polynomial of F is to be taken as it is, that of dF/da times 2^-n.
struct LogUniformKl {
  static constexpr int kPieces = 32, kValueTerms = 8, kSlopeTerms = 10;
  float low, high;  // a is clipped to this
  alignas(64) float value[kValueTerms][kPieces];  // a vector of 16 lies in one cache line
  alignas(64) float slope[kSlopeTerms][kPieces];
};

// Returns the block's sum.
using SpikeSlabKlFwdKernel = double (*)(const SpikeSlabKlCodebook& codebook, const LogUniformKl& divergence,
                                        const PriorBlock& block);

// Writes grad_weight and grad_log_sigma2, [count], and the block's sums of the levels' gradients, [num_levels].
using SpikeSlabKlBwdKernel = void (*)(const SpikeSlabKlCodebook& codebook, const LogUniformKl& divergence,
                                      const PriorBlock& block, float grad, float* grad_weight, float* grad_log_sigma2,
                                      double* grad_levels);

}  // namespace bqnn
