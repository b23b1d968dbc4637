// What the bindings share: the contract of every argument, in one dialect of errors. Python's own checks are
// for the user; these keep whatever calls an op within the memory of its tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

namespace bqnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// --- errors -------------------------------------------------------------------------------------------------------

// "<name> must be <needs>, got <got>".
[[noreturn]] inline void refuse(const char* name, const std::string& needs, const std::string& got) {
  throw std::invalid_argument(std::string(name) + " must be " + needs + ", got " + got);
}

inline void require(bool holds, const char* name, const char* needs, int64_t got) {
  if (!holds) refuse(name, needs, std::to_string(got));
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}

constexpr int64_t kAny = -1;  // a size of a shape that may be anything

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + (size == kAny ? "any" : std::to_string(size));
  return "[" + text + "]";
}

// e.g. "float32 [3, 4], not contiguous".
inline std::string describe(const Tensor& tensor) {
  std::string text = std::string(dtype_name(tensor.scalar_type())) + " " + shape_text(tensor.sizes());
  if (!tensor.is_contiguous()) text += ", not contiguous";
  if (!tensor.is_cpu()) text += tensor.is_cuda() ? ", on a GPU" : ", not on the CPU";
  return text;
}

// --- contracts ----------------------------------------------------------------------------------------------------

inline bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t d = 0;
  for (const int64_t size : shape) {
    if (size != kAny && tensor.size(d) != size) return false;
    ++d;
  }
  return true;
}

// The data of a contiguous tensor on the CPU of this dtype and shape.
template <class T>
T* shaped(const Tensor& tensor, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape) {
  if (tensor.scalar_type() != dtype || !tensor.is_contiguous() || !tensor.is_cpu() || !has_shape(tensor, shape))
    refuse(name, std::string("contiguous ") + dtype_name(dtype) + " " + shape_text(shape) + " on the CPU",
           describe(tensor));
  return static_cast<T*>(tensor.data_ptr());
}

// The data of a contiguous tensor on the CPU of this dtype and of `count` elements, in whatever shape.
template <class T>
T* counted(const Tensor& tensor, const char* name, ScalarType dtype, int64_t count) {
  if (tensor.scalar_type() != dtype || !tensor.is_contiguous() || !tensor.is_cpu() || tensor.numel() != count)
    refuse(name,
           "contiguous " + std::string(dtype_name(dtype)) + " on the CPU of " + std::to_string(count) + " elements",
           describe(tensor));
  return static_cast<T*>(tensor.data_ptr());
}

inline float* floats(const Tensor& tensor, const char* name, int64_t count) {
  return counted<float>(tensor, name, ScalarType::Float, count);
}

inline float* floats(const std::optional<Tensor>& tensor, const char* name, int64_t count) {
  return tensor ? floats(*tensor, name, count) : nullptr;
}

}  // namespace bqnn
