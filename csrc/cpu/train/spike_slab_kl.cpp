#include "cpu/train/spike_slab_kl.h"

#include <cmath>

#include "cpu/train/elementwise.h"

namespace bqnn {
namespace {

// Molchanov et al., "Variational dropout sparsifies deep networks", eq. 14, as in the Python reference. With
// a = 1 / alpha and e = exp(-k2) a^k3 the sigmoid of k2 + k3 log alpha is 1 / (1 + e).
constexpr double kK1 = 0.63576, kK2 = 1.87320, kK3 = 1.48695, kLogAlphaLimit = 10.0;

double value_at(double a) {
  const double e = std::exp(kK3 * std::log(a) - kK2);
  return kK1 * e / (1.0 + e) + 0.5 * std::log1p(a);
}

double slope_at(double a) {
  const double e = std::exp(kK3 * std::log(a) - kK2);
  return kK1 * kK3 * e / ((1.0 + e) * (1.0 + e)) / a + 0.5 / (1.0 + a);
}

// Column `piece` of the polynomials of scale * f(a), by interpolation at Chebyshev's points.
template <int N>
void fit(double (*f)(double), int piece, double scale, float (&terms)[N][LogUniformKl::kPieces]) {
  double points[N], differences[N], c[N] = {};
  for (int i = 0; i < N; ++i) {
    points[i] = 0.5 * std::cos(std::acos(-1.0) * (i + 0.5) / N);
    differences[i] = scale * f(std::ldexp(points[i] + 1.5, piece));
  }
  for (int order = 1; order < N; ++order) {
    for (int i = N - 1; i >= order; --i) {
      differences[i] = (differences[i] - differences[i - 1]) / (points[i] - points[i - order]);
    }
  }
  // Newton's form to powers of t: c = c * (t - point) + difference.
  for (int i = N - 1; i >= 0; --i) {
    for (int k = N - 1; k > 0; --k) c[k] = c[k - 1] - points[i] * c[k];
    c[0] = differences[i] - points[i] * c[0];
  }
  for (int k = 0; k < N; ++k) terms[k][piece & (LogUniformKl::kPieces - 1)] = static_cast<float>(c[k]);
}

const LogUniformKl& log_uniform_kl() {
  static const LogUniformKl table = [] {
    LogUniformKl table = {};
    table.low = static_cast<float>(std::exp(-kLogAlphaLimit));
    table.high = static_cast<float>(std::exp(kLogAlphaLimit));
    const int first = std::ilogb(table.low), last = std::ilogb(table.high);
    for (int piece = first; piece <= last; ++piece) {
      fit(value_at, piece, 1.0, table.value);
      fit(slope_at, piece, std::ldexp(1.0, piece), table.slope);
    }
    return table;
  }();
  return table;
}

SpikeSlabKlCodebook make_codebook(const float* levels, const float* tau, int num_levels) {
  constexpr float kZeroToTau = 1e-3f, kInfinity = HUGE_VALF, kLog2e = 1.44269504f;
  SpikeSlabKlCodebook codebook = {};
  codebook.num_levels = num_levels;
  int zero = -1;  // the first level that is 0
  for (int m = num_levels - 1; m >= 0; --m) {
    codebook.level[m] = levels[m];
    codebook.upper[m] = m == num_levels - 1 ? kInfinity : 0.5f * (levels[m + 1] + levels[m]);
    codebook.inverse_tau2[m] = 1.0f / (tau[m] * tau[m]);
    codebook.exponent[m] = -0.5f * kLog2e * codebook.inverse_tau2[m];
    if (std::fabs(levels[m]) < kZeroToTau * tau[m]) zero = m;
  }
  for (int m = 0; zero >= 0 && m < num_levels; ++m) codebook.upper[m] = m < zero ? -kInfinity : kInfinity;
  return codebook;
}

SpikeSlabKlCodebook codebook_of(const SpikeSlabKl& prior, const Block& block) {
  const int num_levels = prior.weights.num_levels;
  const int64_t first = block.group * num_levels;
  return make_codebook(prior.weights.levels + first, prior.tau + first, num_levels);
}

}  // namespace

float spike_slab_kl(const Parallel& parallel, Isa isa, const SpikeSlabKl& prior) {
  const auto kernel = elementwise(isa).spike_slab_kl_fwd;
  return sum_over_blocks(parallel, prior.weights.blocks(), [&](const Block& block) {
    return kernel(codebook_of(prior, block), log_uniform_kl(), PriorBlock(prior.weights, block));
  });
}

void spike_slab_kl_backward(const Parallel& parallel, Isa isa, const SpikeSlabKl& prior, float grad,
                            const PriorGradients& gradients) {
  const auto kernel = elementwise(isa).spike_slab_kl_bwd;
  sum_over_blocks(parallel, prior.weights.blocks(), prior.weights.num_levels, gradients.levels,
                  [&](const Block& block, double* sums) {
                    kernel(codebook_of(prior, block), log_uniform_kl(), PriorBlock(prior.weights, block), grad,
                           gradients.weight + block.first, gradients.log_sigma2 + block.first, sums);
                  });
}

}  // namespace bqnn
