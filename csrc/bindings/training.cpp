// torch.ops.bqnn_cpu: the ops of training, and the instruction set. Stable ABI of torch 2.10 and Python's limited API, so
// that one build serves later versions of both.
#include <Python.h>

#include <optional>
#include <stdexcept>

#include "bindings/tensors.h"
#include "cpu/train/assign_codes.h"
#include "cpu/train/codebook.h"
#include "cpu/train/elementwise.h"
#include "cpu/train/noise.h"
#include "cpu/train/spike_slab_kl.h"
#include "cpu/train/weights.h"

namespace bqnn {
namespace {

int64_t cpu_isa() { return static_cast<int64_t>(isa()); }

Noise noise(const std::optional<Tensor>& seed, int64_t offset) {
  if (!seed) return {};
  return {static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr())), static_cast<uint64_t>(offset)};
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

}  // namespace

STABLE_TORCH_LIBRARY(bqnn_cpu, m) {
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
  m.impl("assign_codes", TORCH_BOX(&assign_codes_op));
  m.impl("spike_slab_kl", TORCH_BOX(&spike_slab_kl_op));
  m.impl("spike_slab_kl_backward", TORCH_BOX(&spike_slab_kl_backward_op));
}

}  // namespace bqnn

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
