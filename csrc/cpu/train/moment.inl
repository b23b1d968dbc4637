// E[Q(w)] and Var[Q(w)] of w ~ N(mu, sigma^2), and their gradients: one pass each. The Python reference has the sums.

constexpr float kZLimit = 9.0f;  // beyond, as in the reference, probabilities would be denormal

// Where sigma is so small or large that it is limited, z is, or is 0, all the same.
BQNN_INLINE Float inverse_deviation(Float log_sigma2) {
  return exp_in_range(clamp(-0.5f * log_sigma2, -87.0f, 88.0f), Float{});
}

BQNN_INLINE Normal standardised(Float mu, Float inverse_sigma, float threshold, Float* z) {
  *z = clamp((mu - threshold) * inverse_sigma, -kZLimit, kZLimit);
  return normal(*z);
}

inline void categorical_block(const Posterior& q, const Block& block, float* mean, const Elements& variance) {
  const float* levels = q.levels + block.group * q.num_levels;
  const float* thresholds = q.thresholds + block.group * (q.num_levels - 1);
  for (int64_t i = block.first, end = block.first + block.count; i < end; i += kLanes) {
    const int count = lanes_left(end - i);
    const Float mu = load_first(q.weight + i, count);
    const Float inverse_sigma = inverse_deviation(load_first(q.log_sigma2 + i, count));
    Float e = broadcast(levels[0]), v = {}, below = {};
    for (int j = 0; j + 1 < q.num_levels; ++j) {
      const float step = levels[j + 1] - levels[j];
      Float z;
      const Normal n = standardised(mu, inverse_sigma, thresholds[j], &z);
      e += step * n.below;
      v += step * n.below * (step * n.above + 2.0f * below);
      below += step * n.above;
    }
    store_first(mean + i, e, count);
    store_elements(variance, i, v, count);
  }
}

// Q(mu), where a mean is asked for, and the Gaussian's variance.
inline void gaussian_block(const Posterior& q, const Block& block, float* mean, const Elements& variance) {
  const float* levels = q.levels + block.group * q.num_levels;
  const float* thresholds = q.thresholds + block.group * (q.num_levels - 1);
  for (int64_t i = block.first, end = block.first + block.count; i < end; i += kLanes) {
    const int count = lanes_left(end - i);
    store_elements(variance, i, exp(load_first(q.log_sigma2 + i, count)), count);
    if (!mean) continue;
    const Float mu = load_first(q.weight + i, count);
    Float y = broadcast(levels[0]);
    for (int j = 0; j + 1 < q.num_levels; ++j) y = select(mu > thresholds[j], broadcast(levels[j + 1]), y);
    store_first(mean + i, y, count);
  }
}

// sums [2 num_levels - 1]: the gradients of the block's levels, then of its thresholds. grad_weight may be grad_mean.
inline void categorical_backward_block(const Posterior& q, const Block& block, const float* grad_mean,
                                       const Elements& grad_variance, float* grad_weight, float* grad_log_sigma2,
                                       double* sums) {
  const int cuts = q.num_levels - 1;
  const float* levels = q.levels + block.group * q.num_levels;
  const float* thresholds = q.thresholds + block.group * cuts;
  LaneSums level_sums[kMaxLevels], threshold_sums[kMaxLevels];
  for (int64_t k = 0; k < block.count; k += kLanes) {
    const int64_t i = block.first + k;
    const int count = lanes_left(block.count - k);
    const Float mu = load_first(q.weight + i, count);
    const Float inverse_sigma = inverse_deviation(load_first(q.log_sigma2 + i, count));
    const Float by_mean = load_first(grad_mean + i, count), by_variance = load_elements(grad_variance, i, count);
    Float z[kMaxLevels], probability[kMaxLevels], density[kMaxLevels], e = broadcast(levels[0]);
    for (int j = 0; j < cuts; ++j) {
      const Normal n = standardised(mu, inverse_sigma, thresholds[j], &z[j]);
      probability[j] = n.below;
      density[j] = n.density;
      e += (levels[j + 1] - levels[j]) * n.below;
    }
    Float by_weight = {}, by_log_sigma2 = {};
    for (int j = 0; j < cuts; ++j) {
      // E = sum_j D_j P_j and Var = E[Q^2] - E^2, so dVar/dP_j = D_j (c_j + c_{j-1} - 2 E).
      const Float by_probability = by_mean + by_variance * ((levels[j] + levels[j + 1]) - 2.0f * e);
      const Float by_z = by_probability * (levels[j + 1] - levels[j]) * density[j];
      const Float by_shift = by_z * inverse_sigma;
      by_weight += by_shift;
      by_log_sigma2 -= by_z * (0.5f * z[j]);
      threshold_sums[j].add(k, -by_shift);
    }
    store_first(grad_weight + i, by_weight, count);
    store_first(grad_log_sigma2 + i, by_log_sigma2, count);
    Float above = broadcast(1.0f);
    for (int m = 0; m < q.num_levels; ++m) {
      const Float next = m < cuts ? probability[m] : Float{};
      level_sums[m].add(k, (above - next) * (by_mean + 2.0f * by_variance * (levels[m] - e)));
      above = next;
    }
  }
  for (int m = 0; m < q.num_levels; ++m) sums[m] = level_sums[m].total();
  for (int j = 0; j < cuts; ++j) sums[q.num_levels + j] = threshold_sums[j].total();
}

inline void gaussian_backward_block(const Posterior& q, const Block& block, const Elements& grad_variance,
                                    float* grad_log_sigma2) {
  for (int64_t i = block.first, end = block.first + block.count; i < end; i += kLanes) {
    const int count = lanes_left(end - i);
    const Float variance = exp(load_first(q.log_sigma2 + i, count));
    store_first(grad_log_sigma2 + i, load_elements(grad_variance, i, count) * variance, count);
  }
}
