#include "cpu/train/mixture_kl.h"

#include <cmath>
#include <vector>

#include "cpu/train/elementwise.h"

namespace bqnn {
namespace {

// NaN where a level is.
double narrowest_gap(const float* levels, int num_levels) {
  double narrowest = HUGE_VAL;
  for (int m = 1; m < num_levels; ++m) {
    const double gap = static_cast<double>(levels[m]) - levels[m - 1];
    if (std::isnan(gap)) return gap;
    if (gap < narrowest) narrowest = gap;
  }
  return narrowest;
}

MixtureComponent component(double share, double variance) {
  constexpr double kLog2e = 1.4426950408889634;
  return {static_cast<float>(std::log2(share / std::sqrt(variance))), static_cast<float>(-0.5 * kLog2e / variance),
          static_cast<float>(1.0 / variance)};
}

MixtureKlCodebook codebook_of(const MixtureKl& prior, const Block& block) {
  const int num_levels = prior.weights.num_levels;
  const float* levels = prior.weights.levels + block.group * num_levels;
  const double deviation = prior.spike_width * narrowest_gap(levels, num_levels);
  MixtureKlCodebook codebook = {};
  codebook.num_levels = num_levels;
  for (int m = 0; m < num_levels; ++m) codebook.level[m] = levels[m];
  codebook.spike = component((1.0 - prior.slab_share) / num_levels, deviation * deviation);
  codebook.slab = component(prior.slab_share, prior.slab_sigma2);
  return codebook;
}

// Adds what the levels at the narrowest gap get of the gradient by the logarithm of the spikes' variance, which is
// twice that of the gap and a constant.
void add_through_narrowest_gap(const float* levels, int num_levels, double by_log_variance, float* gradients) {
  const double narrowest = narrowest_gap(levels, num_levels);
  const auto gap = [&](int m) { return static_cast<double>(levels[m]) - levels[m - 1]; };
  int tied = 0;
  for (int m = 1; m < num_levels; ++m) tied += gap(m) == narrowest;
  const double by_gap = 2.0 * by_log_variance / narrowest / tied;
  for (int m = 1; m < num_levels; ++m) {
    if (tied != 0 && gap(m) != narrowest) continue;  // none is NaN, where all of them get it
    gradients[m] = static_cast<float>(gradients[m] + by_gap);
    gradients[m - 1] = static_cast<float>(gradients[m - 1] - by_gap);
  }
}

}  // namespace

float mixture_kl(const Parallel& parallel, Isa isa, const MixtureKl& prior) {
  const auto kernel = elementwise(isa).mixture_kl_fwd;
  return sum_over_blocks(parallel, prior.weights.blocks(), [&](const Block& block) {
    return kernel(codebook_of(prior, block), PriorBlock(prior.weights, block));
  });
}

void mixture_kl_backward(const Parallel& parallel, Isa isa, const MixtureKl& prior, float grad,
                         const PriorGradients& gradients) {
  const auto kernel = elementwise(isa).mixture_kl_bwd;
  const int num_levels = prior.weights.num_levels, width = num_levels + 1;
  std::vector<float> sums(prior.weights.groups() * width);
  sum_over_blocks(parallel, prior.weights.blocks(), width, sums.data(), [&](const Block& block, double* block_sums) {
    kernel(codebook_of(prior, block), PriorBlock(prior.weights, block), grad, gradients.weight + block.first,
           gradients.log_sigma2 + block.first, block_sums);
  });
  for (int64_t group = 0; group < prior.weights.groups(); ++group) {
    const float* sum = sums.data() + group * width;
    float* levels = gradients.levels + group * num_levels;
    for (int m = 0; m < num_levels; ++m) levels[m] = sum[m];
    add_through_narrowest_gap(prior.weights.levels + group * num_levels, num_levels, sum[num_levels], levels);
  }
}

}  // namespace bqnn
