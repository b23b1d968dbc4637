// The extension bqnn._CUDA: tensors to pointers for the kernels of csrc/cuda, as its neighbours for those of csrc/cpu.
// Stable ABI of torch 2.10 and Python's limited API.

#include <Python.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <string>

#include "cuda/packed_linear.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace bqnn {
namespace {

// A contiguous tensor on the GPU whose data begins at a multiple of 16 bytes.
void* data_of(const Tensor& tensor, const char* name) {
  void* data = tensor.mutable_data_ptr();
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous() && reinterpret_cast<uintptr_t>(data) % 16 == 0, name,
                  " must be on the GPU, contiguous and aligned to 16 bytes");
  return data;
}

float* floats_of(const std::optional<Tensor>& tensor, int64_t count, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->numel() == count && tensor->is_cuda() &&
                      tensor->is_contiguous(),
                  name, " must be ", count, " float32 on the GPU, side by side");
  return static_cast<float*>(tensor->mutable_data_ptr());
}

cuda::Element element_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  " must be float32, bfloat16 or float16");
  return type == ScalarType::Float      ? cuda::Element::float32
         : type == ScalarType::BFloat16 ? cuda::Element::bfloat16
                                        : cuda::Element::float16;
}

cuda::Mode mode_of(const std::string& precision) {
  return precision == "fp32" ? cuda::Mode::fp32 : precision == "bf16" ? cuda::Mode::bf16 : cuda::Mode::int8;
}

// Float32 numbers that live as long as the tensor, from torch's allocator.
Tensor new_floats(int64_t count, int32_t device) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &count, &stride, aoti_torch_dtype_float32(),
                                                         aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

void packed_linear_op(Tensor x, Tensor words, Tensor levels, std::optional<Tensor> integers, std::optional<Tensor> bias,
                      std::optional<Tensor> scale, std::optional<Tensor> row_scale, std::string precision, bool relu,
                      Tensor y) {
  STD_TORCH_CHECK(x.dim() == 2 && words.dim() == 2 && levels.dim() == 2 && y.dim() == 2, "matrices are needed");
  const int64_t rows = x.size(0), channels = y.size(1), codebooks = levels.size(0), num_levels = levels.size(1);
  STD_TORCH_CHECK(rows > 0 && y.size(0) == rows && words.size(0) >= channels, "a row for each of x and of the words");
  STD_TORCH_CHECK(words.scalar_type() == ScalarType::Int && words.size(1) % 16 == 0 && words.numel() / 4 < INT32_MAX,
                  "words must be int32, whole blocks a row, and less than 32 GiB");
  STD_TORCH_CHECK(num_levels >= 2 && num_levels <= 16 && (codebooks == 1 || codebooks == channels),
                  "levels must be [1 or channels, 2 to 16]");
  cuda::PackedLinearCall call{};
  call.words = static_cast<const uint32_t*>(data_of(words, "words"));
  call.x = data_of(x, "x");
  call.bias = floats_of(bias, channels, "bias");
  call.scale = floats_of(scale, codebooks, "scale");
  call.row_scale = floats_of(row_scale, rows, "row_scale");
  call.y = data_of(y, "y");
  call.channels = channels;
  call.row_loads = static_cast<int32_t>(words.size(1) / 4);
  call.x_columns = static_cast<int32_t>(x.size(1));
  call.rows = static_cast<int32_t>(rows);
  call.num_levels = static_cast<int32_t>(num_levels);
  call.codebooks = static_cast<int32_t>(codebooks);
  call.mode = mode_of(precision);
  if (call.mode == cuda::Mode::int8) {
    STD_TORCH_CHECK(integers && integers->scalar_type() == ScalarType::Char && integers->is_cuda() &&
                        integers->is_contiguous() && integers->numel() == codebooks * cuda::kIntegers,
                    "integers must be int8 [codebooks, ", cuda::kIntegers, "] on the GPU, contiguous");
    call.integers = static_cast<const int8_t*>(integers->mutable_data_ptr());
  } else {
    call.levels = floats_of(levels, codebooks * num_levels, "levels");
  }
  call.x_element = element_of(x, "x");
  call.y_element = element_of(y, "y");
  call.relu = relu;
  STD_TORCH_CHECK(call.mode != cuda::Mode::int8 || (scale && row_scale), "int8 needs scales");
  if (channels == 0) return;

  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  STD_CUDA_CHECK(static_cast<cudaError_t>(cuda::plan_packed_linear(&call, device)));
  std::optional<Tensor> partial;
  if (call.splits > 1) {
    partial = new_floats(call.splits * rows * channels, device);
    call.partial = static_cast<uint32_t*>(partial->mutable_data_ptr());
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  STD_CUDA_CHECK(static_cast<cudaError_t>(cuda::launch_packed_linear(call, stream)));
}

void round_rows_op(Tensor x, Tensor q, Tensor scale) {
  STD_TORCH_CHECK(x.dim() == 2 && q.dim() == 2 && q.size(0) == x.size(0) && q.size(1) == x.size(1) &&
                      q.scalar_type() == ScalarType::BFloat16,
                  "q must be bfloat16, of the shape of x");
  cuda::RoundRowsCall call{};
  call.x = data_of(x, "x");
  call.q = static_cast<uint16_t*>(data_of(q, "q"));
  call.scale = floats_of(scale, x.size(0), "scale");
  call.columns = x.size(1);
  call.rows = static_cast<int32_t>(x.size(0));
  call.x_element = element_of(x, "x");
  if (call.rows == 0) return;
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  STD_CUDA_CHECK(static_cast<cudaError_t>(cuda::launch_round_rows(call, stream)));
}

}  // namespace

STABLE_TORCH_LIBRARY(bqnn_cuda, m) {
  m.def(
      "packed_linear(Tensor x, Tensor words, Tensor levels, Tensor? integers, Tensor? bias, Tensor? scale,"
      " Tensor? row_scale, str precision, bool relu, Tensor(a!) y) -> ()");
  m.def("round_rows(Tensor x, Tensor(a!) q, Tensor(b!) scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bqnn_cuda, CUDA, m) {
  m.impl("packed_linear", TORCH_BOX(&packed_linear_op));
  m.impl("round_rows", TORCH_BOX(&round_rows_op));
}

}  // namespace bqnn

PyMODINIT_FUNC PyInit__CUDA(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_CUDA", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
