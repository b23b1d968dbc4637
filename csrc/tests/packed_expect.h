// What the outputs of a drawn case have to be, by plain loops in double, and how far they may be off.
#pragma once

#include "packed_draw.h"

namespace bqnn::cases {

constexpr double kTolerance = 1e-5;

// The largest error of each instruction set in float outputs, as a share of the bound.
inline double worst[kIsas];

// --- the plain loops ----------------------------------------------------------------------------------------------

// What y has to be, [images, channels, pixels]: the value, and but for "int8" the sum of its terms' magnitudes.
struct Expected {
  std::vector<double> value, magnitude;
};

// The integers of an image's activations and their scale, by the rule of the Python reference.
inline float quantize(const float* x, int64_t count, std::vector<double>* q) {
  float largest = 0.0f;
  q->assign(count, 0.0);
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(x[i])) return NAN;
    largest = std::max(largest, std::fabs(x[i]));
  }
  if (largest == 0.0f) return 0.0f;
  const float lift = largest < 0x1p-64f ? 0x1p64f : 1.0f;
  const float factor = 127.0f / (largest * lift);
  for (int64_t i = 0; i < count; ++i) {
    (*q)[i] = std::clamp(std::nearbyintf(x[i] * lift * factor), -127.0f, 127.0f);
  }
  return largest / 127.0f;
}

// Adds the products of one patch with the weights [columns][outputs] of a group to its outputs.
[[gnu::noinline, gnu::no_sanitize("address", "undefined")]] inline void add_products(const Case& c,
                                                                              const double* patch,
                                                                              const double* weight, double* value,
                                                                              double* magnitude) {
  const int64_t columns = c.columns(), outputs = c.outputs;
  for (int64_t k = 0; k < columns; ++k) {
    const double x = patch[k], x_size = std::isfinite(x) ? std::fabs(x) : 0.0;
    for (int64_t n = 0; n < outputs; ++n) value[n] += x * weight[k * outputs + n];
    for (int64_t n = 0; n < outputs; ++n) magnitude[n] += x_size * std::fabs(weight[k * outputs + n]);
  }
}

inline Expected expect(const Case& c, const Operands& o) {
  const bool int8 = c.precision == Precision::int8, bf16 = c.precision == Precision::bf16;
  const int64_t columns = c.columns(), a_image = c.inputs * c.groups * c.height * c.width;
  std::vector<double> weight(c.channels() * columns);  // [groups][columns][outputs]
  for (int64_t n = 0; n < c.channels(); ++n) {
    for (int64_t k = 0; k < columns; ++k) {
      const int64_t level = o.codebook(c, n) * c.num_levels + o.code(c, n, k);
      const double value = int8 ? o.int8_levels[level] : bf16 ? widen(to_bfloat16(o.levels[level])) : o.levels[level];
      weight[(n / c.outputs * columns + k) * c.outputs + n % c.outputs] = value;
    }
  }
  Expected expected;
  expected.value.resize(c.images * c.channels() * c.pixels());
  expected.magnitude = expected.value;
  std::vector<double> x(a_image), patch(columns), value(c.outputs), magnitude(c.outputs);
  for (int64_t image = 0; image < c.images; ++image) {
    const float* from = o.x.data() + image * a_image;
    const float row_scale = int8 ? quantize(from, a_image, &x) : 1.0f;
    for (int64_t i = 0; !int8 && i < a_image; ++i) x[i] = bf16 ? widen(to_bfloat16(from[i])) : from[i];
    for (int64_t group = 0; group < c.groups; ++group) {
      for (int64_t pixel = 0; pixel < c.pixels(); ++pixel) {
        const int64_t out_h = pixel / c.out_width, out_w = pixel % c.out_width;
        for (int64_t k = 0; k < columns; ++k) {
          const int64_t tap = k % (c.kernel.h * c.kernel.w), input = k / (c.kernel.h * c.kernel.w);
          const int64_t h = out_h * c.stride.h - c.padding.h + tap / c.kernel.w * c.dilation.h;
          const int64_t w = out_w * c.stride.w - c.padding.w + tap % c.kernel.w * c.dilation.w;
          const bool inside = h >= 0 && h < c.height && w >= 0 && w < c.width;
          patch[k] = inside ? x[((group * c.inputs + input) * c.height + h) * c.width + w] : 0.0;
        }
        std::fill(value.begin(), value.end(), 0.0);
        std::fill(magnitude.begin(), magnitude.end(), 0.0);
        add_products(c, patch.data(), weight.data() + group * columns * c.outputs, value.data(), magnitude.data());
        for (int64_t i = 0; i < c.outputs; ++i) {
          const int64_t n = group * c.outputs + i, at = (image * c.channels() + n) * c.pixels() + pixel;
          if (int8) {
            float y = static_cast<float>(value[i]) * o.int8_scale[o.codebook(c, n)];
            y *= row_scale;
            if (c.bias) y += o.bias[n];
            expected.value[at] = y;
          } else {
            expected.value[at] = value[i] + (c.bias ? o.bias[n] : 0.0);
            expected.magnitude[at] = magnitude[i] + (c.bias ? std::fabs(o.bias[n]) : 0.0);
          }
          if (c.relu && expected.value[at] < 0.0) expected.value[at] = 0.0;
        }
      }
    }
  }
  return expected;
}

