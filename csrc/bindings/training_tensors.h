// Tensors as the kernels of training take them, each held to its contract.
#pragma once

#include <optional>

#include "bindings/tensors.h"
#include "cpu/train/noise.h"
#include "cpu/train/weights.h"

namespace bqnn {

// A linear layer's tensor is one row; an image's is [batch, channels, pixels].
inline PlaneShape plane_shape(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.numel() == 0) return {1, 1, tensor.numel()};
  return {tensor.size(0), tensor.size(1), tensor.size(2) * tensor.size(3)};
}

// float32 or bfloat16 elements that lie side by side, of the shape of `like`, in whatever order.
inline Plane plane(const Tensor& tensor, const char* name, const Tensor& like) {
  const bool planar = tensor.is_contiguous(), bfloat16 = dtype_of(tensor) == ScalarType::BFloat16;
  bool same_shape = tensor.dim() == like.dim();
  for (int64_t d = 0; same_shape && d < like.dim(); ++d) same_shape = tensor.size(d) == like.size(d);
  if ((!bfloat16 && dtype_of(tensor) != ScalarType::Float) || !tensor.is_cpu() || !same_shape ||
      (!planar && !is_channels_last(tensor)))
    refuse(name, "contiguous or channels-last float32 or bfloat16 " + shape_text(like.sizes()) + " on the CPU",
           describe(tensor));
  return {{data_of(tensor, name), bfloat16}, !planar};
}

inline Elements elements(const Tensor& tensor, const char* name, int64_t count) {
  const bool bfloat16 = dtype_of(tensor) == ScalarType::BFloat16;
  return {counted<void>(tensor, name, bfloat16 ? ScalarType::BFloat16 : ScalarType::Float, count), bfloat16};
}

inline Noise noise(const Tensor& seed, int64_t offset) {
  return {static_cast<uint64_t>(*counted<int64_t>(seed, "seed", ScalarType::Long, 1)), static_cast<uint64_t>(offset)};
}

// Weights, whose first dimension is the channels'.
struct WeightShape {
  int64_t channels, columns;

  explicit WeightShape(const Tensor& weight) {
    require(weight.dim() >= 1, "weight", "of one dimension or more", weight.dim());
    channels = weight.size(0);
    columns = channels > 0 ? weight.numel() / channels : 0;
  }
  int64_t weights() const { return channels * columns; }
};

// The rows of a codebook of levels, or of the thresholds between them, and its levels.
struct CodebookShape {
  int64_t groups, levels;

  CodebookShape(const Tensor& codebook, const char* name, int64_t between, std::optional<int64_t> channels) {
    if (codebook.dim() != 2 || codebook.size(1) + between < 2 || codebook.size(1) + between > kMaxLevels ||
        (channels && codebook.size(0) != 1 && codebook.size(0) != *channels))
      refuse(name,
             "[1" + (channels ? " or " + std::to_string(*channels) : " or more") + ", " + std::to_string(2 - between) +
                 " to " + std::to_string(kMaxLevels - between) + "]",
             describe(codebook));
    groups = codebook.size(0);
    levels = codebook.size(1) + between;
  }
  int64_t count() const { return groups * levels; }
  int64_t cuts() const { return groups * (levels - 1); }
};

inline Posterior posterior(const Tensor& weight, const std::optional<Tensor>& log_sigma2, const Tensor& levels,
                    const Tensor& thresholds) {
  const WeightShape shape(weight);
  const CodebookShape codebook(levels, "levels", 0, shape.channels);
  return {floats(weight, "weight", shape.weights()),
          floats(log_sigma2, "log_sigma2", shape.weights()),
          floats(levels, "levels", codebook.count()),
          shaped<float>(thresholds, "thresholds", ScalarType::Float, {codebook.groups, codebook.levels - 1}),
          shape.weights(),
          codebook.groups,
          static_cast<int>(codebook.levels)};
}

inline Moments moments_mode(int64_t mode) {
  require(mode >= 0 && mode <= static_cast<int64_t>(Moments::straight_through), "mode", "0, 1 or 2", mode);
  return static_cast<Moments>(mode);
}

}  // namespace bqnn
