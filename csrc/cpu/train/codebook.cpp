#include "cpu/train/codebook.h"

#include <algorithm>
#include <cmath>

namespace bqnn {
namespace {

constexpr double kTauPerGap = 0.375, kMinGap = 1e-4, kMargin = 1e-3;  // as the Python reference has them

double softplus(double x) { return x > 0.0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

double share_of(double raw_threshold) { return kMargin + (1.0 - 2.0 * kMargin) * sigmoid(raw_threshold); }

void levels_from_raw(const float* raw, double scale, int num_levels, double* levels) {
  double sum = raw[0];
  levels[0] = scale * sum;
  for (int m = 1; m < num_levels; ++m) {
    sum += kMinGap * (1.0 + std::fabs(raw[0])) + softplus(raw[m]);
    levels[m] = scale * sum;
  }
}

}  // namespace

void codebook_from_raw(const RawCodebook& raw, float* levels, float* thresholds, float* tau) {
  const int cuts = raw.num_levels - 1;
  for (int64_t group = 0; group < raw.groups; ++group) {
    double c[kMaxLevels];
    levels_from_raw(raw.levels + group * raw.num_levels, raw.scale[group], raw.num_levels, c);
    for (int m = 0; m < raw.num_levels; ++m) levels[group * raw.num_levels + m] = static_cast<float>(c[m]);
    for (int j = 0; j < cuts; ++j) {
      const double share = raw.thresholds ? share_of(raw.thresholds[group * cuts + j]) : 0.5;
      thresholds[group * cuts + j] = static_cast<float>(c[j] + share * (c[j + 1] - c[j]));
    }
    for (int m = 0; m < raw.num_levels; ++m) {
      const double below = c[std::max(m, 1)] - c[std::max(m, 1) - 1];
      const double above = c[std::min(m, cuts - 1) + 1] - c[std::min(m, cuts - 1)];
      tau[group * raw.num_levels + m] = static_cast<float>(kTauPerGap * std::min(below, above));
    }
  }
}

void codebook_from_raw_backward(const RawCodebook& raw, const float* grad_levels, const float* grad_thresholds,
                                float* grad_raw_levels, float* grad_raw_thresholds) {
  const int num_levels = raw.num_levels, cuts = num_levels - 1;
  for (int64_t group = 0; group < raw.groups; ++group) {
    const float* raw_levels = raw.levels + group * num_levels;
    double c[kMaxLevels], by_level[kMaxLevels];
    levels_from_raw(raw_levels, raw.scale[group], num_levels, c);
    for (int m = 0; m < num_levels; ++m) by_level[m] = grad_levels[group * num_levels + m];
    for (int j = 0; j < cuts; ++j) {
      const double by_threshold = grad_thresholds[group * cuts + j];
      double share = 0.5;
      if (raw.thresholds) {
        const double raw_threshold = raw.thresholds[group * cuts + j], gate = sigmoid(raw_threshold);
        share = share_of(raw_threshold);
        grad_raw_thresholds[group * cuts + j] = static_cast<float>(by_threshold * (c[j + 1] - c[j]) *
                                                                   (1.0 - 2.0 * kMargin) * gate * (1.0 - gate));
      }
      by_level[j] += (1.0 - share) * by_threshold;
      by_level[j + 1] += share * by_threshold;
    }
    // An increment moves all levels from its own on.
    double above = 0.0, by_smallest_gap = 0.0;
    for (int m = cuts; m >= 0; --m) {
      above += by_level[m] * raw.scale[group];
      if (m == 0) break;
      by_smallest_gap += above;
      grad_raw_levels[group * num_levels + m] = static_cast<float>(above * sigmoid(raw_levels[m]));
    }
    const double sign = (raw_levels[0] > 0.0f) - (raw_levels[0] < 0.0f);
    grad_raw_levels[group * num_levels] = static_cast<float>(above + kMinGap * sign * by_smallest_gap);
  }
}

}  // namespace bqnn
