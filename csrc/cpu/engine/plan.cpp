#include "cpu/engine/plan.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace bqnn::engine {

bool is_depthwise(const Graph& graph, const Step& step) {
  const int64_t channels = graph.values[step.inputs[0]].shape.channels;
  return step.op == Op::conv2d && step.groups > 1 && step.groups == channels &&
         graph.values[step.output].shape.channels == channels;
}

namespace {

// What an image may take at most: far more than there is memory for, and so little that no address overflows.
constexpr int64_t kMostElements = int64_t{1} << 40, kMostBytes = int64_t{1} << 44;

// Whether each element of a step's output depends on that place of an input of its shape alone.
bool is_point(Op op) {
  return op == Op::affine || op == Op::activation || op == Op::add || op == Op::sub || op == Op::mul;
}

void require_room(bool fits) {
  if (!fits) throw std::invalid_argument("an image must take less than 2^40 elements a value and 2^44 bytes in all");
}

class Planner {
 public:
  Planner(const Graph& graph, const std::vector<char>& wide, bool aligned)
      : graph_(graph), wide_(wide), aligned_(aligned), last_use_(graph.values.size(), -1) {
    const int steps = static_cast<int>(graph.steps.size());
    for (int i = 0; i < steps; ++i)
      for (const int32_t x : graph.steps[i].inputs) last_use_[x] = i;
    for (const int32_t v : graph.outputs) last_use_[v] = steps;
  }

  Plan run() {
    plan_.places.resize(graph_.values.size());
    place_values();
    if (aligned_) align_pixels();
    add_borders();
    add_instructions();
    find_joins(graph_, &plan_);
    divide();
    find_lifetimes();
    allocate();
    return std::move(plan_);
  }

 private:
  const Graph& graph_;
  const std::vector<char>& wide_;
  bool aligned_;
  std::vector<int> last_use_;  // of each value: the last step that reads it; of outputs one beyond all
  Plan plan_;

  Buffer& buffer_of(int value) { return plan_.buffers[plan_.places[value].buffer]; }

  // Whether the elements of a reshape's output lie in memory as those of its input.
  bool keeps_order(const Step& step) const {
    const Shape &x = graph_.values[step.inputs[0]].shape, &y = graph_.values[step.output].shape;
    return step.op == Op::reshape && (x == y || (x.height * x.width == 1 && y.height * y.width == 1));
  }

  // Whether a step puts its inputs beside other channels, and does nothing else to them: from which channel on is the
  // first one.
  bool joins_channels(const Step& step, int64_t* channel) const {
    if (step.op == Op::cat) return *channel = 0, true;
    const Shape &x = graph_.values[step.inputs[0]].shape, &y = graph_.values[step.output].shape;
    *channel = step.low.channels;
    return step.op == Op::pad && step.low.height == 0 && step.low.width == 0 && x.height == y.height &&
           x.width == y.width && *channel >= 0 && *channel + x.channels <= y.channels;
  }

  // The last cat that a value goes into is where it lies; a reshape's output lies where its input does.
  void place_values() {
    std::vector<int> copies(graph_.values.size(), 0);  // values that share the place of another, or lend theirs
    for (const Step& step : graph_.steps)
      if (keeps_order(step)) copies[step.inputs[0]] = copies[step.output] = 1;
    for (auto step = graph_.steps.rbegin(); step != graph_.steps.rend(); ++step) {
      int64_t channel = 0;
      if (!joins_channels(*step, &channel)) continue;
      const int y = step->output;
      own(y);
      channel += plan_.places[y].channel;
      for (const int32_t x : step->inputs) {
        if (plan_.places[x].buffer < 0 && !copies[x]) plan_.places[x] = {plan_.places[y].buffer, channel};
        channel += graph_.values[x].shape.channels;
      }
    }
    for (const int32_t v : graph_.inputs) own(v);
    for (size_t i = 0; i < graph_.steps.size(); ++i) {
      const Step& step = graph_.steps[i];
      const int over = keeps_order(step) ? step.inputs[0] : overwritten(static_cast<int>(i));
      if (over >= 0)
        plan_.places[step.output] = plan_.places[over];
      else
        own(step.output);
    }
  }

  // The input of a step that its output may take the place of, element by element, since nobody reads it any more; -1
  // where there is none.
  int overwritten(int index) const {
    const Step& step = graph_.steps[index];
    const Value& y = graph_.values[step.output];
    if (!is_point(step.op) || plan_.places[step.output].buffer >= 0) return -1;
    for (const int32_t x : step.inputs) {
      const Value& value = graph_.values[x];
      const int buffer = plan_.places[x].buffer;
      bool free = value.shape == y.shape && value.dtype == y.dtype && value.zero == y.zero;
      for (size_t v = 0; v < graph_.values.size() && free; ++v)
        free = plan_.places[v].buffer != buffer || (last_use_[v] <= index && graph_.values[v].shape == y.shape);
      if (free) return x;
    }
    return -1;
  }

