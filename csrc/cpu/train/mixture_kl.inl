// The kernels of mixture_kl; the formulas are those of the Python reference. Logarithms of components are to base 2.

// M, or, where it is 0, what the codebook says.
template <int M>
BQNN_INLINE int levels_of(const MixtureKlCodebook& codebook) {
  return M > 0 ? M : codebook.num_levels;
}

// 2^x for x <= 0 or NaN, to 2e-7 of itself; 2^-58, which is nothing beside the largest part, 1, where x is lower.
BQNN_INLINE Float part_of_log(Float x) {
  constexpr float kTerms[] = {0.693147f, 0.24022242f, 0.05550734f, 0.009671513f, 0.001326472f};
  x = max(broadcast(-58.0f), x);
  const Float shifted = x + kIntegers, fraction = x - (shifted - kIntegers);
  return (fraction * polynomial(fraction, kTerms) + 1.0f) * power_of_two_of(shifted);
}

// The components at a weight. Exponentials are taken of differences from the largest logarithm, in two steps, since the
// spikes differ from each other by their distances alone: their sum is from 1 to num_levels, that of both from 1 on.
struct MixtureParts {
  Float distance[kMaxLevels];  // mu - c_m
  Float spike[kMaxLevels];     // the spikes, the nearest one being 1
  Float spikes;                // their sum
  Float sigma2, largest;       // the larger logarithm of the nearest spike and the slab
  Float scale, slab;           // the nearest spike and the slab, relative to it
  Float total;                 // scale * spikes + slab
};

// M is num_levels, a constant where there are few, so that all parts are in registers.
template <int M>
BQNN_INLINE MixtureParts mixture_parts(const MixtureKlCodebook& codebook, Float weight, Float log_sigma2) {
  MixtureParts parts;
  Float nearest = broadcast(-__builtin_inff());
  for (int m = 0; m < levels_of<M>(codebook); ++m) {
    parts.distance[m] = weight - codebook.level[m];
    parts.spike[m] = parts.distance[m] * parts.distance[m] * codebook.spike.exponent;
    nearest = max(nearest, parts.spike[m]);
  }
  parts.spikes = Float{};
  for (int m = 0; m < levels_of<M>(codebook); ++m) {
    parts.spike[m] = part_of_log(parts.spike[m] - nearest);
    parts.spikes += parts.spike[m];
  }
  // Beyond, a variance is none of a float.
  parts.sigma2 = exp_in_range(clamp(log_sigma2, -87.0f, 88.0f), Float{});
  const Float spike = parts.sigma2 * codebook.spike.exponent + (nearest + codebook.spike.share);
  const Float slab = (parts.sigma2 + weight * weight) * codebook.slab.exponent + codebook.slab.share;
  const Float above = slab - spike, rest = part_of_log(-abs(above));
  parts.largest = max(slab, spike);
  parts.scale = select(above > 0.0f, rest, broadcast(1.0f));
  parts.slab = select(above > 0.0f, broadcast(1.0f), rest);
  parts.total = parts.scale * parts.spikes + parts.slab;
  return parts;
}

// body(i, lane, count) for the vectors of a block, in sixteens whatever the vectors' length: `lane` is that of the first
// element i, a constant once this is unrolled, so that what is kept for each lane stays in registers.
template <class Body>
BQNN_INLINE void in_sixteens(int64_t begin, int64_t end, const Body& body) {
  for (; begin + 16 <= end; begin += 16) {
    for (int lane = 0; lane < 16; lane += kLanes) body(begin + lane, lane, kLanes);
  }
  for (int lane = 0; begin + lane < end; lane += kLanes) body(begin + lane, lane, lanes_left(end - begin - lane));
}

