// What the two bindings of bqnn._C share.
#pragma once

#include "bindings/tensors.h"
#include "cpu/base/isa.h"
#include "cpu/base/parallel.h"

namespace bqnn {

inline Parallel torch_threads() {
  return {[](int64_t n, int64_t grain, Parallel::Body body, void* context) {
            torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
          },
          static_cast<int>(torch::stable::get_num_threads())};
}

inline Isa isa() {
  static const Isa chosen = [] {
    Isa isa;
    const char* error = nullptr;
    if (!chosen_isa(&isa, &error)) throw std::runtime_error(error);
    return isa;
  }();
  return chosen;
}

}  // namespace bqnn
