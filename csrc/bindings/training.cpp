// torch.ops.bqnn_cpu: the ops of training, and the instruction set. Stable ABI of torch 2.10 and Python's limited API,
// so that one build serves later versions of both.
#include <Python.h>

#include <optional>

#include "bindings/cpu.h"
#include "bindings/training_tensors.h"
#include "cpu/train/assign_codes.h"
#include "cpu/train/codebook.h"
#include "cpu/train/elementwise.h"
#include "cpu/train/mixture_kl.h"
#include "cpu/train/noise.h"
#include "cpu/train/spike_slab_kl.h"
#include "cpu/train/weights.h"

namespace bqnn {
namespace {

int64_t cpu_isa() { return static_cast<int64_t>(isa()); }

// --- noise --------------------------------------------------------------------------------------------------------

void random_words_op(int64_t seed, int64_t first, Tensor out) {
  require(out.numel() % 4 == 0, "out", "whole calls of four words", out.numel());
  elementwise(isa()).random_words(static_cast<uint64_t>(seed), static_cast<uint64_t>(first), out.numel() / 4,
                                  counted<uint32_t>(out, "out", ScalarType::Int, out.numel()));
}

void add_noise_op(Tensor mean, Tensor variance, Tensor seed, int64_t offset, bool keep_slope) {
  require_apart({{"mean", mean}, {"variance", variance}}, {seed});
  add_noise(torch_threads(), isa(), plane_shape(mean), plane(mean, "mean", mean), plane(variance, "variance", mean),
            noise(seed, offset), keep_slope);
}

void multiply_op(Tensor grad, Tensor slope, Tensor out) {
  require_apart({{"out", out}}, {grad, slope});
  multiply(torch_threads(), isa(), plane_shape(grad), plane(grad, "grad", grad), plane(slope, "slope", grad),
           plane(out, "out", grad));
}

void noise_gradient_op(Tensor grad, Tensor variance, Tensor seed, int64_t offset, Tensor out) {
  require_apart({{"out", out}}, {grad, variance, seed});
  noise_gradient(torch_threads(), isa(), plane_shape(grad), plane(grad, "grad", grad),
                 plane(variance, "variance", grad), noise(seed, offset), plane(out, "out", grad));
}

void square_op(Tensor x, Tensor out) {
  require_apart({{"out", out}}, {x});
  square(torch_threads(), isa(), plane_shape(x), plane(x, "x", x), plane(out, "out", x));
}

void add_square_gradient_op(Tensor grad, Tensor x, Tensor grad_square) {
  require_apart({{"grad", grad}}, {x, grad_square});
  add_square_gradient(torch_threads(), isa(), plane_shape(grad), plane(grad, "grad", grad), plane(x, "x", grad),
                      plane(grad_square, "grad_square", grad));
}

// --- weights ------------------------------------------------------------------------------------------------------

// Without a seed there is no noise, and without deviations it does not count.
Noise sample_noise(const std::optional<Tensor>& log_sigma2, const std::optional<Tensor>& seed, int64_t offset) {
  if (seed) return noise(*seed, offset);
  if (log_sigma2) refuse("seed", "given where log_sigma2 is", "none");
  return {};
}

void sample_op(Tensor weight, std::optional<Tensor> log_sigma2, Tensor levels, Tensor thresholds,
               std::optional<Tensor> seed, int64_t offset, Tensor quantized) {
  require_apart({{"quantized", quantized}}, {weight, log_sigma2, levels, thresholds, seed});
  const Posterior q = posterior(weight, log_sigma2, levels, thresholds);
  sample(torch_threads(), isa(), q, sample_noise(log_sigma2, seed, offset), floats(quantized, "quantized", q.weights));
}

void sample_backward_op(Tensor grad, Tensor weight, std::optional<Tensor> log_sigma2, Tensor levels, Tensor thresholds,
                        std::optional<Tensor> seed, int64_t offset, std::optional<Tensor> grad_log_sigma2,
                        Tensor grad_levels) {
  require_apart({{"grad_log_sigma2", grad_log_sigma2}, {"grad_levels", grad_levels}},
                {grad, weight, log_sigma2, levels, thresholds, seed});
  const Posterior q = posterior(weight, log_sigma2, levels, thresholds);
  if (log_sigma2 && !grad_log_sigma2) refuse("grad_log_sigma2", "given where log_sigma2 is", "none");
  float* by_log_sigma2 = log_sigma2 ? floats(*grad_log_sigma2, "grad_log_sigma2", q.weights) : nullptr;
  sample_backward(torch_threads(), isa(), q, sample_noise(log_sigma2, seed, offset), floats(grad, "grad", q.weights),
                  by_log_sigma2, floats(grad_levels, "grad_levels", levels.numel()));
}

void moments_op(Tensor weight, Tensor log_sigma2, Tensor levels, Tensor thresholds, int64_t mode,
                std::optional<Tensor> mean, Tensor variance) {
  require_apart({{"mean", mean}, {"variance", variance}}, {weight, log_sigma2, levels, thresholds});
  const Posterior q = posterior(weight, log_sigma2, levels, thresholds);
  const Moments kind = moments_mode(mode);
  if (!mean && kind != Moments::gaussian) refuse("mean", "given where it is not the weight", "none");
  moments(torch_threads(), isa(), q, kind, floats(mean, "mean", q.weights), elements(variance, "variance", q.weights));
}

// Turns grad_mean into the weight's gradient.
void moments_backward_op(Tensor grad_mean, Tensor grad_variance, Tensor weight, Tensor log_sigma2, Tensor levels,
                         Tensor thresholds, int64_t mode, Tensor grad_log_sigma2, Tensor grad_levels,
                         Tensor grad_thresholds) {
  require_apart({{"grad_mean", grad_mean},
                 {"grad_log_sigma2", grad_log_sigma2},
                 {"grad_levels", grad_levels},
                 {"grad_thresholds", grad_thresholds}},
                {grad_variance, weight, log_sigma2, levels, thresholds});
  const Posterior q = posterior(weight, log_sigma2, levels, thresholds);
  float* by_mean = floats(grad_mean, "grad_mean", q.weights);
  moments_backward(torch_threads(), isa(), q, moments_mode(mode), by_mean,
                   elements(grad_variance, "grad_variance", q.weights), by_mean,
                   floats(grad_log_sigma2, "grad_log_sigma2", q.weights),
                   floats(grad_levels, "grad_levels", levels.numel()),
                   floats(grad_thresholds, "grad_thresholds", thresholds.numel()));
}

// --- codebooks ----------------------------------------------------------------------------------------------------

RawCodebook raw_codebook(const Tensor& levels, const Tensor& scale, const std::optional<Tensor>& thresholds) {
  const CodebookShape shape(levels, "raw_levels", 0, std::nullopt);
  return {floats(levels, "raw_levels", shape.count()), floats(scale, "scale", shape.groups),
          floats(thresholds, "raw_thresholds", shape.cuts()), shape.groups, static_cast<int>(shape.levels)};
}

void codebook_from_raw_op(Tensor raw_levels, Tensor scale, std::optional<Tensor> raw_thresholds, Tensor levels,
                          Tensor thresholds, Tensor tau) {
  require_apart({{"levels", levels}, {"thresholds", thresholds}, {"tau", tau}}, {raw_levels, scale, raw_thresholds});
  const RawCodebook raw = raw_codebook(raw_levels, scale, raw_thresholds);
  const int64_t count = raw_levels.numel();
  codebook_from_raw(raw, floats(levels, "levels", count), floats(thresholds, "thresholds", count - raw.groups),
                    floats(tau, "tau", count));
}

void codebook_from_raw_backward_op(Tensor grad_levels, Tensor grad_thresholds, Tensor raw_levels, Tensor scale,
                                   std::optional<Tensor> raw_thresholds, Tensor grad_raw_levels,
                                   Tensor grad_raw_thresholds) {
  require_apart({{"grad_raw_levels", grad_raw_levels}, {"grad_raw_thresholds", grad_raw_thresholds}},
                {grad_levels, grad_thresholds, raw_levels, scale, raw_thresholds});
  const RawCodebook raw = raw_codebook(raw_levels, scale, raw_thresholds);
  const int64_t count = raw_levels.numel(), cuts = count - raw.groups;
  codebook_from_raw_backward(raw, floats(grad_levels, "grad_levels", count),
                             floats(grad_thresholds, "grad_thresholds", cuts),
                             floats(grad_raw_levels, "grad_raw_levels", count),
                             floats(grad_raw_thresholds, "grad_raw_thresholds", raw_thresholds ? cuts : 0));
}

// --- assign_codes, and the divergences from priors -----------------------------------------------------------------

void assign_codes_op(Tensor weight, Tensor thresholds, bool packed, Tensor out) {
  require_apart({{"out", out}}, {weight, thresholds});
  const WeightShape shape(weight);
  const CodebookShape codebook(thresholds, "thresholds", 1, shape.channels);
  int64_t digits = 1;
  for (int64_t values = codebook.levels; packed && values * codebook.levels <= 256; values *= codebook.levels) ++digits;
  const AssignCodes weights{floats(weight, "weight", shape.weights()),
                            floats(thresholds, "thresholds", codebook.cuts()),
                            shape.channels,
                            shape.columns,
                            codebook.groups != 1,
                            static_cast<int>(codebook.levels)};
  const int64_t width = (shape.columns + digits - 1) / digits;
  auto* codes = counted<uint8_t>(out, "out", ScalarType::Byte, shape.channels * width);
  (packed ? assign_codes_packed : assign_codes)(torch_threads(), isa(), weights, codes);
}

PriorWeights prior_weights(const Tensor& weight, const Tensor& log_sigma2, const Tensor& levels) {
  const WeightShape shape(weight);
  const CodebookShape codebook(levels, "levels", 0, shape.channels);
  return {floats(weight, "weight", shape.weights()),
          floats(log_sigma2, "log_sigma2", shape.weights()),
          floats(levels, "levels", codebook.count()),
          shape.channels,
          shape.columns,
          codebook.groups != 1,
          static_cast<int>(codebook.levels)};
}

PriorGradients prior_gradients(const Tensor& grad_weight, const Tensor& grad_log_sigma2, const Tensor& grad_levels,
                               const Tensor& weight, const Tensor& levels) {
  return {floats(grad_weight, "grad_weight", weight.numel()),
          floats(grad_log_sigma2, "grad_log_sigma2", weight.numel()),
          floats(grad_levels, "grad_levels", levels.numel())};
}

SpikeSlabKl spike_slab_prior(const Tensor& weight, const Tensor& log_sigma2, const Tensor& levels, const Tensor& tau) {
  const PriorWeights weights = prior_weights(weight, log_sigma2, levels);
  return {weights, shaped<float>(tau, "tau", ScalarType::Float, {levels.size(0), levels.size(1)})};
}

void spike_slab_kl_op(Tensor weight, Tensor log_sigma2, Tensor levels, Tensor tau, Tensor out) {
  require_apart({{"out", out}}, {weight, log_sigma2, levels, tau});
  const SpikeSlabKl prior = spike_slab_prior(weight, log_sigma2, levels, tau);
  *floats(out, "out", 1) = spike_slab_kl(torch_threads(), isa(), prior);
}

void spike_slab_kl_backward_op(Tensor grad, Tensor weight, Tensor log_sigma2, Tensor levels, Tensor tau,
                               Tensor grad_weight, Tensor grad_log_sigma2, Tensor grad_levels) {
  require_apart(
      {{"grad_weight", grad_weight}, {"grad_log_sigma2", grad_log_sigma2}, {"grad_levels", grad_levels}},
      {grad, weight, log_sigma2, levels, tau});
  const SpikeSlabKl prior = spike_slab_prior(weight, log_sigma2, levels, tau);
  const PriorGradients gradients = prior_gradients(grad_weight, grad_log_sigma2, grad_levels, weight, levels);
  spike_slab_kl_backward(torch_threads(), isa(), prior, *floats(grad, "grad", 1), gradients);
}

// The ranges are those of bqnn.ops.mixture_kl.
void require_between(double value, const char* name, double least, double most) {
  if (!(least <= value && value <= most))
    refuse(name, "from " + std::to_string(least) + " to " + std::to_string(most), std::to_string(value));
}

MixtureKl mixture_prior(const Tensor& weight, const Tensor& log_sigma2, const Tensor& levels, const Tensor& slab_sigma2,
                        double spike_width, double slab_share) {
  const PriorWeights weights = prior_weights(weight, log_sigma2, levels);
  require_between(spike_width, "spike_width", 1e-3, 1e3);
  require_between(slab_share, "slab_share", 1e-6, 1.0 - 1e-6);
  return {weights, *floats(slab_sigma2, "slab_sigma2", 1), spike_width, slab_share};
}

void mixture_kl_op(Tensor weight, Tensor log_sigma2, Tensor levels, Tensor slab_sigma2, double spike_width,
                   double slab_share, Tensor out) {
  require_apart({{"out", out}}, {weight, log_sigma2, levels, slab_sigma2});
  const MixtureKl prior = mixture_prior(weight, log_sigma2, levels, slab_sigma2, spike_width, slab_share);
  *floats(out, "out", 1) = mixture_kl(torch_threads(), isa(), prior);
}

void mixture_kl_backward_op(Tensor grad, Tensor weight, Tensor log_sigma2, Tensor levels, Tensor slab_sigma2,
                            double spike_width, double slab_share, Tensor grad_weight, Tensor grad_log_sigma2,
                            Tensor grad_levels) {
  require_apart(
      {{"grad_weight", grad_weight}, {"grad_log_sigma2", grad_log_sigma2}, {"grad_levels", grad_levels}},
      {grad, weight, log_sigma2, levels, slab_sigma2});
  const MixtureKl prior = mixture_prior(weight, log_sigma2, levels, slab_sigma2, spike_width, slab_share);
  const PriorGradients gradients = prior_gradients(grad_weight, grad_log_sigma2, grad_levels, weight, levels);
  mixture_kl_backward(torch_threads(), isa(), prior, *floats(grad, "grad", 1), gradients);
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
  m.def(
      "mixture_kl(Tensor weight, Tensor log_sigma2, Tensor levels, Tensor slab_sigma2, float spike_width,"
      " float slab_share, Tensor(a!) out) -> ()");
  m.def(
      "mixture_kl_backward(Tensor grad, Tensor weight, Tensor log_sigma2, Tensor levels, Tensor slab_sigma2,"
      " float spike_width, float slab_share, Tensor(a!) grad_weight, Tensor(b!) grad_log_sigma2,"
      " Tensor(c!) grad_levels) -> ()");
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
  m.impl("mixture_kl", TORCH_BOX(&mixture_kl_op));
  m.impl("mixture_kl_backward", TORCH_BOX(&mixture_kl_backward_op));
}

}  // namespace bqnn

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
