// The kernels of spike_slab_kl; the formulas are those of bqnn/ops/spike_slab_kl.py.
//
// The slab's divergence is that of the spike at the level it is centred at, so that everything is a sum over levels,
// kl = sum_m part_m F(mu - c_m), with part_m the spike's share and, at the slab's level, the slab's as well.

constexpr int kMaxLevels = 16;

// Sums go lane by lane over 16 lanes whatever the vector's length, and are emptied into a double, lane after lane, often
// enough for float32: the same bits on every instruction set.
constexpr int kSumLanes = 16, kSumVectors = kSumLanes / kLanes;
constexpr int64_t kEmptyAfter = 1024;  // weights

struct Sum {
  Float lanes[kSumVectors];
};

BQNN_INLINE double empty(Sum* sum) {
  double total = 0.0;
  for (int v = 0; v < kSumVectors; ++v) {
    for (int i = 0; i < kLanes; ++i) total += static_cast<double>(sum->lanes[v][i]);
    sum->lanes[v] = Float{};
  }
  return total;
}

BQNN_INLINE Float keep(Mask mask, Float x) { return as_float(as_int(x) & mask); }

BQNN_INLINE Mask first_lanes(int count) {
  Int index = {};
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index < count;
}

// A codebook in the form that the kernels want.
struct Prior {
  int num_levels;
  float level[kMaxLevels];
  float upper[kMaxLevels];    // the slab is centred at level m for weights in (upper[m - 1], upper[m]]
  float exponent[kMaxLevels];  // the window is 2^(exponent * distance^2)
  float inverse_tau2[kMaxLevels];
};

BQNN_INLINE Prior make_prior(const SpikeSlabKlBlock& block) {
  constexpr float kZeroToTau = 1e-3f;
  Prior prior;
  prior.num_levels = block.num_levels;
  int zero = -1;
  for (int m = block.num_levels - 1; m >= 0; --m) {
    const float level = block.levels[m], tau = block.tau[m];
    prior.level[m] = level;
    prior.inverse_tau2[m] = 1.0f / (tau * tau);
    prior.exponent[m] = -0.5f * 1.44269504f * prior.inverse_tau2[m];
    if (__builtin_fabsf(level) < kZeroToTau * tau) zero = m;
  }
  for (int m = 0; m < block.num_levels; ++m) {
    const bool last = m == block.num_levels - 1;
    if (zero >= 0) {
      prior.upper[m] = m < zero ? -__builtin_inff() : __builtin_inff();
    } else {
      prior.upper[m] = last ? __builtin_inff() : 0.5f * (block.levels[m + 1] + block.levels[m]);
    }
  }
  return prior;
}

// How a weight's divergence is shared out among the levels.
struct Shares {
  Float window[kMaxLevels];  // Omega_m
  Float total;               // sum_m Omega_m
  Float scale;               // 1 / max(total, 1)
  Float slab;
};

BQNN_INLINE Shares make_shares(const Prior& prior, Float weight) {
  constexpr float kNegligible = -58.0f;  // 2^-58 is nothing beside the shares' sum, 1
  Shares shares;
  shares.total = Float{};
  for (int m = 0; m < prior.num_levels; ++m) {
    const Float distance = weight - prior.level[m];
    const Float exponent = distance * distance * prior.exponent[m];
    const Float window = exp2_in_range(max(broadcast(kNegligible), exponent));
    shares.window[m] = keep(~(exponent < kNegligible), window);
    shares.total += shares.window[m];
  }
  shares.scale = 1.0f / max(broadcast(1.0f), shares.total);
  shares.slab = max(Float{}, 1.0f - shares.total);
  return shares;
}

// F(d, sigma) and its slopes. With a = 1 / alpha = d^2 / sigma^2 and e = exp(-k2) a^k3 the sigmoid is 1 / (1 + e), and
//   F = k1 e / (1 + e) + log(1 + a) / 2,    -dF/dlog_sigma2 = k1 k3 e / (1 + e)^2 + a / (1 + a) / 2.
struct Divergence {
  Float value, by_distance, by_log_sigma2;
};

template <bool kSlopes>
BQNN_INLINE Divergence diverge(Float distance, Float inverse_sigma2) {
  constexpr float kK1 = 0.63576f, kK2 = 1.87320f, kK3 = 1.48695f, kLog2e = 1.44269504f;
  constexpr float kTiny = 1e-30f;                                 // keeps 0 out of the logarithm
  constexpr float kLow = 4.53999298e-5f, kHigh = 22026.4658f;  // exp(-10), exp(10): log alpha is clipped
  const Float raw = (kTiny + distance * distance) * inverse_sigma2;
  const Float a = clamp(raw, kLow, kHigh);
  const Float e = exp2_in_range((kK3 * kLog2e) * log_in_range(a) - kK2 * kLog2e);
  const Float one_a = 1.0f + a, one_e = 1.0f + e;
  // One division for 1 / (1 + a), 1 / (1 + e) and 1 / a.
  const Float both = one_a * one_e, inverse = 1.0f / (kSlopes ? both * a : both);
  const Float inverse_both = kSlopes ? inverse * a : inverse;
  const Float by_a = inverse_both * one_e, by_e = inverse_both * one_a;
  const Float lost = a - (one_a - 1.0f);  // by rounding 1 + a, to be made good where a is small
  Divergence f;
  f.value = kK1 * e * by_e + 0.5f * (log_in_range(one_a) + lost * by_a);
  if (kSlopes) {
    const Float slope = (kK1 * kK3) * e * (by_e * by_e) + 0.5f * a * by_a;
    const Mask free = ~((raw < kLow) | (raw > kHigh));
    f.by_log_sigma2 = keep(free, -slope);
    f.by_distance = keep(free, 2.0f * slope * distance * inverse_sigma2 * (inverse * both));
  }
  return f;
}

