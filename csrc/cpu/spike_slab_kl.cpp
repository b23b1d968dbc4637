#include "spike_slab_kl.h"

#include <algorithm>
#include <vector>

#include "elementwise.h"

namespace bqnn {
namespace {

constexpr int64_t kBlock = 4096;      // weights; sums over blocks are added in their order, whoever computed them
constexpr int64_t kGrain = 4 * 4096;  // weights that are worth a thread

// The blocks that a prior's weights fall into: none has weights of two codebooks.
struct Blocks {
  const SpikeSlabKl& prior;
  int64_t length;   // weights that share a codebook
  int64_t a_group;  // blocks that share a codebook
  int64_t count;

  explicit Blocks(const SpikeSlabKl& prior)
      : prior(prior),
        length(prior.per_row ? prior.columns : prior.rows * prior.columns),
        a_group((length + kBlock - 1) / kBlock),
        count(a_group * (prior.per_row ? prior.rows : 1)) {}

  int64_t grain() const { return std::max<int64_t>(1, kGrain / std::clamp<int64_t>(length, 1, kBlock)); }

  int64_t first(int64_t block) const { return block / a_group * length + block % a_group * kBlock; }

  SpikeSlabKlBlock operator[](int64_t block) const {
    const int64_t group = block / a_group, begin = first(block), codebook = group * prior.num_levels;
    const int64_t end = std::min(begin + kBlock, (group + 1) * length);
    return {prior.weight + begin,    prior.log_sigma2 + begin, end - begin, prior.levels + codebook,
            prior.tau + codebook, prior.num_levels};
  }
};

}  // namespace

float spike_slab_kl(const Parallel& parallel, Isa isa, const SpikeSlabKl& prior) {
  const auto kernel = elementwise(isa).spike_slab_kl_fwd;
  const Blocks blocks(prior);
  std::vector<double> sums(blocks.count);
  parallel_for(parallel, blocks.count, blocks.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) sums[b] = kernel(blocks[b]);
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return static_cast<float>(total);
}

void spike_slab_kl_backward(const Parallel& parallel, Isa isa, const SpikeSlabKl& prior, float grad,
                            const SpikeSlabKlGradients& gradients) {
  const auto kernel = elementwise(isa).spike_slab_kl_bwd;
  const Blocks blocks(prior);
  const int64_t groups = prior.per_row ? prior.rows : 1, num_levels = prior.num_levels;
  std::vector<double> sums(blocks.count * num_levels);
  parallel_for(parallel, blocks.count, blocks.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = blocks.first(b);
      kernel(blocks[b], grad, gradients.weight + first, gradients.log_sigma2 + first, &sums[b * num_levels]);
    }
  });
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t m = 0; m < num_levels; ++m) {
      double total = 0.0;
      for (int64_t b = 0; b < blocks.a_group; ++b) total += sums[(group * blocks.a_group + b) * num_levels + m];
      gradients.levels[group * num_levels + m] = static_cast<float>(total);
    }
  }
}

}  // namespace bqnn
