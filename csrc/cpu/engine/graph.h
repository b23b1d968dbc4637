// What a program is made from: values and steps, as the passes of the Python side leave them.
//
// Shapes are of one image. A value of rank 1 has its features as channels of one pixel. A uint8 value stands for
// (stored - zero) * scale.
#pragma once

#include <cstdint>
#include <vector>

namespace bqnn::engine {

enum class Dtype : int32_t { float32, uint8 };

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 1; }

struct Shape {
  int64_t channels, height, width;
  bool operator==(const Shape& other) const {
    return channels == other.channels && height == other.height && width == other.width;
  }
  int64_t count() const { return channels * height * width; }
};

struct Value {
  Shape shape;
  int rank;  // 1 or 3
  Dtype dtype;
  float scale;
  int zero;
};

enum class Op : int32_t {
  conv2d,
  linear,
  affine,
  activation,
  add,
  sub,
  mul,
  max_pool2d,
  avg_pool2d,
  adaptive_avg_pool2d,
  cat,
  pad,
  slice,
  reshape,
  softmax,
  log_softmax,
  count
};

enum class Function : int32_t {
  none,
  clamp,
  leaky_relu,
  hardswish,
  hardsigmoid,
  sigmoid,
  silu,
  gelu,
  gelu_tanh,
  tanh,
  count
};

struct Activation {
  Function function = Function::none;
  float low = 0.0f, high = 0.0f;
};

// The numbers of a convolution or a pooling. A linear layer is a convolution whose kernel is as large as its input.
struct Window {
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1;
  int64_t top = 0, bottom = 0, left = 0, right = 0;
  int64_t dilation_h = 1, dilation_w = 1;
  bool ceil = false, count_padding = false;
  int64_t divisor = 0;  // 0: the elements of the window
};

// A layer's weight: codes with the levels that they name, or numbers. Where x is uint8 the levels, or the numbers, are
// integers from -64 to 64. Pointers are into memory of the caller, and read when the program is made.
struct Weight {
  const uint8_t* codes = nullptr;  // [channels, bytes]
  const float* levels = nullptr;   // [codebooks, num_levels]
  const int8_t* integers = nullptr;
  int num_levels = 0, codebooks = 0;
  const float* numbers = nullptr;  // [channels, columns], or
  const int8_t* integer_numbers = nullptr;
  const float* scale = nullptr;  // [channels], or null: 1
  const float* bias = nullptr;   // [channels], or null: 0
};

struct Step {
  Op op;
  std::vector<int32_t> inputs;
  int32_t output;
  Activation activation;
  Window window;
  int64_t groups = 1;
  Weight weight;  // an affine step has its scale and its shift, as bias, here
  Shape low{0, 0, 0}, high{0, 0, 0};  // of a pad: elements before and after; of a slice: start and stop
  Shape step{1, 1, 1};                // of a slice
  float number = 0.0f;                // what a pad writes
};

struct Graph {
  std::vector<Value> values;
  std::vector<Step> steps;
  std::vector<int32_t> inputs, outputs;
};

// Throws std::invalid_argument, with the step and what is wrong, where a graph is unsound: afterwards every index,
// shape and number may be relied on. (That tensors are as large as the shapes say is for the caller to check.)
void check(const Graph& graph);

}  // namespace bqnn::engine
