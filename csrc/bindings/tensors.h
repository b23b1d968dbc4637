// What the bindings of the CPU kernels share: torch's threads as a Parallel, and tensors as the pointers and shapes that
// kernels take. Checks here are of what would read or write past an end; what Python hands in is checked there.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/base/isa.h"
#include "cpu/base/parallel.h"
#include "cpu/train/noise.h"

namespace bqnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Parallel torch_threads() {
  return {[](int64_t n, int64_t grain, Parallel::Body body, void* context) {
            torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
          },
          static_cast<int>(torch::stable::get_num_threads())};
}

inline Isa isa() {
  static const Isa chosen = [] {
    Isa isa;
    const char* error = nullptr;
    if (!chosen_isa(&isa, &error)) throw std::runtime_error(error);
    return isa;
  }();
  return chosen;
}

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("bqnn_cpu: ") + what);
}

inline float* floats(const Tensor& tensor) {
  require(tensor.scalar_type() == ScalarType::Float, "a float32 tensor is needed");
  require(tensor.is_contiguous(), "a contiguous tensor is needed");
  return static_cast<float*>(tensor.data_ptr());
}

inline float* floats(const std::optional<Tensor>& tensor) { return tensor ? floats(*tensor) : nullptr; }

// The elements of a tensor of `count` that lie side by side, in whatever order.
inline Elements elements(const Tensor& tensor, int64_t count) {
  const bool bfloat16 = tensor.scalar_type() == ScalarType::BFloat16;
  require(bfloat16 || tensor.scalar_type() == ScalarType::Float, "a float32 or bfloat16 tensor is needed");
  require(tensor.numel() == count, "tensors of one size are needed");
  return {tensor.data_ptr(), bfloat16};
}

// A linear layer's tensor is one row; an image's is [batch, channels, pixels].
inline PlaneShape plane_shape(const Tensor& tensor) {
  if (tensor.dim() != 4) return {1, 1, tensor.numel()};
  return {tensor.size(0), tensor.size(1), tensor.size(2) * tensor.size(3)};
}

inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4) return false;
  const int order[] = {1, 3, 2, 0};
  int64_t expected = 1;
  for (int d : order) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

inline Plane plane(const Tensor& tensor, const PlaneShape& shape) {
  const bool planar = tensor.is_contiguous();
  require(planar || is_channels_last(tensor), "a contiguous or channels-last tensor is needed");
  return {elements(tensor, shape.batch * shape.channels * shape.pixels), !planar};
}

}  // namespace bqnn
