// The kernels of spike_slab_kl; the formulas are those of the Python reference.
//
// The slab's divergence is that of the spike at the level it is centred at, so that everything is a sum over levels,
// kl = sum_m part_m F(mu - c_m), with part_m the spike's share and, at the slab's level, the slab's as well.

BQNN_INLINE Float keep(Mask mask, Float x) { return as_float(as_int(x) & mask); }

// How a weight's divergence is shared out among the levels.
struct Shares {
  Float window[kMaxLevels];  // Omega_m
  Float total;               // sum_m Omega_m
  Float scale;               // 1 / max(total, 1)
  Float slab;
};

BQNN_INLINE Shares make_shares(const SpikeSlabKlCodebook& codebook, Float weight, Float log_sigma2) {
  constexpr float kNegligible = -58.0f;  // 2^-58 is nothing beside the shares' sum, 1
  Shares shares;
  shares.total = Float{};
  for (int m = 0; m < codebook.num_levels; ++m) {
    const Float distance = weight - codebook.level[m];
    const Float exponent = distance * distance * codebook.exponent[m];
    const Float window = exp2_in_range(max(broadcast(kNegligible), exponent));
    shares.window[m] = keep(~(exponent < kNegligible), window);
    shares.total += shares.window[m];
  }
  // A log_sigma2 that is NaN makes everything NaN, and so does a weight.
  shares.scale = select(log_sigma2 == log_sigma2, 1.0f / max(broadcast(1.0f), shares.total), log_sigma2);
  shares.slab = max(Float{}, 1.0f - shares.total);
  return shares;
}

// F(d, sigma) and its slopes, which are 0 where log alpha is clipped.
struct Divergence {
  Float value, by_distance, by_log_sigma2;
};

template <bool kSlopes>
BQNN_INLINE Divergence diverge(const LogUniformKl& table, Float distance, Float inverse_sigma2) {
  constexpr float kTiny = 1e-30f;  // keeps a level's own place off the singularity of log alpha
  constexpr int32_t kMantissa = 0x007FFFFF, kOne = 0x3F800000;
  const Float raw = (kTiny + distance * distance) * inverse_sigma2;
  const Float a = clamp(raw, table.low, table.high);
  // a = (t + 3/2) 2^n
  const Int bits = as_int(a), piece = (bits >> 23) - 127;
  const Float t = as_float((bits & kMantissa) | kOne) - 1.5f;
  Divergence f;
  f.value = piecewise(t, piece, table.value);
  if (kSlopes) {
    const Mask free = ~((raw < table.low) | (raw > table.high));
    const Float by_a = keep(free, piecewise(t, piece, table.slope) * power_of_two(-piece));
    f.by_log_sigma2 = -(by_a * a);
    f.by_distance = by_a * keep(free, 2.0f * distance * inverse_sigma2);
  }
  return f;
}

BQNN_INLINE Float divergence_of(const SpikeSlabKlCodebook& codebook, const LogUniformKl& table, Float weight,
                                Float log_sigma2) {
  const Shares shares = make_shares(codebook, weight, log_sigma2);
  const Float inverse_sigma2 = exp(-log_sigma2);
  Float kl = {};
  Mask above_lower = ~Mask{};
  for (int m = 0; m < codebook.num_levels; ++m) {
    const Mask above_upper = weight > codebook.upper[m];
    const Float part = shares.scale * shares.window[m] + keep(above_lower & ~above_upper, shares.slab);
    above_lower = above_upper;
    const Mask active = part != 0.0f;
    if (!any(active)) continue;
    kl += keep(active, part * diverge<false>(table, weight - codebook.level[m], inverse_sigma2).value);
  }
  return kl;
}

struct Gradients {
  Float weight, log_sigma2, distance[kMaxLevels];
};

BQNN_INLINE void gradients_of(const SpikeSlabKlCodebook& codebook, const LogUniformKl& table, Float weight,
                              Float log_sigma2, Gradients* gradients) {
  const Shares shares = make_shares(codebook, weight, log_sigma2);
  const Float inverse_sigma2 = exp(-log_sigma2);
  Float values[kMaxLevels], kl = {}, slab_value = {}, by_log_sigma2 = {}, by_weight = {};
  Mask active[kMaxLevels];  // where a level has a part: elsewhere its values may be infinite, and count for nothing
  uint32_t present = 0;     // a bit for each level that is active in any lane
  Mask above_lower = ~Mask{};
  for (int m = 0; m < codebook.num_levels; ++m) {
    const Mask above_upper = weight > codebook.upper[m], in_slab = above_lower & ~above_upper;
    const Float part = shares.scale * shares.window[m] + keep(in_slab, shares.slab);
    above_lower = above_upper;
    active[m] = (part != 0.0f) | in_slab;
    gradients->distance[m] = Float{};
    if (!any(active[m])) continue;
    present |= 1u << m;
    const Divergence f = diverge<true>(table, weight - codebook.level[m], inverse_sigma2);
    values[m] = f.value;
    slab_value = select(in_slab, f.value, slab_value);
    kl += keep(active[m], part * f.value);
    by_log_sigma2 += keep(active[m], part * f.by_log_sigma2);
    gradients->distance[m] = keep(active[m], part * f.by_distance);
  }
  // A window that grows takes from the slab, or from the other windows where they overlap to more than 1.
  const Float rest = select(shares.total > 1.0f, kl, slab_value);
  for (int m = 0; m < codebook.num_levels; ++m) {
    if (!(present >> m & 1u)) continue;
    const Float by_window = shares.scale * (values[m] - rest) * shares.window[m];
    const Float by_distance = by_window * (weight - codebook.level[m]) * codebook.inverse_tau2[m];
    gradients->distance[m] -= keep(active[m], by_distance);
    by_weight += gradients->distance[m];
  }
  gradients->weight = by_weight;
  gradients->log_sigma2 = by_log_sigma2;
}

static double spike_slab_kl_fwd_kernel(const SpikeSlabKlCodebook& codebook, const LogUniformKl& divergence,
                                       const PriorBlock& block) {
  LaneSums sum;
  for (int64_t i = 0; i < block.count; i += kLanes) {
    const int count = lanes_left(block.count - i);
    const Float weight = load_first(block.weight + i, count), log_sigma2 = load_first(block.log_sigma2 + i, count);
    sum.add(i, keep(first_lanes(count), divergence_of(codebook, divergence, weight, log_sigma2)));
  }
  return sum.total();
}

static void spike_slab_kl_bwd_kernel(const SpikeSlabKlCodebook& codebook, const LogUniformKl& divergence,
                                     const PriorBlock& block, float grad, float* grad_weight, float* grad_log_sigma2,
                                     double* grad_levels) {
  LaneSums sums[kMaxLevels];
  for (int64_t i = 0; i < block.count; i += kLanes) {
    const int count = lanes_left(block.count - i);
    const Float weight = load_first(block.weight + i, count), log_sigma2 = load_first(block.log_sigma2 + i, count);
    Gradients gradients;
    gradients_of(codebook, divergence, weight, log_sigma2, &gradients);
    store_first(grad_weight + i, grad * gradients.weight, count);
    store_first(grad_log_sigma2 + i, grad * gradients.log_sigma2, count);
    for (int m = 0; m < codebook.num_levels; ++m) sums[m].add(i, keep(first_lanes(count), gradients.distance[m]));
  }
  for (int m = 0; m < codebook.num_levels; ++m) grad_levels[m] = -static_cast<double>(grad) * sums[m].total();
}
