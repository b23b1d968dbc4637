#include "cpu/train/weights.h"

#include "cpu/train/blocks.h"
#include "cpu/train/elementwise.h"

namespace bqnn {
namespace {

template <class F>
void for_each_block(const Parallel& parallel, const Posterior& q, const F& body) {
  const Blocks blocks(q.weights, q.groups);
  parallel_for(parallel, blocks.count(), kBlockGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(blocks[i]);
  });
}

// The sums of grad over the cells of mu.
void sum_over_cells(const Parallel& parallel, Isa isa, Posterior q, const float* grad, float* grad_levels) {
  q.log_sigma2 = nullptr;
  sample_backward(parallel, isa, q, Noise{}, grad, nullptr, grad_levels);
}

}  // namespace

void sample(const Parallel& parallel, Isa isa, const Posterior& q, Noise noise, float* quantized) {
  const auto kernel = elementwise(isa).sample_block;
  for_each_block(parallel, q, [&](const Block& block) { kernel(q, noise, block, quantized); });
}

void sample_backward(const Parallel& parallel, Isa isa, const Posterior& q, Noise noise, const float* grad,
                     float* grad_log_sigma2, float* grad_levels) {
  const auto kernel = elementwise(isa).sample_backward_block;
  sum_over_blocks(parallel, Blocks(q.weights, q.groups), q.num_levels, grad_levels,
                  [&](const Block& block, double* sums) { kernel(q, noise, block, grad, grad_log_sigma2, sums); });
}

void moments(const Parallel& parallel, Isa isa, const Posterior& q, Moments mode, float* mean, Elements variance) {
  const Elementwise& table = elementwise(isa);
  const auto kernel = mode == Moments::categorical ? table.categorical_block : table.gaussian_block;
  for_each_block(parallel, q, [&](const Block& block) {
    kernel(q, block, mode == Moments::gaussian ? nullptr : mean, variance);
  });
}

void moments_backward(const Parallel& parallel, Isa isa, const Posterior& q, Moments mode, const float* grad_mean,
                      Elements grad_variance, float* grad_weight, float* grad_log_sigma2, float* grad_levels,
                      float* grad_thresholds) {
  const Elementwise& table = elementwise(isa);
  if (mode != Moments::categorical) {
    for_each_block(parallel, q, [&](const Block& block) {
      table.gaussian_backward_block(q, block, grad_variance, grad_log_sigma2);
    });
    if (mode == Moments::straight_through) sum_over_cells(parallel, isa, q, grad_mean, grad_levels);
    return;
  }
  const int levels = q.num_levels, width = 2 * levels - 1;
  std::vector<float> sums(q.groups * width);
  sum_over_blocks(parallel, Blocks(q.weights, q.groups), width, sums.data(), [&](const Block& block, double* out) {
    table.categorical_backward_block(q, block, grad_mean, grad_variance, grad_weight, grad_log_sigma2, out);
  });
  for (int64_t group = 0; group < q.groups; ++group) {
    const float* row = sums.data() + group * width;
    for (int m = 0; m < levels; ++m) grad_levels[group * levels + m] = row[m];
    for (int j = 0; j + 1 < levels; ++j) grad_thresholds[group * (levels - 1) + j] = row[levels + j];
  }
}

}  // namespace bqnn
