// A network that is ready to run: a plan, and the weights as its kernels read them.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cpu/base/parallel.h"
#include "cpu/engine/kernels.h"
#include "cpu/engine/plan.h"

namespace bqnn::engine {

class Program {
 public:
  // Throws std::invalid_argument where the graph is unsound. Nothing of the caller's memory is used afterwards.
  Program(Graph graph, Isa isa);

  const Graph& graph() const { return graph_; }
  const Plan& plan() const { return plan_; }
  const Kernels& kernels() const { return *kernels_; }

  // Runs the network on images; inputs and outputs are in the order of the graph's. Any number of threads may run it at
  // the same time. Where `seconds` is not null, each instruction's time is added to its entry, over all threads.
  void run(const Outside* inputs, const Outside* outputs, int64_t images, const Parallel& parallel,
           double* seconds = nullptr) const;

  // What an instruction is, in a word or two, and how many products it takes for an image.
  std::string describe(const Instruction& instruction) const;
  int64_t products(const Instruction& instruction) const;

 private:
  struct Frame;

  Graph graph_;
  Plan plan_;
  const Kernels* kernels_;
  std::vector<Conv> convs_;  // by step
  std::vector<std::vector<float>> floats_;
  std::vector<std::vector<int32_t>> integers_;
  std::vector<std::unique_ptr<char[], void (*)(void*)>> memory_;

  char* keep(int64_t bytes);
  const float* keep_floats(const float* values, int64_t count, float otherwise);
  void prepare(const Step& step, Conv* conv);
  void make_weight(const Step& step, Conv* conv);
  void keep_panels(Conv* conv);
  View view(const Frame& frame, int value) const;
  void run_instruction(const Frame& frame, const Instruction& instruction, const Parallel& parallel) const;
  void run_stage(const Frame& frame, const Stage& stage, const Parallel& parallel, double* seconds) const;
};

}  // namespace bqnn::engine
