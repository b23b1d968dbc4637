// torch.ops.bqnn_cpu: packed_layout, packed_linear and packed_conv2d, and which kernel runs them.
#include <algorithm>
#include <climits>
#include <cstdlib>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/cpu.h"
#include "cpu/base/pages.h"
#include "cpu/packed/select.h"

namespace bqnn {
namespace {

Precision precision_of(const std::string& precision) {
  if (precision == "fp32") return Precision::fp32;
  if (precision == "bf16") return Precision::bf16;
  if (precision == "int8") return Precision::int8;
  refuse("precision", "\"fp32\", \"bf16\" or \"int8\"", quoted(precision));
}

// Refuses integers of which a channel's products with activations, 127 at most, might not fit 32 bits.
void check_sums(const PackedWeight& weight) {
  constexpr int64_t kMostActivation = 127;
  int64_t most = 1;
  for (int64_t i = 0; i < int64_t{weight.codebooks} * weight.num_levels; ++i)
    most = std::max(most, std::abs(int64_t{weight.int8_levels[i]}));
  require(weight.columns <= INT32_MAX / (kMostActivation * most), "int8_levels", "of sums that 32 bits hold", most);
}

Tensor packed_layout_op(Tensor codes, Tensor levels, Tensor int8_levels, Tensor int8_scale, int64_t columns,
                        std::vector<int64_t> kernel_size, int64_t dilation_w, int64_t groups, std::string precision) {
  const bool linear = kernel_size.empty();
  if (linear) kernel_size = {1, 1};
  require(kernel_size.size() == 2, "kernel_size", "empty or two integers", static_cast<int64_t>(kernel_size.size()));
  for (const int64_t size : kernel_size)
    require(size >= 1 && size <= INT_MAX, "kernel_size", "from 1 to 2^31 - 1", size);
  require(dilation_w >= 1 && dilation_w <= INT_MAX, "dilation_w", "from 1 to 2^31 - 1", dilation_w);
  const int64_t taps = kernel_size[0] * kernel_size[1];
  require(columns >= 1 && columns % taps == 0, "columns", "a multiple of the kernel's taps", columns);
  require(taps <= INT_MAX, "kernel_size", "of fewer than 2^31 taps", taps);
  require(levels.dim() == 2 && levels.size(1) >= 2 && levels.size(1) <= kMostLevels, "levels",
          "two-dimensional with 2 to 16 levels a codebook", levels.dim() == 2 ? levels.size(1) : levels.dim());
  require(codes.dim() == 2 && codes.size(0) >= 1, "codes", "two-dimensional with a row or more a channel",
          codes.dim() == 2 ? codes.size(0) : codes.dim());
  const int64_t channels = codes.size(0), codebooks = levels.size(0), num_levels = levels.size(1);
  require(codebooks == 1 || codebooks == channels, "levels", "one codebook, or one a channel", codebooks);
  require(groups >= 1 && channels % groups == 0, "groups", "a divisor of the channels", groups);
  const int64_t digits = digits_of_byte(static_cast<int>(num_levels));
  PackedWeight weight{shaped<uint8_t>(codes, "codes", ScalarType::Byte, {channels, (columns - 1) / digits + 1}),
                      shaped<float>(levels, "levels", ScalarType::Float, {codebooks, num_levels}),
                      shaped<int8_t>(int8_levels, "int8_levels", ScalarType::Char, {codebooks, num_levels}),
                      counted<float>(int8_scale, "int8_scale", ScalarType::Float, codebooks),
                      channels,
                      columns,
                      groups,
                      static_cast<int>(num_levels),
                      static_cast<int>(codebooks),
                      static_cast<int>(kernel_size[0]),
                      static_cast<int>(kernel_size[1]),
                      static_cast<int>(dilation_w),
                      precision_of(precision),
                      LayoutForm::words};
  if (weight.precision == Precision::int8) check_sums(weight);
  weight.form = form_read(linear ? PackedOp::linear : PackedOp::conv2d, isa(), weight);
  Tensor layout = torch::stable::new_empty(codes, {plan_layout(weight).bytes});
  make_layout(weight, layout.mutable_data_ptr());
  return layout;
}

const PackedLayout& layout_of(const Tensor& tensor) {
  const PackedLayout* layout = nullptr;
  if (dtype_of(tensor) == ScalarType::Byte && tensor.is_contiguous() && tensor.is_cpu())
    layout = view_layout(data_of(tensor, "layout"), static_cast<size_t>(tensor.numel()));
  if (layout == nullptr) refuse("layout", "what packed_layout made", describe(tensor));
  return *layout;
}

Dtype kernel_dtype(const Tensor& x) {
  const ScalarType type = dtype_of(x);
  if ((type != ScalarType::Float && type != ScalarType::BFloat16) || !x.is_cpu())
    refuse("x", "float32 or bfloat16 on the CPU", describe(x));
  data_of(x, "x");
  return type == ScalarType::Float ? Dtype::float32 : Dtype::bfloat16;
}

// The bias as contiguous float32, or nothing.
std::optional<Tensor> float_bias(const std::optional<Tensor>& bias, const PackedLayout& layout) {
  if (!bias) return std::nullopt;
  const ScalarType type = dtype_of(*bias);
  const bool floating = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                        type == ScalarType::Double;
  if (!floating || bias->numel() != layout.channels || !bias->is_cpu())
    refuse("bias", std::to_string(layout.channels) + " floating-point numbers on the CPU", describe(*bias));
  data_of(*bias, "bias");
  if (type == ScalarType::Float && bias->is_contiguous()) return bias;
  return torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
}

// A new output. (torch::stable::empty goes through the dispatcher, which a small layer would notice.)
Tensor new_output(Dtype dtype, const int64_t* size, const int64_t* stride, int64_t dims) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, size, stride, dtype == Dtype::bfloat16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  Tensor out(handle);
  prefer_huge_pages(out.mutable_data_ptr(), static_cast<size_t>(out.numel()) * out.element_size());
  return out;
}

// Refuses sizes of more numbers than an address space holds; a tensor without elements, or with the same ones again and
// again, may have any. Their products do not overflow then.
void check_countable(const int64_t* size, int64_t dims, const char* what, const Tensor& x) {
  double count = 1.0;
  for (int64_t d = 0; d < dims; ++d) count *= static_cast<double>(std::max<int64_t>(size[d], 1));
  if (count > 0x1p45) refuse("x", std::string("of fewer than 2^45 ") + what, describe(x));
}

// An output, and the kernel that made it.
struct Result {
  Tensor y;
  const char* kernel;
};

Result run_linear(Tensor x, const Tensor& layout_tensor, const std::optional<Tensor>& bias, bool relu) {
  constexpr int64_t kMostDims = 64;
  const PackedLayout& layout = layout_of(layout_tensor);
  if (layout.taps() != 1 || layout.groups != 1) refuse("layout", "a linear layer's", "a convolution's");
  const Dtype dtype = kernel_dtype(x);
  const int64_t dims = x.dim();
  if (dims < 1 || dims > kMostDims || x.size(dims - 1) != layout.columns)
    refuse("x", "[..., " + std::to_string(layout.columns) + "]", describe(x));
  check_countable(x.sizes().data(), dims, "numbers", x);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  int64_t size[kMostDims], stride[kMostDims], next = 1;
  for (int64_t d = 0; d < dims; ++d) size[d] = d == dims - 1 ? layout.channels : x.size(d);
  check_countable(size, dims, "outputs", x);
  for (int64_t d = dims - 1; d >= 0; next *= size[d--]) stride[d] = next;
  const std::optional<Tensor> floats = float_bias(bias, layout);
  Tensor y = new_output(dtype, size, stride, dims);
  const PackedCall call = linear_call(
      &layout, {const_cast<void*>(x.const_data_ptr()), dtype, Format::channels_last, layout.columns, layout.columns, 0},
      {y.mutable_data_ptr(), dtype, Format::channels_last, layout.channels, layout.channels, 0},
      floats ? floats->const_data_ptr<float>() : nullptr, relu ? Activation::relu : Activation::none,
      x.numel() / layout.columns);
  const char* kernel = call.images > 0 ? run_packed(PackedOp::linear, isa(), call, torch_threads()) : "none";
  return {y, kernel};
}

// The two numbers of a geometry's argument.
struct Pair {
  int64_t h, w;

