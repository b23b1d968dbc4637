// The only file that includes torch: turns tensors into raw pointers and torch's threads into a Parallel.
// Stable ABI of torch 2.10 and Python's limited API, so that one build serves later versions of both.

#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/assign_codes.h"
#include "cpu/codebook.h"
#include "cpu/elementwise.h"
#include "cpu/isa.h"
#include "cpu/noise.h"
#include "cpu/packed.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/spike_slab_kl.h"
#include "cpu/weights.h"

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

// --- tensors: what Python hands in is checked there; here, what would read or write past an end --------------------

using torch::headeronly::ScalarType;

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("bqnn_cpu: ") + what);
}

float* floats(const Tensor& tensor) {
  require(tensor.scalar_type() == ScalarType::Float, "a float32 tensor is needed");
  require(tensor.is_contiguous(), "a contiguous tensor is needed");
  return static_cast<float*>(tensor.data_ptr());
}

float* floats(const std::optional<Tensor>& tensor) { return tensor ? floats(*tensor) : nullptr; }

// The elements of a tensor of `count` that lie side by side, in whatever order.
Elements elements(const Tensor& tensor, int64_t count) {
  const bool bfloat16 = tensor.scalar_type() == ScalarType::BFloat16;
  require(bfloat16 || tensor.scalar_type() == ScalarType::Float, "a float32 or bfloat16 tensor is needed");
  require(tensor.numel() == count, "tensors of one size are needed");
  return {tensor.data_ptr(), bfloat16};
}

Noise noise(const std::optional<Tensor>& seed, int64_t offset) {
  if (!seed) return {};
  return {static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr())), static_cast<uint64_t>(offset)};
}

// A linear layer's tensor is one row; an image's is [batch, channels, pixels].
PlaneShape plane_shape(const Tensor& tensor) {
  if (tensor.dim() != 4) return {1, 1, tensor.numel()};
  return {tensor.size(0), tensor.size(1), tensor.size(2) * tensor.size(3)};
}

bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4) return false;
  const int order[] = {1, 3, 2, 0};
  int64_t expected = 1;
  for (int d : order) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

Plane plane(const Tensor& tensor, const PlaneShape& shape) {
  const bool planar = tensor.is_contiguous();
  require(planar || is_channels_last(tensor), "a contiguous or channels-last tensor is needed");
  return {elements(tensor, shape.batch * shape.channels * shape.pixels), !planar};
}

Posterior posterior(const Tensor& weight, const std::optional<Tensor>& log_sigma2, const Tensor& levels,
                    const Tensor& thresholds) {
  const int64_t groups = levels.size(0), num_levels = levels.size(1);
  require(num_levels >= 2 && num_levels <= kMaxLevels, "2 to 16 levels are needed");
  require(thresholds.size(0) == groups && thresholds.size(1) == num_levels - 1, "thresholds between levels are needed");
  require(groups == 1 || groups == weight.size(0), "one codebook, or one a channel, is needed");
  require(!log_sigma2 || log_sigma2->numel() == weight.numel(), "tensors of one size are needed");
  return {floats(weight), floats(log_sigma2),          floats(levels), floats(thresholds), weight.numel(),
          groups,         static_cast<int>(num_levels)};
}

// --- noise --------------------------------------------------------------------------------------------------------

void random_words_op(int64_t seed, int64_t first, Tensor out) {
  require(out.scalar_type() == ScalarType::Int && out.is_contiguous() && out.numel() % 4 == 0,
          "int32 words are needed");
  elementwise(isa()).random_words(static_cast<uint64_t>(seed), static_cast<uint64_t>(first), out.numel() / 4,
                                  static_cast<uint32_t*>(out.data_ptr()));
}

void add_noise_op(Tensor mean, Tensor variance, Tensor seed, int64_t offset, bool keep_slope) {
  const PlaneShape shape = plane_shape(mean);
  add_noise(torch_threads(), isa(), shape, plane(mean, shape), plane(variance, shape), noise(seed, offset), keep_slope);
}

void multiply_op(Tensor grad, Tensor slope, Tensor out) {
  const PlaneShape shape = plane_shape(grad);
  multiply(torch_threads(), isa(), shape, plane(grad, shape), plane(slope, shape), plane(out, shape));
}

