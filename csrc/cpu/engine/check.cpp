// Whether a graph is sound.
#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/engine/graph.h"

namespace bqnn::engine {
namespace {

constexpr int64_t kMostSize = int64_t{1} << 31, kMostCount = int64_t{1} << 40, kMostProducts = int64_t{1} << 62;
constexpr int64_t kMostSum = 255 * 64;                      // of one product of integers
constexpr int64_t kMostBytesOfSum = (kMostSize - 1) / 255;  // that are added up in 32 bits

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

void require(bool holds, const std::string& where, const char* needs) {
  if (!holds) refuse(where + " must " + needs);
}

bool fits(int64_t size) { return size >= 1 && size < kMostSize; }

void check_value(const Value& value, const std::string& where) {
  const Shape& s = value.shape;
  require(fits(s.channels) && fits(s.height) && fits(s.width), where, "have sizes from 1 to 2^31 - 1");
  require(s.channels <= kMostCount / s.height && s.channels * s.height <= kMostCount / s.width, where,
          "have fewer than 2^40 elements");
  require(value.rank == 3 || (value.rank == 1 && s.height == 1 && s.width == 1), where, "have rank 1 or 3");
  require(value.dtype == Dtype::float32 || value.dtype == Dtype::uint8, where, "be float32 or uint8");
  require(value.dtype == Dtype::float32 || (value.scale > 0.0f && std::isfinite(value.scale)), where,
          "have a positive scale");
  require(value.zero >= 0 && value.zero <= 255, where, "have a zero from 0 to 255");
}

bool same_numbers(const Value& a, const Value& b) {
  return a.dtype == b.dtype && (a.dtype == Dtype::float32 || (a.scale == b.scale && a.zero == b.zero));
}

// The size of an output along an axis, or -1 where the window does not fit.
int64_t window_size(int64_t size, int64_t kernel, int64_t stride, int64_t before, int64_t after, int64_t dilation,
                    bool ceil) {
  const int64_t room = size + before + after - dilation * (kernel - 1) - 1;
  if (room < 0) return -1;
  int64_t out = room / stride + 1;
  if (ceil && room % stride != 0 && out * stride < size + before) ++out;
  return out;
}

void check_window(const Window& w, const std::string& where) {
  const auto small = [](int64_t value) { return value >= 1 && value < (int64_t{1} << 20); };
  require(small(w.kernel_h) && small(w.kernel_w) && small(w.stride_h) && small(w.stride_w) && small(w.dilation_h) &&
              small(w.dilation_w),
          where, "have kernel, stride and dilation from 1 to 2^20 - 1");
  for (const int64_t padding : {w.top, w.bottom, w.left, w.right})
    require(padding >= 0 && padding < (int64_t{1} << 20), where, "have padding from 0 to 2^20 - 1");
}

Shape windowed(const Shape& x, const Window& w, int64_t channels) {
  return {channels, window_size(x.height, w.kernel_h, w.stride_h, w.top, w.bottom, w.dilation_h, w.ceil),
          window_size(x.width, w.kernel_w, w.stride_w, w.left, w.right, w.dilation_w, w.ceil)};
}

void check_weight(const Step& step, const Value& x, int64_t channels, int64_t columns, const std::string& where) {
  const Weight& w = step.weight;
  const bool integers = x.dtype == Dtype::uint8, coded = w.codes != nullptr;
  require(coded != (w.numbers != nullptr || w.integer_numbers != nullptr), where, "have codes or numbers");
  if (coded) {
    require(w.num_levels >= 2 && w.num_levels <= 16, where, "have 2 to 16 levels");
    require(w.codebooks == 1 || w.codebooks == channels, where, "have one codebook, or one a channel");
    require(integers ? w.integers != nullptr : w.levels != nullptr, where, "have levels of the kind that x asks for");
    const int64_t count = int64_t{w.codebooks} * w.num_levels;
    for (int64_t i = 0; i < count; ++i)
      if (integers) require(w.integers[i] >= -64 && w.integers[i] <= 64, where, "have integers from -64 to 64");
  } else {
    require(integers == (w.integer_numbers != nullptr), where, "have numbers of the kind that x asks for");
    if (integers)
      for (int64_t i = 0; i < channels * columns; ++i)
        require(w.integer_numbers[i] >= -64 && w.integer_numbers[i] <= 64, where, "have integers from -64 to 64");
  }
  if (integers) {
    require(columns <= (kMostSize - 1) / kMostSum, where, "have sums that fit 32 bits");
    require(w.scale != nullptr, where, "have a scale");
  }
}

// The mean of a window of at most so many elements.
void check_mean(const Value& x, int64_t elements, const std::string& where) {
  require(x.dtype == Dtype::float32 || elements <= kMostBytesOfSum, where, "have sums that fit 32 bits");
}

class Checker {
 public:
  explicit Checker(const Graph& graph) : graph_(graph) {}

