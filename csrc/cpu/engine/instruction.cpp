// One instruction: what it is worth, how threads divide it, and the part that one of them runs.
#include <algorithm>
#include <numeric>

#include "cpu/base/few.h"
#include "cpu/engine/frame.h"

namespace bqnn::engine {
namespace {

// Products that repay another thread, which costs a few microseconds: of floats, and as many more of integers as their
// instructions multiply at once.
constexpr int64_t kWorthAThread = 1 << 18;

int64_t worth_a_thread(const Kernels& kernels, bool integers, bool tiles) {
  if (tiles) return kWorthAThread << 4;
  return integers && kernels.lanes == 16 ? kWorthAThread << 2 : kWorthAThread;
}

// Positions that are worth a part of their own.
constexpr int64_t kPositionsOfRows = 64;

// Sets the border of images to what stands for zero, beside the rows [begin, end) of all of them; what lies above an
// image, and below, goes with its first row and its last.
void fill_border(const Buffer& b, char* images, int64_t begin, int64_t end) {
  const int64_t size = size_of(b.dtype), row = b.row() * size, height = b.shape.height;
  const int64_t left = b.left * b.pixel * size, right = b.right * b.pixel * size;
  const auto zero = static_cast<char>(b.zero);
  for (int64_t unit = begin; unit < end;) {
    const int64_t first = unit % height, last = std::min(height, first + end - unit);
    char* at = images + unit / height * b.bytes() + (b.top + first) * row;
    const int64_t above = first == 0 ? b.top * row : 0, below = last == height ? b.bottom * row : 0;
    set_few(at - above, zero, above + left);
    // What lies right of a row goes on left of the next.
    for (int64_t h = first + 1; h < last; ++h, at += row) set_few(at + row - right, zero, right + left);
    set_few(at + row - right, zero, right + below);
    unit += last - first;
  }
}

// The parts of a batch that a frame has of somebody else's tensor.
Outside part_of(const Outside& tensor, int64_t first) {
  Outside part = tensor;
  part.data += first * tensor.image * (tensor.bytes ? 1 : 4);
  return part;
}

}  // namespace

View Program::view(const Frame& frame, int value) const {
  const Value& v = graph_.values[value];
  const Place& place = plan_.places[value];
  const Buffer& b = plan_.buffers[place.buffer];
  View view{nullptr, v.dtype, v.shape, b.pixel, b.row(), b.bytes() / size_of(v.dtype), v.scale, v.zero};
  view.data = frame.memory(b) + view.bytes(b.top * view.row + b.left * view.pixel + place.channel);
  return view;
}

double Program::load(const Instruction& of) const {
  if (of.kind == Kind::border) return 0.0;
  const Value& y = graph_.values[of.value];
  if (of.kind == Kind::conv2d) {
    const auto worth = static_cast<double>(worth_a_thread(*kernels_, convs_[of.step].integers, convs_[of.step].tiled));
    return static_cast<double>(products(of)) / worth;
  }
  // An element that is moved or changed counts as a few products.
  const auto worth = static_cast<double>(worth_a_thread(*kernels_, y.dtype == Dtype::uint8, false)) / 16;
  const int64_t of_element = of.kind == Kind::depthwise ? convs_[of.step].window.kernel_h : 1;
  return static_cast<double>(y.shape.channels * y.shape.height * y.shape.width * of_element) / worth;
}

Program::Division Program::divide(const Instruction& of, int64_t images, int64_t threads) const {
  using By = Division::By;
  if (of.kind != Kind::conv2d) {
    const Shape& shape = of.kind == Kind::border ? plan_.buffers[of.value].shape : graph_.values[of.value].shape;
    const int64_t rows = images * shape.height;
    return {rows > 1 ? By::rows : By::nothing, std::min(threads, rows), rows};
  }
  const Kernels& k = *kernels_;
  const Step& step = graph_.steps[of.step];
  const Conv& conv = convs_[of.step];
  const Shape &x = graph_.values[step.inputs[0]].shape, &y = graph_.values[step.output].shape;
  const int64_t strips = conv.groups * ceil_div(conv.group_channels, k.strip), rows = images * y.height;
  const int64_t width = y.width / conv.fold, positions = rows * width;
  const bool filtered = by_filtering(conv, images, y, vectors_of(conv, k)), tiled = on_tiles(conv, positions);
  Division found{By::nothing, 1, strips, 1, tiled ? k.tiled_conv2d : filtered ? k.winograd : k.conv2d};
  if (threads == 1) return found;
  // Threads that keep to their rows from step to step find them in their caches. Then each reads all weights, which
  // must not be more than the images that another division would have it read.
  const bool few_weights = count_weights(graph_, step) <= images * x.height * x.width * x.channels;
  const int64_t side = filtered ? (conv.integers ? 4 : 2) : 1;
  const bool whole = filtered ? strips == 1 && y.height % side == 0 && rows % (side * threads) == 0
                              : few_weights && positions >= kPositionsOfRows * threads && rows >= threads;
  if (whole && !tiled) return {By::rows, threads, threads * strips, threads, found.conv2d};
  found.parts = threads / std::gcd<int64_t>(threads, strips);
  if (strips >= 4 * threads || found.parts > positions) found.parts = 1;
  found.units *= found.parts;
  const double work = static_cast<double>(products(of)) * images / found.units;
  const auto least = static_cast<int64_t>(1 + worth_a_thread(k, conv.integers, tiled) / (1 + work));  // units
  found.threads = std::min(threads, ceil_div(found.units, least));
  if (found.threads > 1) found.by = By::units;
  return found;
}

void Program::run_part(const Frame& frame, const Instruction& of, const Division& division, int64_t member) const {
  const Kernels& k = *kernels_;
  const int64_t images = frame.images, begin = division.first(member), end = division.first(member + 1);
  if (begin == end) return;
  if (of.kind == Kind::border) {
    const Buffer& b = plan_.buffers[of.value];
    return fill_border(b, frame.memory(b), begin, end);
  }
  const View y = view(frame, of.value);
  if (of.kind == Kind::read) return k.read(part_of(frame.inputs[of.step], frame.first), y, begin, end);
  if (of.kind == Kind::write) return k.write(y, part_of(frame.outputs[of.step], frame.first), begin, end);
  const Step& step = graph_.steps[of.step];
  const Conv& conv = convs_[of.step];
  const View x = view(frame, of.source >= 0 ? of.source : step.inputs[0]);
  switch (of.kind) {
    case Kind::conv2d:
    case Kind::depthwise: {
      ConvCall call{&conv, x, y, {}, images};
      if (step.inputs.size() > 1) call.residual = view(frame, step.inputs[1]);
      call.y.fold(conv.fold), call.residual.fold(conv.fold);
      if (of.kind == Kind::depthwise) return k.depthwise(call, begin, end);
      call.by_rows = division.by == Division::By::rows;
      return division.conv2d(call, division.parts, begin, end);
    }
    case Kind::point:
    case Kind::softmax: {
      PointCall call{step.op, step.activation, x, {}, y, conv.scale, conv.bias, conv.bytes};
      if (step.inputs.size() > 1) call.b = view(frame, step.inputs[1]);
      return (of.kind == Kind::point ? k.point : k.softmax)(call, begin, end);
    }
    case Kind::pool: return k.pool({step.op, step.window, x, y}, begin, end);
    default: {
      MoveCall call{x, y, {0, 0, 0}, {0, 0, 0}, {1, 1, 1}, x.shape, step.op == Op::reshape, false, step.number};
      if (step.op == Op::cat) call.to.channels = of.channel;
      if (step.op == Op::pad) call.to = step.low, call.fill = true;
      if (step.op == Op::slice) call.from = step.low, call.step = step.step, call.count = y.shape;
      return k.move(call, begin, end);
    }
  }
}

}  // namespace bqnn::engine