void noise_gradient_op(Tensor grad, Tensor variance, Tensor seed, int64_t offset, Tensor out) {
  const PlaneShape shape = plane_shape(grad);
  noise_gradient(torch_threads(), isa(), shape, plane(grad, shape), plane(variance, shape), noise(seed, offset),
                 plane(out, shape));
}

void square_op(Tensor x, Tensor out) {
  const PlaneShape shape = plane_shape(x);
  square(torch_threads(), isa(), shape, plane(x, shape), plane(out, shape));
}

void add_square_gradient_op(Tensor grad, Tensor x, Tensor grad_square) {
  const PlaneShape shape = plane_shape(grad);
  add_square_gradient(torch_threads(), isa(), shape, plane(grad, shape), plane(x, shape), plane(grad_square, shape));
}

// --- weights ------------------------------------------------------------------------------------------------------

void sample_op(Tensor weight, std::optional<Tensor> log_sigma2, Tensor levels, Tensor thresholds,
               std::optional<Tensor> seed, int64_t offset, Tensor quantized) {
  const Posterior q = posterior(weight, log_sigma2, levels, thresholds);
  require(quantized.numel() == q.weights, "tensors of one size are needed");
  sample(torch_threads(), isa(), q, noise(seed, offset), floats(quantized));
}

void sample_backward_op(Tensor grad, Tensor weight, std::optional<Tensor> log_sigma2, Tensor levels, Tensor thresholds,
                        std::optional<Tensor> seed, int64_t offset, std::optional<Tensor> grad_log_sigma2,
                        Tensor grad_levels) {
  const Posterior q = posterior(weight, log_sigma2, levels, thresholds);
  require(grad.numel() == q.weights && grad_levels.numel() == levels.numel(), "tensors of one size are needed");
  require(!log_sigma2 || (grad_log_sigma2 && grad_log_sigma2->numel() == q.weights), "tensors of one size are needed");
  sample_backward(torch_threads(), isa(), q, noise(seed, offset), floats(grad), floats(grad_log_sigma2),
                  floats(grad_levels));
}

void moments_op(Tensor weight, Tensor log_sigma2, Tensor levels, Tensor thresholds, int64_t mode,
                std::optional<Tensor> mean, Tensor variance) {
  const Posterior q = posterior(weight, log_sigma2, levels, thresholds);
  require(mode == static_cast<int64_t>(Moments::gaussian) || (mean && mean->numel() == q.weights),
          "tensors of one size are needed");
  require(variance.is_contiguous(), "a contiguous tensor is needed");
  moments(torch_threads(), isa(), q, static_cast<Moments>(mode), floats(mean), elements(variance, q.weights));
}

// Turns grad_mean into the weight's gradient.
void moments_backward_op(Tensor grad_mean, Tensor grad_variance, Tensor weight, Tensor log_sigma2, Tensor levels,
                         Tensor thresholds, int64_t mode, Tensor grad_log_sigma2, Tensor grad_levels,
                         Tensor grad_thresholds) {
  const Posterior q = posterior(weight, log_sigma2, levels, thresholds);
  require(grad_mean.numel() == q.weights && grad_log_sigma2.numel() == q.weights &&
              grad_levels.numel() == levels.numel() && grad_thresholds.numel() == thresholds.numel(),
          "tensors of one size are needed");
  require(grad_variance.is_contiguous(), "a contiguous tensor is needed");
  moments_backward(torch_threads(), isa(), q, static_cast<Moments>(mode), floats(grad_mean),
                   elements(grad_variance, q.weights), floats(grad_mean), floats(grad_log_sigma2), floats(grad_levels),
                   floats(grad_thresholds));
}

// --- codebooks ----------------------------------------------------------------------------------------------------

RawCodebook raw_codebook(const Tensor& levels, const Tensor& scale, const std::optional<Tensor>& thresholds) {
  const int64_t groups = levels.size(0), num_levels = levels.size(1);
  require(num_levels >= 2 && num_levels <= kMaxLevels, "2 to 16 levels are needed");
  require(scale.numel() == groups, "a scale for each codebook is needed");
  require(!thresholds || thresholds->numel() == groups * (num_levels - 1), "thresholds between levels are needed");
  return {floats(levels), floats(scale), floats(thresholds), groups, static_cast<int>(num_levels)};
}

