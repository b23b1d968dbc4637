// Codebooks: their bound, and how they are made of raw parameters. A few numbers a layer: no vectors, no threads.
#pragma once

#include <cstdint>

namespace bqnn {

constexpr int kMaxLevels = 16;

// Raw parameters of codebooks, as the op codebook_from_raw takes them.
struct RawCodebook {
  const float* levels;      // [groups, num_levels]
  const float* scale;       // [groups]
  const float* thresholds;  // [groups, num_levels - 1], or null: half-way between levels
  int64_t groups;
  int num_levels;
};

// levels and tau [groups, num_levels], thresholds [groups, num_levels - 1]; computed in double.
void codebook_from_raw(const RawCodebook& raw, float* levels, float* thresholds, float* tau);

// The gradients of the raw levels and, where there are any, the raw thresholds.
void codebook_from_raw_backward(const RawCodebook& raw, const float* grad_levels, const float* grad_thresholds,
                                float* grad_raw_levels, float* grad_raw_thresholds);

}  // namespace bqnn
