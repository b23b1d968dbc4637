// The only file that includes torch: turns tensors into raw pointers and torch's threads into a Parallel.
// Stable ABI of torch 2.10 and Python's limited API, so that one build serves later versions of both.

#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "cpu/parallel.h"

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

}  // namespace

STABLE_TORCH_LIBRARY(bqnn_cpu, m) {
  m.def("isa() -> int");
  // ops
}

STABLE_TORCH_LIBRARY_IMPL(bqnn_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(bqnn_cpu, CPU, m) {
}

}  // namespace bqnn

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
