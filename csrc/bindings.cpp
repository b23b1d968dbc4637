// The only file that includes torch: turns tensors into raw pointers and torch's threads into a Parallel.
// Stable ABI of torch 2.10 and Python's limited API, so that one build serves later versions of both.

#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/assign_codes.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/parallel.h"
#include "cpu/spike_slab_kl.h"

using torch::stable::Tensor;

namespace bqnn {
namespace {

Parallel torch_threads() {
  return {[](int64_t n, int64_t grain, Parallel::Body body, void* context) {
            torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
          },
          static_cast<int>(torch::stable::get_num_threads())};
}

Isa isa() {
  static const Isa chosen = [] {
    Isa isa;
    const char* error = nullptr;
    if (!chosen_isa(&isa, &error)) throw std::runtime_error(error);
    return isa;
  }();
  return chosen;
}

int64_t cpu_isa() { return static_cast<int64_t>(isa()); }

// The backends in bqnn/ops hand in contiguous tensors, float32 but for codes, of the shapes that the ops check.

int64_t columns_of(const Tensor& weight) { return weight.size(0) ? weight.numel() / weight.size(0) : 0; }

void assign_codes_op(Tensor weight, Tensor thresholds, bool packed, Tensor out) {
  const AssignCodes weights{weight.const_data_ptr<float>(), thresholds.const_data_ptr<float>(),
                            weight.size(0),                 columns_of(weight),
                            thresholds.size(0) != 1,        static_cast<int>(thresholds.size(1)) + 1};
  (packed ? assign_codes_packed : assign_codes)(torch_threads(), isa(), weights, out.mutable_data_ptr<uint8_t>());
}

SpikeSlabKl make_prior(const Tensor& weight, const Tensor& log_sigma2, const Tensor& levels, const Tensor& tau) {
  return {weight.const_data_ptr<float>(), log_sigma2.const_data_ptr<float>(), levels.const_data_ptr<float>(),
          tau.const_data_ptr<float>(),    weight.size(0),                     columns_of(weight),
          levels.size(0) != 1,            static_cast<int>(levels.size(1))};
}

void spike_slab_kl_op(Tensor weight, Tensor log_sigma2, Tensor levels, Tensor tau, Tensor out) {
  *out.mutable_data_ptr<float>() =
      spike_slab_kl(torch_threads(), isa(), make_prior(weight, log_sigma2, levels, tau));
}

void spike_slab_kl_backward_op(Tensor grad, Tensor weight, Tensor log_sigma2, Tensor levels, Tensor tau,
                               Tensor grad_weight, Tensor grad_log_sigma2, Tensor grad_levels) {
  spike_slab_kl_backward(torch_threads(), isa(), make_prior(weight, log_sigma2, levels, tau),
                         *grad.const_data_ptr<float>(),
                         {grad_weight.mutable_data_ptr<float>(), grad_log_sigma2.mutable_data_ptr<float>(),
                          grad_levels.mutable_data_ptr<float>()});
}

// A new output of four dimensions at most. A large one is fresh memory from the system: in huge pages it costs a
// fraction of the page faults. (torch::stable::empty goes through the dispatcher, which a small layer would notice.)
Tensor new_output(bool half, const std::vector<int64_t>& size, bool channels_last) {
  std::vector<int64_t> stride(size.size());
  int64_t next = 1;
  if (channels_last) {
    stride = {size[1] * size[2] * size[3], 1, size[1] * size[3], size[1]};
  } else {
    for (size_t i = size.size(); i-- > 0; next *= size[i]) stride[i] = next;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(), stride.data(),
                                                  half ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor out(handle);
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(out.mutable_data_ptr()) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(out.mutable_data_ptr()) + out.numel() * out.element_size()) / kHuge * kHuge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return out;
}

Tensor packed_layout_op(Tensor codes, Tensor levels, Tensor int8_levels, Tensor int8_scale, int64_t columns,
                        std::vector<int64_t> kernel_size, int64_t dilation_w, int64_t groups, std::string precision) {
  const int precision_index = precision == "fp32" ? 0 : precision == "bf16" ? 1 : 2;
  const int64_t channels = codes.size(0), taps = kernel_size.at(0) * kernel_size.at(1);
  STD_TORCH_CHECK(columns > 0 && columns % taps == 0 && groups > 0 && channels % groups == 0,
                  "columns must be a multiple of the kernel's taps, and channels of groups");
  const PackedWeight weight{codes.const_data_ptr<uint8_t>(),
                            levels.const_data_ptr<float>(),
                            int8_levels.const_data_ptr<int8_t>(),
                            int8_scale.const_data_ptr<float>(),
                            channels,
                            columns,
                            groups,
                            static_cast<int>(levels.size(1)),
                            static_cast<int>(levels.size(0)),
                            static_cast<int>(kernel_size[0]),
                            static_cast<int>(kernel_size[1]),
                            static_cast<int>(dilation_w),
                            static_cast<Precision>(precision_index)};
  Tensor layout = torch::stable::new_empty(codes, {static_cast<int64_t>(layout_bytes(weight))});
  make_layout(weight, layout.mutable_data_ptr());
  return layout;
}

const PackedLayout& layout_of(const Tensor& tensor) {
  const PackedLayout* layout = view_layout(tensor.const_data_ptr(), static_cast<size_t>(tensor.numel()));
  STD_TORCH_CHECK(layout != nullptr, "layout must be what packed_layout made");
  return *layout;
}

bool is_half(const Tensor& x) {
  const bool half = x.scalar_type() == torch::headeronly::ScalarType::BFloat16;
  STD_TORCH_CHECK(half || x.scalar_type() == torch::headeronly::ScalarType::Float, "x must be float32 or bfloat16");
  return half;
}

// The bias as contiguous float32, or nothing.
std::optional<Tensor> float_bias(const std::optional<Tensor>& bias, const PackedLayout& layout) {
  if (!bias) return std::nullopt;
  STD_TORCH_CHECK(bias->numel() == layout.channels, "bias must have one number a channel");
  if (bias->scalar_type() == torch::headeronly::ScalarType::Float && bias->is_contiguous()) return bias;
  return torch::stable::contiguous(torch::stable::to(*bias, torch::headeronly::ScalarType::Float));
}

const float* data_of(const std::optional<Tensor>& bias) { return bias ? bias->const_data_ptr<float>() : nullptr; }

Tensor packed_linear_op(Tensor x, Tensor layout_tensor, std::optional<Tensor> bias) {
  const PackedLayout& layout = layout_of(layout_tensor);
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims > 0 && x.size(dims - 1) == layout.columns, "x must have ", layout.columns, " columns");
  const bool half = is_half(x);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size.back() = layout.channels;
  Tensor y = new_output(half, size, false);
  const std::optional<Tensor> floats = float_bias(bias, layout);
  const LinearCall call{&layout, x.const_data_ptr(), y.mutable_data_ptr(), data_of(floats), x.numel() / layout.columns, half};
  if (call.rows > 0) packed_kernels(isa()).linear(call, torch_threads());
  return y;
}

Tensor packed_conv2d_op(Tensor x, Tensor layout_tensor, std::optional<Tensor> bias, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const PackedLayout& layout = layout_of(layout_tensor);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == layout.inputs * layout.groups, "x must have the shape [batch, ",
                  layout.inputs * layout.groups, ", height, width]");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding and dilation must be two integers each");
  STD_TORCH_CHECK(layout.kernel_w == 1 || dilation[1] == layout.dilation_w, "dilation must be the layout's");
  const bool half = is_half(x), contiguous = x.is_contiguous();
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const bool channels_last = !contiguous && x.stride(1) == 1 && x.stride(3) == channels &&
                             x.stride(2) == channels * width && x.stride(0) == channels * width * height;
  if (!contiguous && !channels_last) x = torch::stable::contiguous(x);
  const int kernel[2] = {layout.kernel_h, layout.kernel_w};
  std::vector<int64_t> size{x.size(0), layout.channels, 0, 0};
  for (int i = 0; i < 2; ++i)
    size[2 + i] = (x.size(2 + i) + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) / stride[i] + 1;
  STD_TORCH_CHECK(size[2] > 0 && size[3] > 0, "x must be large enough for the kernel");
  Tensor y = new_output(half, size, channels_last);
  const std::optional<Tensor> floats = float_bias(bias, layout);
  const Conv2dCall call{&layout,
                        x.const_data_ptr(),
                        y.mutable_data_ptr(),
                        data_of(floats),
                        size[0],
                        height,
                        width,
                        size[2],
                        size[3],
                        static_cast<int>(stride[0]),
                        static_cast<int>(stride[1]),
                        static_cast<int>(padding[0]),
                        static_cast<int>(padding[1]),
                        static_cast<int>(dilation[0]),
                        channels_last,
                        half};
  if (call.images > 0) packed_kernels(isa()).conv2d(call, torch_threads());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY(bqnn_cpu, m) {
  m.def(
      "packed_layout(Tensor codes, Tensor levels, Tensor int8_levels, Tensor int8_scale, int columns,"
      " int[] kernel_size, int dilation_w, int groups, str precision) -> Tensor");
  m.def("packed_linear(Tensor x, Tensor layout, Tensor? bias) -> Tensor");
  m.def("packed_conv2d(Tensor x, Tensor layout, Tensor? bias, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def("isa() -> int");
  m.def("assign_codes(Tensor weight, Tensor thresholds, bool packed, Tensor(a!) out) -> ()");
  m.def("spike_slab_kl(Tensor weight, Tensor log_sigma2, Tensor levels, Tensor tau, Tensor(a!) out) -> ()");
  m.def(
      "spike_slab_kl_backward(Tensor grad, Tensor weight, Tensor log_sigma2, Tensor levels, Tensor tau,"
      " Tensor(a!) grad_weight, Tensor(b!) grad_log_sigma2, Tensor(c!) grad_levels) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bqnn_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(bqnn_cpu, CPU, m) {
  m.impl("packed_layout", TORCH_BOX(&packed_layout_op));
  m.impl("packed_linear", TORCH_BOX(&packed_linear_op));
  m.impl("packed_conv2d", TORCH_BOX(&packed_conv2d_op));
  m.impl("assign_codes", TORCH_BOX(&assign_codes_op));
  m.impl("spike_slab_kl", TORCH_BOX(&spike_slab_kl_op));
  m.impl("spike_slab_kl_backward", TORCH_BOX(&spike_slab_kl_backward_op));
}

}  // namespace bqnn

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
