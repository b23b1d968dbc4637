// The only file that includes torch: turns tensors into raw pointers and torch's threads into a Parallel.
// Stable ABI of torch 2.10 and Python's limited API, so that one build serves later versions of both.

#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#include "cpu/assign_codes.h"
#include "cpu/isa.h"
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

}  // namespace

STABLE_TORCH_LIBRARY(bqnn_cpu, m) {
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
  m.impl("assign_codes", TORCH_BOX(&assign_codes_op));
  m.impl("spike_slab_kl", TORCH_BOX(&spike_slab_kl_op));
  m.impl("spike_slab_kl_backward", TORCH_BOX(&spike_slab_kl_backward_op));
}

}  // namespace bqnn

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
