// The extension bqnn._CUDA: tensors to pointers for the kernels of csrc/cuda, as its neighbours for those of csrc/cpu.
// Stable ABI of torch 2.10 and Python's limited API.

#include <Python.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <string>

#include "bindings/tensors.h"
#include "cuda/packed_linear.h"

namespace bqnn {
namespace {

// The data of a contiguous tensor on the GPU of this dtype, where one is given, and shape, from a multiple of 16 bytes.
void* gpu_data(const Tensor& tensor, const char* name, std::optional<ScalarType> dtype,
               std::initializer_list<int64_t> shape) {
  void* data = tensor.data_ptr();
  if ((dtype && tensor.scalar_type() != *dtype) || !tensor.is_cuda() || !tensor.is_contiguous() ||
      !has_shape(tensor, shape) || reinterpret_cast<uintptr_t>(data) % 16 != 0)
    refuse(name,
           std::string("contiguous ") + (dtype ? dtype_name(*dtype) : "") + " " + shape_text(shape) +
               " on the GPU, from a multiple of 16 bytes",
           describe(tensor));
  return data;
}

float* gpu_floats(const std::optional<Tensor>& tensor, int64_t count, const char* name) {
  if (!tensor) return nullptr;
  if (tensor->scalar_type() != ScalarType::Float || tensor->numel() != count || !tensor->is_cuda() ||
      !tensor->is_contiguous())
    refuse(name, "contiguous float32 on the GPU of " + std::to_string(count) + " elements", describe(*tensor));
  return static_cast<float*>(tensor->data_ptr());
}

cuda::Element element_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return cuda::Element::float32;
  if (type == ScalarType::BFloat16) return cuda::Element::bfloat16;
  if (type == ScalarType::Half) return cuda::Element::float16;
  refuse(name, "float32, bfloat16 or float16", describe(tensor));
}

cuda::Mode mode_of(const std::string& precision) {
  if (precision == "fp32") return cuda::Mode::fp32;
  if (precision == "bf16") return cuda::Mode::bf16;
  if (precision == "int8") return cuda::Mode::int8;
  refuse("precision", "\"fp32\", \"bf16\" or \"int8\"", "\"" + precision + "\"");
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
  require(x.dim() == 2, "x", "a matrix", x.dim());
  require(words.dim() == 2, "words", "a matrix", words.dim());
  require(levels.dim() == 2, "levels", "a matrix", levels.dim());
  require(y.dim() == 2, "y", "a matrix", y.dim());
  const int64_t rows = x.size(0), channels = y.size(1), codebooks = levels.size(0), num_levels = levels.size(1);
  require(rows > 0 && rows <= INT32_MAX, "x", "of 1 to 2^31 - 1 rows", rows);
  require(x.size(1) <= INT32_MAX, "x", "of fewer than 2^31 columns", x.size(1));
  require(words.size(0) >= channels, "words", "a row or more a channel of y", words.size(0));
  require(words.size(1) % 16 == 0 && words.numel() / 4 < INT32_MAX, "words", "whole blocks a row, less than 32 GiB",
          words.size(1));
  require(num_levels >= 2 && num_levels <= 16, "levels", "2 to 16 a codebook", num_levels);
  require(codebooks == 1 || codebooks == channels, "levels", "one codebook, or one a channel", codebooks);
  const int64_t columns = x.size(1);
  // A word has 32, 16 or 8 codes.
  const int64_t capacity = num_levels == 2 ? 32 : num_levels <= 4 ? 16 : 8;
  require(columns <= words.size(1) * capacity, "x", "of no more columns than the words have codes", columns);
  cuda::PackedLinearCall call{};
  call.words = static_cast<const uint32_t*>(gpu_data(words, "words", ScalarType::Int, {kAny, kAny}));
  call.x = gpu_data(x, "x", std::nullopt, {rows, columns});
  call.bias = gpu_floats(bias, channels, "bias");
  call.scale = gpu_floats(scale, codebooks, "scale");
  call.row_scale = gpu_floats(row_scale, rows, "row_scale");
  call.y = gpu_data(y, "y", std::nullopt, {rows, channels});
  call.channels = channels;
  call.row_loads = static_cast<int32_t>(words.size(1) / 4);
  call.x_columns = static_cast<int32_t>(columns);
  call.rows = static_cast<int32_t>(rows);
  call.num_levels = static_cast<int32_t>(num_levels);
  call.codebooks = static_cast<int32_t>(codebooks);
  call.mode = mode_of(precision);
  if (call.mode == cuda::Mode::int8) {
    if (!integers) refuse("integers", "given in \"int8\"", "none");
    if (!scale) refuse("scale", "given in \"int8\"", "none");
    if (!row_scale) refuse("row_scale", "given in \"int8\"", "none");
    if (integers->scalar_type() != ScalarType::Char || !integers->is_cuda() || !integers->is_contiguous() ||
        integers->numel() != codebooks * cuda::kIntegers)
      refuse("integers", "contiguous int8 of " + std::to_string(codebooks * cuda::kIntegers) + " elements on the GPU",
             describe(*integers));
    call.integers = static_cast<const int8_t*>(integers->data_ptr());
  } else {
    call.levels = gpu_floats(levels, codebooks * num_levels, "levels");
  }
  call.x_element = element_of(x, "x");
  call.y_element = element_of(y, "y");
  call.relu = relu;
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
  require(x.dim() == 2, "x", "a matrix", x.dim());
  require(x.size(0) <= INT32_MAX, "x", "of fewer than 2^31 rows", x.size(0));
  cuda::RoundRowsCall call{};
  call.x = gpu_data(x, "x", std::nullopt, {kAny, kAny});
  call.q = static_cast<uint16_t*>(gpu_data(q, "q", ScalarType::BFloat16, {x.size(0), x.size(1)}));
  call.scale = gpu_floats(scale, x.size(0), "scale");
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