// --- comparing ----------------------------------------------------------------------------------------------------

// How far `y` may be from the value, or a negative number where sums in float may overflow and anything is right.
inline double allowed(const Case& c, double value, double magnitude) {
  if (magnitude > FLT_MAX / 4) return -1.0;
  // Products of bfloat16 take denormal numbers for zero; others round them, to a multiple of the smallest one.
  const double lost = c.precision == Precision::bf16 ? 100.0 * FLT_MIN : 2.0 * FLT_TRUE_MIN;
  const double bound = kTolerance * magnitude + 16.0 * lost * (static_cast<double>(c.columns()) + 1.0);
  // An output is rounded to 8 bits, or to a multiple of the smallest bfloat16.
  return c.y.bfloat16 ? bound + 0x1.02p-8 * (std::fabs(value) + bound) + 0x1.02p-134 : bound;
}

// What is wrong with y, or nothing.
inline std::string compare(const Case& c, const Expected& expected, const std::vector<float>& y, Isa isa) {
  const bool int8 = c.precision == Precision::int8, exact = int8 || (c.activations == Activations::one_hot && !c.bias);
  double squares = 0.0, error_squares = 0.0;
  for (size_t i = 0; i < y.size(); ++i) {
    const double value = expected.value[i], bound = allowed(c, value, expected.magnitude[i]);
    bool right;
    if (std::isnan(value)) {
      right = std::isnan(y[i]);
    } else if (exact) {
      const float rounded = static_cast<float>(value);
      const float exactly = c.y.bfloat16 ? widen(to_bfloat16(rounded)) : rounded;
      right = int8 ? bits_of(y[i]) == bits_of(exactly) : y[i] == exactly;
    } else if (std::isinf(value)) {
      right = y[i] == value || (bound < 0.0 && !std::isfinite(y[i]));
    } else if (bound < 0.0) {
      right = true;
    } else {
      const double error = std::fabs(y[i] - value);
      right = error <= bound;  // false for NaN
      if (right && !c.y.bfloat16) worst[static_cast<int>(isa)] = std::max(worst[static_cast<int>(isa)], error / bound);
      squares += value * value, error_squares += error * error;
    }
    if (c.relu && y[i] < 0.0f) right = false;
    if (!right) {
      char text[200];
      std::snprintf(text, sizeof text, "y[%zu] of %zu is %.9g, expected %.9g, may be off by %.3g", i, y.size(),
                    static_cast<double>(y[i]), value, exact ? 0.0 : bound);
      return text;
    }
  }
  // Few outputs may all be sums that cancel; many do not.
  const bool judge_norm = !exact && !c.y.bfloat16 && y.size() >= 64 && c.activations == Activations::normal;
  if (judge_norm && std::sqrt(error_squares) > kTolerance * std::sqrt(squares)) {
    char text[100];
    std::snprintf(text, sizeof text, "the norm of the error is %.3g of the output's",
                  std::sqrt(error_squares / squares));
    return text;
  }
  return "";
}

}  // namespace bqnn::cases
