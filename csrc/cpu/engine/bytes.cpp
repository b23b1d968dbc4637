#include "cpu/engine/bytes.h"

#include <algorithm>
#include <cmath>

namespace bqnn::engine {
namespace {

constexpr double kMostBeforeClamping = 0x1p30;  // the conversion to 32-bit integers has to hold what is not clamped

bool reads_bytes(const Graph& graph, const Step& step) {
  switch (step.op) {
    case Op::add:
    case Op::sub:
    case Op::mul: return graph.values[step.inputs[1]].dtype == Dtype::uint8;
    case Op::conv2d:
    case Op::linear:
    case Op::affine:
    case Op::activation: return true;
    default: return false;
  }
}

float nearest_byte(float number, const Value& y) {
  return static_cast<float>(std::clamp(std::nearbyint(static_cast<double>(number) / y.scale) + y.zero, 0.0, 255.0));
}

}  // namespace

// In double precision and in this order, as bqnn.engine.reference has it: the results are the same to the last bit.
Bytes fold_bytes(const Graph& graph, const Step& step, Channels* channels) {
  const Value &x = graph.values[step.inputs[0]], &y = graph.values[step.output];
  const Activation& act = step.activation;
  Bytes bytes;
  if (x.dtype != Dtype::uint8 || y.dtype != Dtype::uint8 || !reads_bytes(graph, step)) return bytes;
  if (act.function != Function::none && act.function != Function::clamp) return bytes;
  const double unit = y.scale;
  double ratio = 0.0, zero_of_other = 0.0, most_of_other = 0.0;
  const bool multiplies = step.op == Op::mul;
  if (step.inputs.size() > 1 && !multiplies) {
    const Value& other = graph.values[step.inputs[1]];
    const bool stored = other.dtype == Dtype::uint8;
    ratio = (stored ? static_cast<double>(other.scale) : 1.0) / unit;
    if (step.op == Op::sub) ratio = -ratio;
    zero_of_other = stored ? other.zero : 0.0;
    most_of_other = stored ? 255.0 * std::abs(ratio) : INFINITY;
  }
  const bool product = step.op == Op::conv2d || step.op == Op::linear;
  // Of a product of two numbers, which are taken less their zeros.
  const double unit_of_x = multiplies ? static_cast<double>(x.scale) * graph.values[step.inputs[1]].scale : x.scale;
  const double most_of_x = multiplies ? 255.0 * 255.0 : 255.0;
  const size_t count = channels->scale.size();
  std::vector<float> scale(count), bias(count);
  bool finite = std::isfinite(static_cast<float>(ratio));
  double most = 0.0;
  for (size_t c = 0; c < count; ++c) {
    const double of_channel = product ? channels->scale[c] : static_cast<double>(channels->scale[c]) * unit_of_x;
    const double s = of_channel / unit, shift = product ? channels->shift[c] : multiplies ? 0.0 : x.zero;
    const double b = ((channels->bias[c] / unit + y.zero) - s * shift) - ratio * zero_of_other;
    scale[c] = static_cast<float>(s), bias[c] = static_cast<float>(b);
    finite = finite && std::isfinite(scale[c]) && std::isfinite(bias[c]);
    most = std::max(most, std::abs(s) * (product ? channels->most[c] : most_of_x) + std::abs(b) + most_of_other);
  }
  if (!finite) return bytes;
  channels->scale = std::move(scale), channels->bias = std::move(bias);
  bytes.folded = true;
  bytes.ratio = static_cast<float>(ratio);
  if (act.function == Function::clamp) bytes.low = nearest_byte(act.low, y), bytes.high = nearest_byte(act.high, y);
  bytes.saturates = bytes.low == 0.0f && bytes.high == 255.0f && most < kMostBeforeClamping;
  return bytes;
}

}  // namespace bqnn::engine
