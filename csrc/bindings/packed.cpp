// torch.ops.bqnn_cpu: packed_layout, packed_linear and packed_conv2d.
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "bindings/tensors.h"
#include "cpu/base/pages.h"
#include "cpu/packed/call.h"

namespace bqnn {
namespace {

// A new output of four dimensions at most. (torch::stable::empty goes through the dispatcher, which a small layer would
// notice.)
Tensor new_output(bool half, const std::vector<int64_t>& size, bool channels_last) {
  std::vector<int64_t> stride(size.size());
  int64_t next = 1;
  if (channels_last) {
    stride = {size[1] * size[2] * size[3], 1, size[1] * size[3], size[1]};
  } else {
    for (size_t i = size.size(); i-- > 0; next *= size[i]) stride[i] = next;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(size.size()), size.data(), stride.data(),
      half ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor out(handle);
  prefer_huge_pages(out.mutable_data_ptr(), static_cast<size_t>(out.numel()) * out.element_size());
  return out;
}

Tensor packed_layout_op(Tensor codes, Tensor levels, Tensor int8_levels, Tensor int8_scale, int64_t columns,
                        std::vector<int64_t> kernel_size, int64_t dilation_w, int64_t groups, std::string precision) {
  const int precision_index = precision == "fp32" ? 0 : precision == "bf16" ? 1 : 2;
  const bool linear = kernel_size.empty();
  if (linear) kernel_size = {1, 1};
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
                            static_cast<Precision>(precision_index),
                            linear ? isa() >= Isa::avx512 : isa() == Isa::avx512};
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
  const bool half = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(half || x.scalar_type() == ScalarType::Float, "x must be float32 or bfloat16");
  return half;
}

// The bias as contiguous float32, or nothing.
std::optional<Tensor> float_bias(const std::optional<Tensor>& bias, const PackedLayout& layout) {
  if (!bias) return std::nullopt;
  STD_TORCH_CHECK(bias->numel() == layout.channels, "bias must have one number a channel");
  if (bias->scalar_type() == ScalarType::Float && bias->is_contiguous()) return bias;
  return torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
}

const float* data_of(const std::optional<Tensor>& bias) { return bias ? bias->const_data_ptr<float>() : nullptr; }

Tensor packed_linear_op(Tensor x, Tensor layout_tensor, std::optional<Tensor> bias, bool relu) {
  const PackedLayout& layout = layout_of(layout_tensor);
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims > 0 && x.size(dims - 1) == layout.columns, "x must have ", layout.columns, " columns");
  const bool half = is_half(x);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size.back() = layout.channels;
  Tensor y = new_output(half, size, false);
  const std::optional<Tensor> floats = float_bias(bias, layout);
  const LinearCall call{&layout,         x.const_data_ptr(),         y.mutable_data_ptr(),
                        data_of(floats), x.numel() / layout.columns, half,
                        relu};
  if (call.rows > 0) packed_kernels(isa()).linear(call, torch_threads());
  return y;
}

Tensor packed_conv2d_op(Tensor x, Tensor layout_tensor, std::optional<Tensor> bias, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, bool relu) {
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
                        half,
                        relu};
  if (call.images > 0) packed_kernels(isa()).conv2d(call, torch_threads());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(bqnn_cpu, m) {
  m.def(
      "packed_layout(Tensor codes, Tensor levels, Tensor int8_levels, Tensor int8_scale, int columns,"
      " int[] kernel_size, int dilation_w, int groups, str precision) -> Tensor");
  m.def("packed_linear(Tensor x, Tensor layout, Tensor? bias, bool relu=False) -> Tensor");
  m.def(
      "packed_conv2d(Tensor x, Tensor layout, Tensor? bias, int[] stride, int[] padding, int[] dilation,"
      " bool relu=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bqnn_cpu, CPU, m) {
  m.impl("packed_layout", TORCH_BOX(&packed_layout_op));
  m.impl("packed_linear", TORCH_BOX(&packed_linear_op));
  m.impl("packed_conv2d", TORCH_BOX(&packed_conv2d_op));
}

}  // namespace bqnn
