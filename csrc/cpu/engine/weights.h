// The weights of a program's steps, in the order in which kernels read them.
#pragma once

#include <memory>
#include <vector>

#include "cpu/engine/bytes.h"
#include "cpu/engine/kernels.h"
#include "cpu/engine/plan.h"

namespace bqnn::engine {

// Weights of a convolution or linear layer; 0 of any other step.
int64_t count_weights(const Graph& graph, const Step& step);

// Owns what the Conv of a step points to.
class Weights {
 public:
  Weights(const Graph& graph, const Kernels& kernels) : graph_(graph), kernels_(kernels) {}

  // What the kernels of a step want: all of a convolution, or what makes bytes, scale and shift of another step. x is
  // the buffer of its first input; dense says whether the pixels of y, and of what is added, follow each other. Panels
  // are made once and kept, or, of a weight that is codes, in every call.
  Conv prepare(const Step& step, const Buffer& x, bool dense, bool keep_panels);

 private:
  const Graph& graph_;
  const Kernels& kernels_;
  std::vector<std::unique_ptr<char, void (*)(void*)>> memory_;

  char* keep(int64_t bytes);
  template <class Number>
  const Number* keep_numbers(const std::vector<Number>& numbers);
  void prepare_product(const Step& step, const Buffer& x, bool dense, bool keep_panels, Conv* conv, Channels* channels);
  void keep_weight(const Step& step, Conv* conv, Channels* channels);
  void keep_panels(Conv* conv);
};

}  // namespace bqnn::engine