  void run() {
    const auto count = static_cast<int32_t>(graph_.values.size());
    for (int32_t v = 0; v < count; ++v) check_value(graph_.values[v], "value " + std::to_string(v));
    std::vector<char> known(graph_.values.size(), 0);
    const auto index = [&](int32_t v, const std::string& where) {
      require(v >= 0 && v < count, where, "name values that there are");
      return v;
    };
    require(!graph_.inputs.empty() && !graph_.outputs.empty(), "a graph", "have inputs and outputs");
    for (const int32_t v : graph_.inputs) {
      require(known[index(v, "an input")] == 0, "an input", "be there once");
      require(graph_.values[v].dtype == Dtype::float32, "an input", "be float32");
      known[v] = 1;
    }
    for (size_t i = 0; i < graph_.steps.size(); ++i) {
      const Step& step = graph_.steps[i];
      const std::string where = "step " + std::to_string(i);
      for (const int32_t v : step.inputs)
        require(known[index(v, where)] != 0, where, "read values that are there before");
      require(known[index(step.output, where)] == 0, where, "write a value of its own");
      check_step(step, where);
      known[step.output] = 1;
    }
    for (const int32_t v : graph_.outputs) {
      require(known[index(v, "an output")] != 0, "an output", "be written");
      require(graph_.values[v].dtype == Dtype::float32, "an output", "be float32");
    }
  }

 private:
  const Graph& graph_;