BQNN_INLINE Float divergence_of(const Prior& prior, Float weight, Float log_sigma2) {
  const Shares shares = make_shares(prior, weight);
  const Float inverse_sigma2 = exp(-log_sigma2);
  Float kl = {};
  Mask above_lower = ~Mask{};
  for (int m = 0; m < prior.num_levels; ++m) {
    const Mask above_upper = weight > prior.upper[m];
    const Float part = shares.scale * shares.window[m] + keep(above_lower & ~above_upper, shares.slab);
    above_lower = above_upper;
    if (!any(part != 0.0f)) continue;
    kl += part * diverge<false>(weight - prior.level[m], inverse_sigma2).value;
  }
  return kl;
}

struct Gradients {
  Float weight, log_sigma2, distance[kMaxLevels];
};

BQNN_INLINE Gradients gradients_of(const Prior& prior, Float weight, Float log_sigma2) {
  const Shares shares = make_shares(prior, weight);
  const Float inverse_sigma2 = exp(-log_sigma2);
  Gradients gradients;
  gradients.weight = gradients.log_sigma2 = Float{};
  Float values[kMaxLevels], kl = {}, slab_value = {};
  uint32_t present = 0;  // a bit for each level
  Mask above_lower = ~Mask{};
  for (int m = 0; m < prior.num_levels; ++m) {
    const Mask above_upper = weight > prior.upper[m], in_slab = above_lower & ~above_upper;
    const Float part = shares.scale * shares.window[m] + keep(in_slab, shares.slab);
    above_lower = above_upper;
    gradients.distance[m] = Float{};
    if (!any((part != 0.0f) | in_slab)) continue;
    present |= 1u << m;
    const Divergence f = diverge<true>(weight - prior.level[m], inverse_sigma2);
    values[m] = f.value;
    slab_value = select(in_slab, f.value, slab_value);
    kl += part * f.value;
    gradients.log_sigma2 += part * f.by_log_sigma2;
    gradients.distance[m] = part * f.by_distance;
  }
  // A window that grows takes from the slab, or from the other windows where they overlap to more than 1.
  const Float rest = select(shares.total > 1.0f, kl, slab_value);
  for (int m = 0; m < prior.num_levels; ++m) {
    if (!(present >> m & 1u)) continue;
    const Float by_window = shares.scale * (values[m] - rest);
    gradients.distance[m] -= by_window * shares.window[m] * (weight - prior.level[m]) * prior.inverse_tau2[m];
    gradients.weight += gradients.distance[m];
  }
  return gradients;
}

static double spike_slab_kl_fwd_kernel(const SpikeSlabKlBlock& block) {
  const Prior prior = make_prior(block);
  double total = 0.0;
  for (int64_t first = 0; first < block.count; first += kEmptyAfter) {
    const int64_t last = block.count - first < kEmptyAfter ? block.count : first + kEmptyAfter;
    Sum sum = {};
    for (int64_t i = first; i < last; i += kLanes) {
      const int lanes = last - i < kLanes ? static_cast<int>(last - i) : kLanes;
      const Float weight = load_first(block.weight + i, lanes), log_sigma2 = load_first(block.log_sigma2 + i, lanes);
      sum.lanes[i / kLanes % kSumVectors] += keep(first_lanes(lanes), divergence_of(prior, weight, log_sigma2));
    }
    total += empty(&sum);
  }
  return total;
}

static void spike_slab_kl_bwd_kernel(const SpikeSlabKlBlock& block, float grad, float* grad_weight,
                                     float* grad_log_sigma2, double* grad_levels) {
  const Prior prior = make_prior(block);
  for (int m = 0; m < prior.num_levels; ++m) grad_levels[m] = 0.0;
  for (int64_t first = 0; first < block.count; first += kEmptyAfter) {
    const int64_t last = block.count - first < kEmptyAfter ? block.count : first + kEmptyAfter;
    Sum sums[kMaxLevels] = {};
    for (int64_t i = first; i < last; i += kLanes) {
      const int lanes = last - i < kLanes ? static_cast<int>(last - i) : kLanes;
      const Float weight = load_first(block.weight + i, lanes), log_sigma2 = load_first(block.log_sigma2 + i, lanes);
      const Gradients gradients = gradients_of(prior, weight, log_sigma2);
      store_first(grad_weight + i, grad * gradients.weight, lanes);
      store_first(grad_log_sigma2 + i, grad * gradients.log_sigma2, lanes);
      const Mask valid = first_lanes(lanes);
      for (int m = 0; m < prior.num_levels; ++m) {
        sums[m].lanes[i / kLanes % kSumVectors] += keep(valid, gradients.distance[m]);
      }
    }
    for (int m = 0; m < prior.num_levels; ++m) grad_levels[m] -= static_cast<double>(grad) * empty(&sums[m]);
  }
}