void codebook_from_raw_op(Tensor raw_levels, Tensor scale, std::optional<Tensor> raw_thresholds, Tensor levels,
                          Tensor thresholds, Tensor tau) {
  const RawCodebook raw = raw_codebook(raw_levels, scale, raw_thresholds);
  require(levels.numel() == raw_levels.numel() && tau.numel() == raw_levels.numel() &&
              thresholds.numel() == raw.groups * (raw.num_levels - 1),
          "tensors of one size are needed");
  codebook_from_raw(raw, floats(levels), floats(thresholds), floats(tau));
}

void codebook_from_raw_backward_op(Tensor grad_levels, Tensor grad_thresholds, Tensor raw_levels, Tensor scale,
                                   std::optional<Tensor> raw_thresholds, Tensor grad_raw_levels,
                                   Tensor grad_raw_thresholds) {
  const RawCodebook raw = raw_codebook(raw_levels, scale, raw_thresholds);
  const int64_t cuts = raw.groups * (raw.num_levels - 1);
  require(grad_levels.numel() == raw_levels.numel() && grad_raw_levels.numel() == raw_levels.numel() &&
              grad_thresholds.numel() == cuts && grad_raw_thresholds.numel() == (raw_thresholds ? cuts : 0),
          "tensors of one size are needed");
  codebook_from_raw_backward(raw, floats(grad_levels), floats(grad_thresholds), floats(grad_raw_levels),
                             floats(grad_raw_thresholds));
}

// --- assign_codes and spike_slab_kl -------------------------------------------------------------------------------

// The backends in bqnn/ops hand in contiguous tensors, float32 but for codes, of the shapes that the ops check.

int64_t columns_of(const Tensor& weight) { return weight.size(0) ? weight.numel() / weight.size(0) : 0; }

void assign_codes_op(Tensor weight, Tensor thresholds, bool packed, Tensor out) {
  const AssignCodes weights{
      weight.const_data_ptr<float>(), thresholds.const_data_ptr<float>(),      weight.size(0), columns_of(weight),
      thresholds.size(0) != 1,        static_cast<int>(thresholds.size(1)) + 1};
  (packed ? assign_codes_packed : assign_codes)(torch_threads(), isa(), weights, out.mutable_data_ptr<uint8_t>());
}

SpikeSlabKl make_prior(const Tensor& weight, const Tensor& log_sigma2, const Tensor& levels, const Tensor& tau) {
  return {weight.const_data_ptr<float>(),
          log_sigma2.const_data_ptr<float>(),
          levels.const_data_ptr<float>(),
          tau.const_data_ptr<float>(),
          weight.size(0),
          columns_of(weight),
          levels.size(0) != 1,
          static_cast<int>(levels.size(1))};
}

void spike_slab_kl_op(Tensor weight, Tensor log_sigma2, Tensor levels, Tensor tau, Tensor out) {
  *out.mutable_data_ptr<float>() = spike_slab_kl(torch_threads(), isa(), make_prior(weight, log_sigma2, levels, tau));
}

void spike_slab_kl_backward_op(Tensor grad, Tensor weight, Tensor log_sigma2, Tensor levels, Tensor tau,
                               Tensor grad_weight, Tensor grad_log_sigma2, Tensor grad_levels) {
  spike_slab_kl_backward(torch_threads(), isa(), make_prior(weight, log_sigma2, levels, tau),
                         *grad.const_data_ptr<float>(),
                         {grad_weight.mutable_data_ptr<float>(), grad_log_sigma2.mutable_data_ptr<float>(),
                          grad_levels.mutable_data_ptr<float>()});
}

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

