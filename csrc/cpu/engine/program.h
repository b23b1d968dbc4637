// A network that is ready to run: a plan, and the weights as its kernels read them.
#pragma once

#include <string>
#include <vector>

#include "cpu/base/parallel.h"
#include "cpu/engine/kernels.h"
#include "cpu/engine/plan.h"
#include "cpu/engine/weights.h"

namespace bqnn::engine {

// How a program is planned: the measure of what machines have.
struct Limits {
  int64_t cache = 1 << 20;        // bytes of images that a thread takes through all steps together
  int64_t kept_panels = 1 << 20;  // bytes of panels that are kept; more are made in every call
  int64_t wide_layer = 1 << 17;   // weights from which on a layer of one position is a stage of its own
  int64_t team = 2;               // how many times over a call has to be worth another thread, before others are woken
};

class Program {
 public:
  // Throws std::invalid_argument where the graph is unsound, or an image too large. Nothing of the caller's memory is
  // used afterwards.
  Program(Graph graph, Isa isa, const Limits& limits = {});
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  const Graph& graph() const { return graph_; }
  const Plan& plan() const { return plan_; }
  const Kernels& kernels() const { return *kernels_; }

  // Images that a run may have at most: more would take more bytes than addresses are for.
  int64_t most_images() const;

  // Runs the network on images; inputs and outputs are in the order of the graph's. Any number of threads may run it at
  // the same time. Where `seconds` is not null, each instruction's time is added to its entry, over all threads.
  void run(const Outside* inputs, const Outside* outputs, int64_t images, const Parallel& parallel,
           double* seconds = nullptr) const;

  // What an instruction is for so many images, in a word or two, and how many products it takes for each.
  std::string describe(const Instruction& instruction, int64_t images) const;
  int64_t products(const Instruction& instruction) const;

 private:
  struct Frame;
  struct Division;

  Graph graph_;
  Limits limits_;
  const Kernels* kernels_;
  Weights weights_;
  Plan plan_;
  std::vector<Conv> convs_;  // by step
  int64_t least_block_ = 1;  // images that a thread takes through all steps together
  int64_t slack_ = kSlack;   // bytes beyond the arenas that kernels may read
  double load_ = 0.0;        // of an image: how many times over it is worth a thread

  View view(const Frame& frame, int value) const;
  double load(const Instruction& instruction) const;
  Division divide(const Instruction& instruction, int64_t images, int64_t threads) const;
  void run_part(const Frame& frame, const Instruction& instruction, const Division& of, int64_t member) const;
  void run_all(const Frame& frame, int begin, int end, double* seconds) const;
  void run_together(const Frame& frame, int begin, int end, const Parallel& parallel, double* seconds) const;
};

}  // namespace bqnn::engine
