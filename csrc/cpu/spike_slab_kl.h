// spike_slab_kl: the divergence from the multiple spike-and-slab prior, its sum over the weights and its gradients.
#pragma once

#include <cstdint>

#include "isa.h"
#include "parallel.h"

namespace bqnn {

// Weights that share a codebook, in rows: all float32, contiguous.
struct SpikeSlabKl {
  const float* weight;      // [rows, columns]
  const float* log_sigma2;  // [rows, columns]
  const float* levels;      // [rows or 1, num_levels], increasing
  const float* tau;         // the shape of levels, positive
  int64_t rows, columns;
  bool per_row;    // whether each row has a codebook of its own
  int num_levels;  // 2..16
};

// The sum over all weights, in nats.
float spike_slab_kl(const Parallel& parallel, Isa isa, const SpikeSlabKl& prior);

struct SpikeSlabKlGradients {
  float* weight;      // [rows, columns]
  float* log_sigma2;  // [rows, columns]
  float* levels;      // [rows or 1, num_levels]
};

// Fills the gradients of `grad` times the sum; recomputes what they need.
void spike_slab_kl_backward(const Parallel& parallel, Isa isa, const SpikeSlabKl& prior, float grad,
                            const SpikeSlabKlGradients& gradients);

// --- what a kernel is given: weights of one codebook that lie in a row ------------------------------------------

struct SpikeSlabKlBlock {
  const float* weight;      // [count]
  const float* log_sigma2;  // [count]
  int64_t count;
  const float* levels;  // [num_levels]
  const float* tau;     // [num_levels]
  int num_levels;
};

// Returns the block's sum.
using SpikeSlabKlFwdKernel = double (*)(const SpikeSlabKlBlock& block);

// Writes grad_weight and grad_log_sigma2, [count], and the block's sums of the levels' gradients, [num_levels].
using SpikeSlabKlBwdKernel = void (*)(const SpikeSlabKlBlock& block, float grad, float* grad_weight,
                                      float* grad_log_sigma2, double* grad_levels);

}  // namespace bqnn
