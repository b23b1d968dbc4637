// Which instructions need no meeting of threads before them.
#include "cpu/engine/plan.h"

namespace bqnn::engine {
namespace {

// The channels of a buffer that a value has.
struct Part {
  int buffer;
  int64_t begin, end;

  bool meets(const Part& other) const { return buffer == other.buffer && begin < other.end && other.begin < end; }
};

struct Input {
  Part part;
  bool by_row;  // whether a row of the result needs that row of it alone
};

class Joins {
 public:
  Joins(const Graph& graph, Plan* plan) : graph_(graph), plan_(*plan) {}

  void run() {
    std::vector<Part> written, read_far;  // since threads met
    for (Instruction& each : plan_.instructions) {
      const std::vector<Input> inputs = inputs_of(each);
      const Part result = result_of(each);
      each.joins = true;
      for (const Input& input : inputs)
        for (const Part& part : written)
          if (!input.by_row && part.meets(input.part)) each.joins = false;
      // A result may lie where an input did that others have not read yet.
      for (const Part& part : read_far)
        if (part.meets(result)) each.joins = false;
      if (!each.joins) written.clear(), read_far.clear();
      written.push_back(result);
      for (const Input& input : inputs)
        if (!input.by_row) read_far.push_back(input.part);
    }
    if (!plan_.instructions.empty()) plan_.instructions.front().joins = false;
  }

 private:
  const Graph& graph_;
  Plan& plan_;

  Part part_of(int value) const {
    const Place& place = plan_.places[value];
    return {place.buffer, place.channel, place.channel + graph_.values[value].shape.channels};
  }

  Part result_of(const Instruction& of) const {
    if (of.kind == Kind::border) return {of.value, 0, 0};  // nobody reads it before its buffer has numbers
    return part_of(of.value);
  }

  std::vector<Input> inputs_of(const Instruction& of) const {
    if (of.kind == Kind::border || of.kind == Kind::read) return {};
    if (of.kind == Kind::write) return {{part_of(of.value), true}};
    const Step& step = graph_.steps[of.step];
    if (of.source >= 0) return {{part_of(of.source), step.op == Op::cat || reads_by_row(of, step, of.source)}};
    std::vector<Input> inputs;
    for (const int32_t x : step.inputs) inputs.push_back({part_of(x), reads_by_row(of, step, x)});
    return inputs;
  }

  bool reads_by_row(const Instruction& of, const Step& step, int32_t x) const {
    if (graph_.values[x].shape.height != graph_.values[step.output].shape.height) return false;
    switch (of.kind) {
      case Kind::point:
      case Kind::softmax: return true;
      case Kind::conv2d:
      case Kind::depthwise:
        if (x != step.inputs[0]) return true;  // a residual
        if (step.op == Op::linear) return true;
        return step.window.kernel_h == 1 && step.window.stride_h == 1 && step.window.top == 0;
      case Kind::move: return step.op != Op::reshape && step.low.height == 0 && step.step.height == 1;
      default: return false;
    }
  }
};

}  // namespace

void find_joins(const Graph& graph, Plan* plan) { Joins(graph, plan).run(); }

}  // namespace bqnn::engine
