// What the bindings share: the contract of every argument, in one dialect of errors. Python's own checks are
// for the user; these keep whatever calls an op within the memory of its tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
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

// A string of the caller's, no longer than a line.
inline std::string quoted(const std::string& text) {
  constexpr size_t kMost = 40;
  return "\"" + text.substr(0, kMost) + (text.size() > kMost ? "...\"" : "\"");
}

inline void require(bool holds, const char* name, const char* needs, int64_t got) {
  if (!holds) refuse(name, needs, std::to_string(got));
}

// The dtype; of no tensor, and of one whose dtype the stable ABI has no name for, ScalarType::Undefined.
inline ScalarType dtype_of(const Tensor& tensor) {
  if (!tensor.defined()) return ScalarType::Undefined;
  try {
    return tensor.scalar_type();
  } catch (const std::exception&) {
    return ScalarType::Undefined;
  }
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
  if (!tensor.defined()) return "none";
  std::string text = std::string(dtype_name(dtype_of(tensor))) + " " + shape_text(tensor.sizes());
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

// Whether images lie pixel by pixel. The stride of a dimension of size 1 says nothing.
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

// Where a tensor's elements are, from the first to the last: the addresses [begin, end), none where it is empty.
struct TensorBytes {
  uintptr_t begin = 0, end = 0;

  TensorBytes(const Tensor& tensor) {
    if (!tensor.defined() || tensor.numel() == 0) return;
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    end = begin + static_cast<uintptr_t>(last + 1) * tensor.element_size();
  }
  TensorBytes(const std::optional<Tensor>& tensor) : TensorBytes(tensor ? TensorBytes(*tensor) : TensorBytes()) {}

  bool meets(const TensorBytes& other) const { return begin < other.end && other.begin < end; }

 private:
  TensorBytes() = default;
};

// The data of a tensor on the CPU. Its elements lie at multiples of their size, and in its storage, which may have
// been made smaller than the tensor.
inline void* data_of(const Tensor& tensor, const char* name) {
  const TensorBytes memory(tensor);
  const uintptr_t size = tensor.element_size();
  if (memory.begin % size != 0)
    refuse(name, "aligned to its elements of " + std::to_string(size) + " bytes", describe(tensor));
  int64_t stored = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &stored));
  const uintptr_t taken = static_cast<uintptr_t>(tensor.storage_offset()) * size + (memory.end - memory.begin);
  if (memory.begin != memory.end && taken > static_cast<uintptr_t>(stored))
    refuse(name, "within its storage", describe(tensor) + " in " + std::to_string(stored) + " bytes");
  return tensor.data_ptr();
}

struct Written {
  const char* name;
  TensorBytes memory;
};

// Refuses what an op writes, if an input lies in the same memory, or another output.
inline void require_apart(std::initializer_list<Written> outputs, std::initializer_list<TensorBytes> inputs) {
  for (const Written& output : outputs) {
    bool shared = false;
    for (const TensorBytes& input : inputs) shared |= output.memory.meets(input);
    for (const Written& other : outputs) shared |= &other != &output && output.memory.meets(other.memory);
    if (shared) refuse(output.name, "memory of its own", "some of another argument's");
  }
}

// The data of a contiguous tensor on the CPU of this dtype and shape.
template <class T>
T* shaped(const Tensor& tensor, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape) {
  if (dtype_of(tensor) != dtype || !tensor.is_contiguous() || !tensor.is_cpu() || !has_shape(tensor, shape))
    refuse(name, std::string("contiguous ") + dtype_name(dtype) + " " + shape_text(shape) + " on the CPU",
           describe(tensor));
  return static_cast<T*>(data_of(tensor, name));
}

// The data of a contiguous tensor on the CPU of this dtype and of `count` elements, in whatever shape.
template <class T>
T* counted(const Tensor& tensor, const char* name, ScalarType dtype, int64_t count) {
  if (dtype_of(tensor) != dtype || !tensor.is_contiguous() || !tensor.is_cpu() || tensor.numel() != count)
    refuse(name,
           "contiguous " + std::string(dtype_name(dtype)) + " on the CPU of " + std::to_string(count) + " elements",
           describe(tensor));
  return static_cast<T*>(data_of(tensor, name));
}

inline float* floats(const Tensor& tensor, const char* name, int64_t count) {
  return counted<float>(tensor, name, ScalarType::Float, count);
}

inline float* floats(const std::optional<Tensor>& tensor, const char* name, int64_t count) {
  return tensor ? floats(*tensor, name, count) : nullptr;
}

}  // namespace bqnn