  void own(int value) {
    Place& place = plan_.places[value];
    if (place.buffer >= 0) return;
    place.buffer = static_cast<int>(plan_.buffers.size());
    Buffer buffer;
    buffer.shape = graph_.values[value].shape;
    buffer.dtype = graph_.values[value].dtype;
    buffer.zero = graph_.values[value].dtype == Dtype::uint8 ? graph_.values[value].zero : 0;
    buffer.pixel = buffer.shape.channels;
    plan_.buffers.push_back(buffer);
  }

  // A row of a tile that lies in two cache lines takes twice as long to load. Below half a line the tile would be
  // mostly empty.
  void align_pixels() {
    constexpr int64_t kLine = 64;
    for (const Step& step : graph_.steps) {
      Buffer& b = buffer_of(step.inputs[0]);
      const bool product = step.op == Op::conv2d && step.groups == 1 && b.dtype == Dtype::uint8;
      if (product && b.shape.channels > kLine / 2) b.pixel = (b.shape.channels + kLine - 1) / kLine * kLine;
    }
  }

  void add_borders() {
    for (const Step& step : graph_.steps) {
      if (step.op != Op::conv2d) continue;
      Buffer& b = buffer_of(step.inputs[0]);
      const Window& w = step.window;
      b.top = std::max(b.top, w.top), b.bottom = std::max(b.bottom, w.bottom);
      b.left = std::max(b.left, w.left), b.right = std::max(b.right, w.right);
    }
    for (const Buffer& b : plan_.buffers) {
      const int64_t rows = b.top + b.shape.height + b.bottom, width = b.left + b.shape.width + b.right;
      require_room(rows <= kMostElements / width && rows * width <= kMostElements / b.pixel);
    }
  }

  // The value that an input becomes as it is read: where all that happens to it is a change of dtype, the changed one.
  int read_as(int32_t input) const {
    const Step* only = nullptr;
    for (const Step& step : graph_.steps)
      for (const int32_t x : step.inputs)
        if (x == input) {
          if (only != nullptr) return input;
          only = &step;
        }
    for (const int32_t v : graph_.outputs)
      if (v == input) return input;
    const bool converts = only != nullptr && only->op == Op::activation && only->activation.function == Function::none;
    return converts ? only->output : input;
  }

  void add_instructions() {
    std::vector<char> has_border(plan_.buffers.size(), 0);
    auto& list = plan_.instructions;
    const auto border_of = [&](int value) {
      const int b = plan_.places[value].buffer;
      if (plan_.buffers[b].bordered() && !has_border[b]) list.push_back({Kind::border, -1, b});
      has_border[b] = 1;
    };
    std::vector<char> done(graph_.values.size(), 0);
    for (size_t i = 0; i < graph_.inputs.size(); ++i) {
      const int value = read_as(graph_.inputs[i]);
      border_of(value);
      list.push_back({Kind::read, static_cast<int>(i), value});
      done[value] = 1;
    }
    for (size_t i = 0; i < graph_.steps.size(); ++i) {
      const Step& step = graph_.steps[i];
      const int index = static_cast<int>(i);
      if (done[step.output] || keeps_order(step)) continue;
      border_of(step.output);
      switch (step.op) {
        case Op::conv2d:
        case Op::linear:
          list.push_back({is_depthwise(graph_, step) ? Kind::depthwise : Kind::conv2d, index, step.output});
          break;
        case Op::affine:
        case Op::activation:
        case Op::add:
        case Op::sub:
        case Op::mul: list.push_back({Kind::point, index, step.output}); break;
        case Op::softmax:
        case Op::log_softmax: list.push_back({Kind::softmax, index, step.output}); break;
        case Op::max_pool2d:
        case Op::avg_pool2d:
        case Op::adaptive_avg_pool2d: list.push_back({Kind::pool, index, step.output}); break;
        case Op::cat: {
          const Place& to = plan_.places[step.output];
          int64_t channel = 0;
          for (const int32_t x : step.inputs) {
            const Place& from = plan_.places[x];
            if (from.buffer != to.buffer || from.channel != to.channel + channel)
              list.push_back({Kind::move, index, step.output, x, channel});
            channel += graph_.values[x].shape.channels;
          }
          break;
        }
        default: list.push_back({Kind::move, index, step.output, step.inputs[0]}); break;
      }
    }
    for (size_t i = 0; i < graph_.outputs.size(); ++i)
      list.push_back({Kind::write, static_cast<int>(i), graph_.outputs[i]});
  }