STABLE_TORCH_LIBRARY(bqnn_cpu, m) {
  m.def(
      "packed_layout(Tensor codes, Tensor levels, Tensor int8_levels, Tensor int8_scale, int columns,"
      " int[] kernel_size, int dilation_w, int groups, str precision) -> Tensor");
  m.def("packed_linear(Tensor x, Tensor layout, Tensor? bias, bool relu=False) -> Tensor");
  m.def(
      "packed_conv2d(Tensor x, Tensor layout, Tensor? bias, int[] stride, int[] padding, int[] dilation,"
      " bool relu=False) -> Tensor");
  m.def("isa() -> int");
  m.def("random_words(int seed, int first, Tensor(a!) out) -> ()");
  m.def("add_noise(Tensor(a!) mean, Tensor(b!) variance, Tensor seed, int offset, bool keep_slope) -> ()");
  m.def("multiply(Tensor grad, Tensor slope, Tensor(a!) out) -> ()");
  m.def("noise_gradient(Tensor grad, Tensor variance, Tensor seed, int offset, Tensor(a!) out) -> ()");
  m.def("square(Tensor x, Tensor(a!) out) -> ()");
  m.def("add_square_gradient(Tensor(a!) grad, Tensor x, Tensor grad_square) -> ()");
  m.def(
      "sample(Tensor weight, Tensor? log_sigma2, Tensor levels, Tensor thresholds, Tensor? seed, int offset,"
      " Tensor(a!) quantized) -> ()");
  m.def(
      "sample_backward(Tensor grad, Tensor weight, Tensor? log_sigma2, Tensor levels, Tensor thresholds, Tensor? seed,"
      " int offset, Tensor(a!)? grad_log_sigma2, Tensor(b!) grad_levels) -> ()");
  m.def(
      "moments(Tensor weight, Tensor log_sigma2, Tensor levels, Tensor thresholds, int mode, Tensor(a!)? mean,"
      " Tensor(b!) variance) -> ()");
  m.def(
      "moments_backward(Tensor(a!) grad_mean, Tensor grad_variance, Tensor weight, Tensor log_sigma2, Tensor levels,"
      " Tensor thresholds, int mode, Tensor(b!) grad_log_sigma2, Tensor(c!) grad_levels,"
      " Tensor(d!) grad_thresholds) -> ()");
  m.def(
      "codebook_from_raw(Tensor raw_levels, Tensor scale, Tensor? raw_thresholds, Tensor(a!) levels,"
      " Tensor(b!) thresholds, Tensor(c!) tau) -> ()");
  m.def(
      "codebook_from_raw_backward(Tensor grad_levels, Tensor grad_thresholds, Tensor raw_levels, Tensor scale,"
      " Tensor? raw_thresholds, Tensor(a!) grad_raw_levels, Tensor(b!) grad_raw_thresholds) -> ()");
  m.def("assign_codes(Tensor weight, Tensor thresholds, bool packed, Tensor(a!) out) -> ()");
  m.def("spike_slab_kl(Tensor weight, Tensor log_sigma2, Tensor levels, Tensor tau, Tensor(a!) out) -> ()");
  m.def(
      "spike_slab_kl_backward(Tensor grad, Tensor weight, Tensor log_sigma2, Tensor levels, Tensor tau,"
      " Tensor(a!) grad_weight, Tensor(b!) grad_log_sigma2, Tensor(c!) grad_levels) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bqnn_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&cpu_isa)); }

STABLE_TORCH_LIBRARY_IMPL(bqnn_cpu, CPU, m) {
  m.impl("random_words", TORCH_BOX(&random_words_op));
  m.impl("add_noise", TORCH_BOX(&add_noise_op));
  m.impl("noise_gradient", TORCH_BOX(&noise_gradient_op));
  m.impl("multiply", TORCH_BOX(&multiply_op));
  m.impl("square", TORCH_BOX(&square_op));
  m.impl("add_square_gradient", TORCH_BOX(&add_square_gradient_op));
  m.impl("sample", TORCH_BOX(&sample_op));
  m.impl("sample_backward", TORCH_BOX(&sample_backward_op));
  m.impl("moments", TORCH_BOX(&moments_op));
  m.impl("moments_backward", TORCH_BOX(&moments_backward_op));
  m.impl("codebook_from_raw", TORCH_BOX(&codebook_from_raw_op));
  m.impl("codebook_from_raw_backward", TORCH_BOX(&codebook_from_raw_backward_op));
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