  Pair(const std::vector<int64_t>& values, const char* name, int64_t least) {
    require(values.size() == 2, name, "two integers", static_cast<int64_t>(values.size()));
    for (const int64_t value : values)
      if (value < least || value > INT_MAX)
        refuse(name, "from " + std::to_string(least) + " to 2^31 - 1", std::to_string(value));
    h = values[0], w = values[1];
  }
};

// The size of an output along an axis. Of an axis without a choice the stride does not matter: it becomes 1, so that no
// kernel makes room for what lies under it; the same is true of a dilation.
int64_t output_size(int64_t size, int64_t padding, int64_t kernel, int64_t* dilation, int64_t* stride) {
  if (kernel == 1) *dilation = 1;
  const int64_t reach = *dilation * (kernel - 1) + 1, padded = size + 2 * padding;
  if (padded < reach || size < 1)
    refuse("x", "as large as the kernel's reach with its padding, " + std::to_string(reach), std::to_string(padded));
  const int64_t count = (padded - reach) / *stride + 1;
  if (count == 1) *stride = 1;
  return count;
}

// Refuses a padding that makes so much of a small image that a copy of it would not fit the memory.
void check_padded(const Tensor& x, const Pair& padding) {
  constexpr double kMost = 1 << 30;  // numbers of an image, unless it has a 64th of them
  const double image = static_cast<double>(x.size(1)) * static_cast<double>(x.size(2)) * static_cast<double>(x.size(3));
  const double padded = static_cast<double>(x.size(1)) * static_cast<double>(x.size(2) + 2 * padding.h) *
                        static_cast<double>(x.size(3) + 2 * padding.w);
  if (padded > kMost && padded > 64.0 * image)
    refuse("padding", "less than what makes 2^30 numbers of an image",
           "[" + std::to_string(padding.h) + ", " + std::to_string(padding.w) + "]");
}

Result run_conv2d(Tensor x, const Tensor& layout_tensor, const std::optional<Tensor>& bias,
                  const std::vector<int64_t>& strides, const std::vector<int64_t>& paddings,
                  const std::vector<int64_t>& dilations, bool relu) {
  const PackedLayout& layout = layout_of(layout_tensor);
  const int64_t inputs = layout.inputs * layout.groups;
  const Dtype dtype = kernel_dtype(x);
  if (x.dim() != 4 || x.size(1) != inputs)
    refuse("x", "[batch, " + std::to_string(inputs) + ", height, width]", describe(x));
  Pair stride(strides, "stride", 1), dilation(dilations, "dilation", 1);
  const Pair padding(paddings, "padding", 0);
  require(layout.kernel_w == 1 || dilation.w == layout.dilation_w, "dilation", "the layout's along the width",
          dilation.w);
  const int64_t images = x.size(0), height = x.size(2), width = x.size(3);
  check_countable(x.sizes().data(), 4, "numbers", x);
  const bool contiguous = x.is_contiguous();
  const bool channels_last = !contiguous && is_channels_last(x);
  if (!contiguous && !channels_last) x = torch::stable::contiguous(x);
  const int64_t out[2] = {output_size(height, padding.h, layout.kernel_h, &dilation.h, &stride.h),
                          output_size(width, padding.w, layout.kernel_w, &dilation.w, &stride.w)};
  check_padded(x, padding);
  const int64_t channels = layout.channels, size[4] = {images, channels, out[0], out[1]};
  check_countable(size, 4, "outputs", x);
  const int64_t pixels = out[0] * out[1];
  const int64_t planar[4] = {channels * pixels, pixels, out[1], 1};
  const int64_t last[4] = {channels * pixels, 1, channels * out[1], channels};
  const std::optional<Tensor> floats = float_bias(bias, layout);
  Tensor y = new_output(dtype, size, channels_last ? last : planar, 4);
  const Format format = channels_last ? Format::channels_last : Format::contiguous;
  const PackedCall call{&layout,
                        {const_cast<void*>(x.const_data_ptr()), dtype, format, inputs * height * width, inputs, 0},
                        {y.mutable_data_ptr(), dtype, format, channels * pixels, channels, 0},
                        floats ? floats->const_data_ptr<float>() : nullptr,
                        relu ? Activation::relu : Activation::none,
                        images,
                        height,
                        width,
                        out[0],
                        out[1],
                        static_cast<int>(stride.h),
                        static_cast<int>(stride.w),
                        static_cast<int>(padding.h),
                        static_cast<int>(padding.w),
                        static_cast<int>(dilation.h)};
  const char* kernel = call.images > 0 ? run_packed(PackedOp::conv2d, isa(), call, torch_threads()) : "none";
  return {y, kernel};
}

Tensor packed_linear_op(Tensor x, Tensor layout, std::optional<Tensor> bias, bool relu) {
  return run_linear(std::move(x), layout, bias, relu).y;
}

Tensor packed_conv2d_op(Tensor x, Tensor layout, std::optional<Tensor> bias, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, bool relu) {
  return run_conv2d(std::move(x), layout, bias, stride, padding, dilation, relu).y;
}

// A kernel may leave activations that it can not multiply to the next one of the table: so the call itself is made.
std::string packed_linear_kernel_op(Tensor x, Tensor layout) {
  return run_linear(std::move(x), layout, std::nullopt, false).kernel;
}

std::string packed_conv2d_kernel_op(Tensor x, Tensor layout, std::vector<int64_t> stride, std::vector<int64_t> padding,
                                    std::vector<int64_t> dilation) {
  return run_conv2d(std::move(x), layout, std::nullopt, stride, padding, dilation, false).kernel;
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
  m.def("packed_linear_kernel(Tensor x, Tensor layout) -> str");
  m.def("packed_conv2d_kernel(Tensor x, Tensor layout, int[] stride, int[] padding, int[] dilation) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(bqnn_cpu, CPU, m) {
  m.impl("packed_layout", TORCH_BOX(&packed_layout_op));
  m.impl("packed_linear", TORCH_BOX(&packed_linear_op));
  m.impl("packed_conv2d", TORCH_BOX(&packed_conv2d_op));
  m.impl("packed_linear_kernel", TORCH_BOX(&packed_linear_kernel_op));
  m.impl("packed_conv2d_kernel", TORCH_BOX(&packed_conv2d_kernel_op));
}

}  // namespace bqnn
