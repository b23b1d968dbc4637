// The passes over a layer's weights that the training ops make: samples, moments and their gradients.
#pragma once

#include <cstdint>

#include "cpu/base/isa.h"
#include "cpu/base/parallel.h"
#include "cpu/train/codebook.h"
#include "cpu/train/noise.h"

namespace bqnn {

// The posterior of a layer and its codebooks; all contiguous.
struct Posterior {
  const float* weight;      // [weights]
  const float* log_sigma2;  // [weights], or null: no deviation
  const float* levels;      // [groups, num_levels]
  const float* thresholds;  // [groups, num_levels - 1]
  int64_t weights, groups;
  int num_levels;
};

// Weights [first, first + count), which share codebook `group`.
struct Block {
  int64_t group, first, count;
};

// How the moments of a weight are taken; in the order of MODES of the Python reference.
enum class Moments { categorical, gaussian, straight_through };

// quantized [weights] = Q(mu + sigma * noise).
void sample(const Parallel& parallel, Isa isa, const Posterior& posterior, Noise noise, float* quantized);

// The straight-through gradients: log_sigma2's (null without one) and the levels' from the one of the quantized weight.
void sample_backward(const Parallel& parallel, Isa isa, const Posterior& posterior, Noise noise, const float* grad,
                     float* grad_log_sigma2, float* grad_levels);

// mean and variance [weights]; a Gaussian's mean, the weight itself, is not written.
void moments(const Parallel& parallel, Isa isa, const Posterior& posterior, Moments mode, float* mean,
             Elements variance);

// The gradients of moments(); where mode is not categorical, mu's is grad_mean itself and the thresholds have none, and
// a Gaussian's levels have none: these are not written. grad_weight may be grad_mean itself.
void moments_backward(const Parallel& parallel, Isa isa, const Posterior& posterior, Moments mode,
                      const float* grad_mean, Elements grad_variance, float* grad_weight, float* grad_log_sigma2,
                      float* grad_levels, float* grad_thresholds);

}  // namespace bqnn
