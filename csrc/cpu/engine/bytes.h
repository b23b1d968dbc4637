// The numbers that make bytes of integers.
#pragma once

#include <vector>

#include "cpu/engine/kernels.h"

namespace bqnn::engine {

// What a step has for each channel of its output.
struct Channels {
  std::vector<float> scale, bias;
  std::vector<int32_t> shift;  // what the zero of x adds to a sum
  std::vector<double> most;    // the largest magnitude of a sum of stored numbers times weights
};

// Whether a step reads and writes bytes, and all that happens to the result is clamping. Then the channels' scale and
// bias, if they are finite numbers, become those of Bytes, which holds for them from then on.
Bytes fold_bytes(const Graph& graph, const Step& step, Channels* channels);

}  // namespace bqnn::engine