template <int M>
static double mixture_kl_fwd(const MixtureKlCodebook& codebook, const PriorBlock& block) {
  constexpr float kLn2 = 0.693147181f;
  // The logarithms of totals, which are from 1 to 17, are one of the product of 16 of them, for each lane.
  constexpr int64_t kSpan = 16 * 16;
  LaneSums sum;
  for (int64_t begin = 0; begin < block.count; begin += kSpan) {
    alignas(64) float product[16];
    for (float& each : product) each = 1.0f;
    in_sixteens(begin, begin + kSpan < block.count ? begin + kSpan : block.count,
                [&](int64_t i, int lane, int count) BQNN_LAMBDA {
                  const Mask present = first_lanes(count);
                  const Float weight = load_first(block.weight + i, count);
                  const Float log_sigma2 = load_first(block.log_sigma2 + i, count);
                  const MixtureParts parts = mixture_parts<M>(codebook, weight, log_sigma2);
                  const Float kl = -(0.5f + 0.5f * log_sigma2) - parts.largest * kLn2;
                  sum.add(lane, as_float(as_int(kl) & present));
                  store(product + lane, load(product + lane) * select(present, parts.total, broadcast(1.0f)));
                });
    for (int lane = 0; lane < 16; lane += kLanes) {
      const Float x = load(product + lane);
      sum.add(lane, -select(x == x, log_in_range(x), x));  // the logarithm of NaN would be a number
    }
  }
  return sum.total();
}

template <int M>
static void mixture_kl_bwd(const MixtureKlCodebook& codebook, const PriorBlock& block, float grad, float* grad_weight,
                           float* grad_log_sigma2, double* sums) {
  const float inverse_spike = codebook.spike.inverse_variance, inverse_slab = codebook.slab.inverse_variance;
  LaneSums by_levels[M > 0 ? M : kMaxLevels], by_log_variance;
  in_sixteens(0, block.count, [&](int64_t i, int lane, int count) BQNN_LAMBDA {
    const Mask present = first_lanes(count);
    const Float weight = load_first(block.weight + i, count), log_sigma2 = load_first(block.log_sigma2 + i, count);
    const MixtureParts parts = mixture_parts<M>(codebook, weight, log_sigma2);
    const Float inverse = 1.0f / parts.total, scale = parts.scale * inverse, by_slab = parts.slab * inverse_slab * inverse;
    const Float spikes = scale * parts.spikes, by_distance = scale * inverse_spike;
    Float by_weight = by_slab * weight, squares = Float{};
    for (int m = 0; m < levels_of<M>(codebook); ++m) {
      const Float part = by_distance * parts.spike[m] * parts.distance[m];
      by_weight += part;
      squares += part * parts.distance[m];
      by_levels[m].add(lane, as_float(as_int(part) & present));
    }
    const Float by_sigma2 = spikes * inverse_spike;
    store_first(grad_weight + i, grad * by_weight, count);
    store_first(grad_log_sigma2 + i, (0.5f * grad) * (parts.sigma2 * (by_sigma2 + by_slab) - 1.0f), count);
    by_log_variance.add(lane, as_float(as_int(spikes - (by_sigma2 * parts.sigma2 + squares)) & present));
  });
  for (int m = 0; m < levels_of<M>(codebook); ++m) sums[m] = -static_cast<double>(grad) * by_levels[m].total();
  sums[codebook.num_levels] = 0.5 * static_cast<double>(grad) * by_log_variance.total();
}

static double mixture_kl_fwd_kernel(const MixtureKlCodebook& codebook, const PriorBlock& block) {
  switch (codebook.num_levels) {
    case 2: return mixture_kl_fwd<2>(codebook, block);
    case 3: return mixture_kl_fwd<3>(codebook, block);
    case 4: return mixture_kl_fwd<4>(codebook, block);
    default: return mixture_kl_fwd<0>(codebook, block);
  }
}

static void mixture_kl_bwd_kernel(const MixtureKlCodebook& codebook, const PriorBlock& block, float grad,
                                  float* grad_weight, float* grad_log_sigma2, double* sums) {
  switch (codebook.num_levels) {
    case 2: return mixture_kl_bwd<2>(codebook, block, grad, grad_weight, grad_log_sigma2, sums);
    case 3: return mixture_kl_bwd<3>(codebook, block, grad, grad_weight, grad_log_sigma2, sums);
    case 4: return mixture_kl_bwd<4>(codebook, block, grad, grad_weight, grad_log_sigma2, sums);
    default: return mixture_kl_bwd<0>(codebook, block, grad, grad_weight, grad_log_sigma2, sums);
  }
}
