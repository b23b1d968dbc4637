// A weight's sample Q(mu + sigma * noise), and the straight-through gradients of it.

constexpr int kSampleChunk = 256;  // weights whose noise is made at once

// sigma * noise of the weights from `first`.
BQNN_INLINE Float scaled_noise(const Posterior& q, int64_t i, const float* noise, int count) {
  return load_first(noise, count) * exp(0.5f * load_first(q.log_sigma2 + i, count));
}

inline void sample_block(const Posterior& q, const Noise& noise, const Block& block, float* quantized) {
  const float* levels = q.levels + block.group * q.num_levels;
  const float* thresholds = q.thresholds + block.group * (q.num_levels - 1);
  alignas(64) float epsilon[kSampleChunk];
  for (int64_t chunk = 0; chunk < block.count; chunk += kSampleChunk) {
    const int64_t first = block.first + chunk;
    const int64_t size = block.count - chunk < kSampleChunk ? block.count - chunk : kSampleChunk;
    if (q.log_sigma2) fill_normals(noise, first, size, epsilon);
    for (int64_t i = 0; i < size; i += kLanes) {
      const int count = lanes_left(size - i);
      Float w = load_first(q.weight + first + i, count);
      if (q.log_sigma2) w += scaled_noise(q, first + i, epsilon + i, count);
      Float y = broadcast(levels[0]);
      for (int j = 0; j + 1 < q.num_levels; ++j) y = select(w > thresholds[j], broadcast(levels[j + 1]), y);
      store_first(quantized + first + i, y, count);
    }
  }
}

// level_sums [num_levels]: the sums of grad over the cells.
inline void sample_backward_block(const Posterior& q, const Noise& noise, const Block& block, const float* grad,
                                  float* grad_log_sigma2, double* level_sums) {
  const float* thresholds = q.thresholds + block.group * (q.num_levels - 1);
  alignas(64) float epsilon[kSampleChunk];
  LaneSums above[kMaxLevels];  // of grad over the weights above a threshold; [0] of all
  for (int64_t chunk = 0; chunk < block.count; chunk += kSampleChunk) {
    const int64_t first = block.first + chunk;
    const int64_t size = block.count - chunk < kSampleChunk ? block.count - chunk : kSampleChunk;
    if (q.log_sigma2) fill_normals(noise, first, size, epsilon);
    for (int64_t i = 0; i < size; i += kLanes) {
      const int count = lanes_left(size - i);
      const Float g = load_first(grad + first + i, count);
      Float w = load_first(q.weight + first + i, count);
      if (q.log_sigma2) {
        const Float shift = scaled_noise(q, first + i, epsilon + i, count);
        w += shift;
        store_first(grad_log_sigma2 + first + i, 0.5f * g * shift, count);
      }
      Mask over = w == w;
      for (int m = 0; m < q.num_levels; ++m) {
        const Mask next = m + 1 < q.num_levels ? w > thresholds[m] : over & 0;
        above[m].add(i, select(over & ~next, g, Float{}));
        over = next;
      }
    }
  }
  for (int m = 0; m < q.num_levels; ++m) level_sums[m] = above[m].total();
}