  void divide() {
    auto& stages = plan_.stages;
    for (int i = 0; i < static_cast<int>(plan_.instructions.size()); ++i) {
      const Instruction& each = plan_.instructions[i];
      const bool wide = each.kind == Kind::conv2d && wide_[each.step];
      if (wide || stages.empty() || stages.back().wide) stages.push_back({i, i, wide});
      stages.back().end = i + 1;
    }
  }

  int stage_of(int instruction) const {
    int stage = 0;
    while (plan_.stages[stage].end <= instruction) ++stage;
    return stage;
  }

  void find_lifetimes() {
    for (int i = 0; i < static_cast<int>(plan_.instructions.size()); ++i) {
      const Instruction& each = plan_.instructions[i];
      const auto use = [&](int buffer) {
        Buffer& b = plan_.buffers[buffer];
        if (b.first < 0) b.first = i;
        b.last = i;
      };
      if (each.kind == Kind::border) {
        use(each.value);
        continue;
      }
      use(plan_.places[each.value].buffer);
      if (each.kind == Kind::read || each.kind == Kind::write) continue;
      if (each.source >= 0) {
        use(plan_.places[each.source].buffer);
        continue;
      }
      for (const int32_t x : graph_.steps[each.step].inputs) use(plan_.places[x].buffer);
    }
  }

  // Of each buffer that is used: the first instruction and the last, between which no other may lie in its place.
  using Lives = std::vector<std::pair<int, int>>;

  // Where threads go through joined instructions at their own pace, what one still needs another must not overwrite.
  Lives lives_of_joined() const {
    Lives lives;
    const auto& list = plan_.instructions;
    for (const Buffer& b : plan_.buffers) {
      int first = b.first, last = b.last;
      while (first > 0 && list[first].joins) --first;
      while (last >= 0 && last + 1 < static_cast<int>(list.size()) && list[last + 1].joins) ++last;
      lives.emplace_back(first, last);
    }
    return lives;
  }

  // The same of images that go through a stage at their own pace.
  Lives lives_of_stages() {
    Lives lives;
    for (Buffer& b : plan_.buffers) {
      lives.emplace_back(b.first, b.last);
      if (b.first < 0) continue;
      const int from = stage_of(b.first), to = stage_of(b.last);
      b.shared = from != to || plan_.stages[from].wide;
      if (b.shared) lives.back() = {plan_.stages[from].begin, plan_.stages[to].end - 1};
    }
    return lives;
  }

  void allocate() {
    const auto all = [](const Buffer&) { return true; };
    plan_.divided = allocate(lives_of_joined(), all, &Buffer::divided);
    const Lives lives = lives_of_stages();
    plan_.local = allocate(lives, [](const Buffer& b) { return !b.shared; }, &Buffer::offset);
    plan_.shared = allocate(lives, [](const Buffer& b) { return b.shared; }, &Buffer::offset);
  }

  // Each buffer of some, the largest first, lies at the lowest place that no other has while it lives. Returns what
  // they take in all.
  template <class F>
  int64_t allocate(const Lives& lives, const F& is_one, int64_t Buffer::*offset) {
    std::vector<int> order(plan_.buffers.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return plan_.buffers[a].bytes() > plan_.buffers[b].bytes(); });
    std::vector<int> placed;
    int64_t end = 0;
    for (const int index : order) {
      Buffer& b = plan_.buffers[index];
      if (b.first < 0 || !is_one(b)) continue;
      std::vector<const Buffer*> rivals;
      for (const int other : placed)
        if (lives[other].first <= lives[index].second && lives[index].first <= lives[other].second)
          rivals.push_back(&plan_.buffers[other]);
      std::sort(rivals.begin(), rivals.end(),
                [&](const Buffer* x, const Buffer* y) { return x->*offset < y->*offset; });
      for (const Buffer* o : rivals)
        if (b.*offset < o->*offset + o->bytes() && o->*offset < b.*offset + b.bytes())
          b.*offset = o->*offset + o->bytes();
      placed.push_back(index);
      end = std::max(end, b.*offset + b.bytes());
      require_room(end <= kMostBytes);
    }
    return end;
  }
};

}  // namespace

Plan make_plan(const Graph& graph, const std::vector<char>& wide, bool aligned) {
  return Planner(graph, wide, aligned).run();
}

}  // namespace bqnn::engine