  void check_step(const Step& step, const std::string& where) const {
    require(step.op >= Op::conv2d && step.op < Op::count, where, "have an operator that there is");
    const Activation& act = step.activation;
    require(act.function >= Function::none && act.function < Function::count, where,
            "have an activation that there is");
    const size_t inputs = step.inputs.size();
    const bool layer = step.op == Op::conv2d || step.op == Op::linear;
    const bool binary = step.op == Op::add || step.op == Op::sub || step.op == Op::mul;
    const size_t least = step.op == Op::cat || binary ? 2 : 1;
    const size_t most = step.op == Op::cat ? 1 << 16 : binary || layer ? 2 : 1;
    require(inputs >= least && inputs <= most, where, "have as many inputs as its operator takes");
    const bool act_allowed = layer || binary || step.op == Op::affine || step.op == Op::activation;
    require(act_allowed || act.function == Function::none, where, "have no activation");

    const Value &x = graph_.values[step.inputs[0]], &y = graph_.values[step.output];
    const Window& w = step.window;
    const Shape& s = x.shape;
    Shape expected = s;
    int rank = x.rank;
    int64_t columns = 0;  // weights of a channel
    bool moves = false;  // whether stored numbers are moved as they are
    switch (step.op) {
      case Op::conv2d:
        check_window(w, where);
        require(x.rank == 3 && !w.ceil, where, "read an image");
        require(step.groups >= 1 && s.channels % step.groups == 0 && y.shape.channels % step.groups == 0, where,
                "have groups that divide its channels");
        expected = windowed(s, w, y.shape.channels);
        require(s.channels / step.groups <= kMostCount / (w.kernel_h * w.kernel_w), where,
                "have fewer than 2^40 weights");
        columns = s.channels / step.groups * w.kernel_h * w.kernel_w;
        check_weight(step, x, y.shape.channels, columns, where);
        break;
      case Op::linear:
        require(step.groups == 1, where, "have one group");
        expected = {y.shape.channels, 1, 1};
        rank = 1;
        columns = s.count();
        check_weight(step, x, y.shape.channels, columns, where);
        break;
      case Op::affine:
        require(step.weight.scale != nullptr && step.weight.bias != nullptr, where, "have a scale and a shift");
        break;
      case Op::activation:
        break;
      case Op::add:
      case Op::sub:
      case Op::mul: {
        const Value& b = graph_.values[step.inputs[1]];
        const auto pairs = [](int64_t a, int64_t of_b) { return of_b == a || of_b == 1; };
        require(b.rank == x.rank && pairs(s.channels, b.shape.channels) && pairs(s.height, b.shape.height) &&
                    pairs(s.width, b.shape.width),
                where, "have a second input that is like the first, or 1 where it is not");
        break;
      }
      case Op::max_pool2d:
      case Op::avg_pool2d:
        check_window(w, where);
        require(x.rank == 3 && w.top == w.bottom && w.left == w.right && 2 * w.top <= w.kernel_h &&
                    2 * w.left <= w.kernel_w && w.divisor >= 0 && w.divisor < kMostSize,
                where, "have a padding of at most half its window");
        require(step.op == Op::max_pool2d || (w.dilation_h == 1 && w.dilation_w == 1), where, "have no dilation");
        if (step.op == Op::avg_pool2d) check_mean(x, w.kernel_h * w.kernel_w, where);
        expected = windowed(s, w, s.channels);
        moves = step.op == Op::max_pool2d;
        break;
      case Op::adaptive_avg_pool2d:
        require(x.rank == 3, where, "read an image");
        expected = {s.channels, y.shape.height, y.shape.width};
        check_mean(x, (s.height / y.shape.height + 2) * (s.width / y.shape.width + 2), where);
        break;
      case Op::cat:
        expected.channels = 0;
        for (const int32_t v : step.inputs) {
          const Value& each = graph_.values[v];
          require(each.rank == x.rank && each.shape.height == s.height && each.shape.width == s.width, where,
                  "have inputs of one size");
          require(same_numbers(each, y), where, "have inputs of one scale");
          expected.channels += each.shape.channels;
        }
        moves = true;
        break;
      case Op::pad: {
        const Shape &a = step.low, &b = step.high;
        for (const int64_t n : {a.channels, a.height, a.width, b.channels, b.height, b.width})
          require(n >= 0 && n < kMostSize, where, "have sizes from 0 to 2^31 - 1");
        expected = {s.channels + a.channels + b.channels, s.height + a.height + b.height, s.width + a.width + b.width};
        moves = true;
        break;
      }
      case Op::slice: {
        const auto axis = [&](int64_t size, int64_t start, int64_t stop, int64_t by) {
          require(start >= 0 && start < stop && stop <= size && by >= 1 && by < kMostSize, where,
                  "have a slice that lies within its input");
          return (stop - start + by - 1) / by;
        };
        expected = {axis(s.channels, step.low.channels, step.high.channels, step.step.channels),
                    axis(s.height, step.low.height, step.high.height, step.step.height),
                    axis(s.width, step.low.width, step.high.width, step.step.width)};
        moves = true;
        break;
      }
      case Op::reshape:
        require(y.shape.count() == s.count(), where, "keep the number of elements");
        expected = y.shape, rank = y.rank;
        moves = true;
        break;
      case Op::softmax:
      case Op::log_softmax:
        require(y.dtype == Dtype::float32, where, "write float32");
        break;
      case Op::count:
        break;
    }
    require(y.shape == expected && y.rank == rank, where, "write a value of the shape that follows from its input's");
    require(columns <= kMostProducts / y.shape.count(), where, "have fewer than 2^62 products");
    if (moves) require(same_numbers(x, y), where, "write the numbers that it reads");
    if (layer && inputs == 2) {
      const Value& residual = graph_.values[step.inputs[1]];
      require(residual.shape == y.shape, where, "have a residual of the shape of its output");
    }
  }
};

}  // namespace

void check(const Graph& graph) { Checker(graph).run(); }

}  // namespace bqnn::engine
