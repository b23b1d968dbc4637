#include "cpu/engine/program.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>

#include "cpu/base/scratch.h"

namespace bqnn::engine {

#define BQNN_KERNELS(isa) \
  namespace isa {         \
  extern const Kernels kernels; \
  }
BQNN_KERNELS(scalar)
#if defined(__x86_64__)
BQNN_KERNELS(avx2)
BQNN_KERNELS(avx512)
namespace amx {
void conv2d(const ConvCall& call, int64_t parts, int64_t begin, int64_t end);
}
#endif
#undef BQNN_KERNELS

const Kernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx2) return avx2::kernels;
  if (isa == Isa::avx512) return avx512::kernels;
  if (isa == Isa::amx) {
    static const Kernels kernels = [] {
      Kernels all = avx512::kernels;
      all.tiled_conv2d = &amx::conv2d;
      return all;
    }();
    return kernels;
  }
#endif
  (void)isa;
  return scalar::kernels;
}

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Products that repay waking a thread, which takes a few microseconds: of floats, and as many more of integers as their
// instructions multiply at once.
constexpr int64_t kWorthAThread = 1 << 18;

int64_t worth_a_thread(const Kernels& kernels, bool integers, bool tiles) {
  if (tiles) return kWorthAThread << 4;
  return integers && kernels.lanes == 16 ? kWorthAThread << 2 : kWorthAThread;
}

// Vectors of a strip that a convolution has channels for.
int64_t vectors_of(const Conv& conv, const Kernels& kernels) {
  return ceil_div(std::min<int64_t>(conv.group_channels, kernels.strip), kernels.lanes);
}

// Bytes of a border that repay waking a thread.
constexpr int64_t kBorderWorthAThread = 1 << 14;

// Positions that are worth a part of their own.
constexpr int64_t kPositionsOfRows = 64;

constexpr int64_t kMostBytes = int64_t{1} << 50;  // of the images of a run

// Images that a thread takes through all steps together, at least, where the filters of large layers are made for them.
constexpr int64_t kImagesOfFilters = 8;

}  // namespace

// The memory of a run, or of one thread's part of it.
struct Program::Frame {
  const Outside *inputs, *outputs;
  char *local, *shared;
  int64_t first, images;  // of the batch
  int64_t all;            // images of the batch
  int64_t room;           // images that local memory is for

  // Where the frame's first image of a buffer lies.
  char* memory(const Buffer& b) const {
    return b.shared ? shared + b.offset * all + first * b.bytes() : local + b.offset * room;
  }
};

Program::Program(Graph graph, Isa isa, const Limits& limits)
    : graph_(std::move(graph)), limits_(limits), kernels_(&kernels_of(isa)), weights_(graph_, *kernels_) {
  check(graph_);
  const size_t steps = graph_.steps.size();
  int64_t panels = 0;
  for (const Step& step : graph_.steps)
    panels += count_weights(graph_, step) * size_of(graph_.values[step.inputs[0]].dtype);
  const bool kept = panels <= limits.kept_panels;
  std::vector<char> wide(steps, 0);
  for (size_t i = 0; i < steps; ++i) {
    const Shape& y = graph_.values[graph_.steps[i].output].shape;
    wide[i] = !kept && y.height * y.width == 1 && count_weights(graph_, graph_.steps[i]) >= limits.wide_layer;
  }
  plan_ = make_plan(graph_, wide, kernels_->tiled_conv2d != nullptr);
  for (Step& step : graph_.steps) {
    const Buffer& x = plan_.buffers[plan_.places[step.inputs[0]].buffer];
    bool dense = true;
    for (const int32_t value : {step.output, step.inputs.size() > 1 ? step.inputs[1] : step.output})
      dense = dense && plan_.buffers[plan_.places[value].buffer].pixel == graph_.values[value].shape.channels;
    convs_.push_back(weights_.prepare(step, x, dense, kept));
    if (convs_.back().filtered && convs_.back().integers && !kept) least_block_ = kImagesOfFilters;
    const Shape& y = graph_.values[step.output].shape;
    const int64_t pixels = convs_.back().window.stride_w * x.pixel * size_of(x.dtype);
    slack_ = std::max(slack_, slack_of(convs_.back(), y.height * y.width > 1 ? pixels : x.bytes()));
    step.weight = Weight{};
  }
}

View Program::view(const Frame& frame, int value) const {
  const Value& v = graph_.values[value];
  const Place& place = plan_.places[value];
  const Buffer& b = plan_.buffers[place.buffer];
  View view{nullptr, v.dtype, v.shape, b.pixel, b.row(), b.bytes() / size_of(v.dtype), v.scale, v.zero};
  view.data = frame.memory(b) + view.bytes(b.top * view.row + b.left * view.pixel + place.channel);
  return view;
}

namespace {

// Sets bytes to a number; a call of memset takes longer than the few of them at the side of a row.
inline void fill(char* at, int number, int64_t count) {
  constexpr int64_t kPiece = 16;
  if (count < kPiece || count > 4 * kPiece) return (void)std::memset(at, number, static_cast<size_t>(count));
  for (int64_t i = 0; i < count - kPiece; i += kPiece) std::memset(at + i, number, kPiece);
  std::memset(at + count - kPiece, number, kPiece);
}

// Sets the border of images to what stands for zero. Units: what lies before each row of an image, and after the last.
void fill_border(const Buffer& b, char* images, int64_t begin, int64_t end) {
  const int64_t size = size_of(b.dtype), row = b.row() * size, left = b.left * b.pixel * size;
  const int64_t right = b.right * b.pixel * size, height = b.shape.height, units = height + 1;
  char* image = images + begin / units * b.bytes();
  for (int64_t h = begin % units, unit = begin; unit < end; ++unit) {
    const int64_t above = h == 0 ? b.top * row : right, below = h == height ? b.bottom * row : left;
    fill(image + (b.top + h) * row - above, b.zero, above + below);
    if (++h == units) h = 0, image += b.bytes();
  }
}

// The parts of a batch that a frame has of somebody else's tensor.
Outside part_of(const Outside& tensor, int64_t first) {
  Outside part = tensor;
  part.data += first * tensor.image * (tensor.bytes ? 1 : 4);
  return part;
}

}  // namespace

void Program::run_instruction(const Frame& frame, const Instruction& of, const Parallel& parallel) const {
  const Kernels& k = *kernels_;
  const int64_t images = frame.images;
  if (of.kind == Kind::border) {
    const Buffer& b = plan_.buffers[of.value];
    const int64_t units = b.shape.height + 1, pixels = b.shape.height * b.shape.width;
    const int64_t bytes = (b.image() - pixels * b.pixel) * size_of(b.dtype);
    return parallel_for(parallel, images * units, 1 + kBorderWorthAThread * units / bytes,
                        [&](int64_t begin, int64_t end) { fill_border(b, frame.memory(b), begin, end); });
  }
  const View y = view(frame, of.value);
  const int64_t rows = images * y.shape.height;
  // An element that is moved or changed counts as a few products.
  const int64_t few = worth_a_thread(k, y.dtype == Dtype::uint8, false) / 16;
  const int64_t grain = 1 + few / (y.shape.channels * y.shape.width);
  if (of.kind == Kind::read) {
    const Outside from = part_of(frame.inputs[of.step], frame.first);
    return parallel_for(parallel, rows, grain, [&](int64_t begin, int64_t end) { k.read(from, y, begin, end); });
  }
  if (of.kind == Kind::write) {
    const Outside to = part_of(frame.outputs[of.step], frame.first);
    return parallel_for(parallel, rows, grain, [&](int64_t begin, int64_t end) { k.write(y, to, begin, end); });
  }
  const Step& step = graph_.steps[of.step];
  const Conv& conv = convs_[of.step];
  const View x = view(frame, of.source >= 0 ? of.source : step.inputs[0]);
  switch (of.kind) {
    case Kind::conv2d:
    case Kind::depthwise: {
      ConvCall call{&conv, x, y, {}, images};
      if (step.inputs.size() > 1) call.residual = view(frame, step.inputs[1]);
      call.y.fold(conv.fold), call.residual.fold(conv.fold);
      if (of.kind == Kind::depthwise) {
        const int64_t work = products(of) / y.shape.height;
        return parallel_for(parallel, rows, 1 + kWorthAThread / 8 / (1 + work),
                            [&](int64_t begin, int64_t end) { k.depthwise(call, begin, end); });
      }
      const int64_t strips = conv.groups * ceil_div(conv.group_channels, k.strip);
      const int64_t positions = rows * call.y.shape.width;
      const bool filtered = by_filtering(conv, images, y.shape, vectors_of(conv, k)), tiled = on_tiles(conv, positions);
      const auto conv2d = tiled ? k.tiled_conv2d : filtered ? k.winograd : k.conv2d;
      int64_t parts = parallel.threads / std::gcd<int64_t>(parallel.threads, strips);
      if (strips >= 4 * parallel.threads || parts > positions) parts = 1;
      // Threads that keep to their rows from step to step find them in their caches. Then each reads all weights, which
      // must not be more than the images that another division would have it read.
      const bool few_weights = count_weights(graph_, step) <= images * x.shape.height * x.shape.width * x.shape.channels;
      if (!filtered && !tiled && few_weights && positions >= kPositionsOfRows * parallel.threads) parts = parallel.threads;
      const double work = static_cast<double>(products(of)) * images / (strips * parts);
      const auto worth = static_cast<double>(worth_a_thread(k, conv.integers, tiled));
      parallel_for(parallel, strips * parts, static_cast<int64_t>(1 + worth / (1 + work)),
                   [&](int64_t begin, int64_t end) { conv2d(call, parts, begin, end); });
      return;
    }
    case Kind::point:
    case Kind::softmax: {
      PointCall call{step.op, step.activation, x, {}, y, conv.scale, conv.bias, conv.bytes};
      if (step.inputs.size() > 1) call.b = view(frame, step.inputs[1]);
      const auto run = of.kind == Kind::point ? k.point : k.softmax;
      return parallel_for(parallel, rows, grain, [&](int64_t begin, int64_t end) { run(call, begin, end); });
    }
    case Kind::pool: {
      const PoolCall call{step.op, step.window, x, y};
      return parallel_for(parallel, rows, grain, [&](int64_t begin, int64_t end) { k.pool(call, begin, end); });
    }
    default: {
      MoveCall call{x, y, {0, 0, 0}, {0, 0, 0}, {1, 1, 1}, x.shape, step.op == Op::reshape, false, step.number};
      if (step.op == Op::cat) call.to.channels = of.channel;
      if (step.op == Op::pad) call.to = step.low, call.fill = true;
      if (step.op == Op::slice) call.from = step.low, call.step = step.step, call.count = y.shape;
      return parallel_for(parallel, rows, grain, [&](int64_t begin, int64_t end) { k.move(call, begin, end); });
    }
  }
}

void Program::run_stage(const Frame& frame, const Stage& stage, const Parallel& parallel, double* seconds) const {
  for (int i = stage.begin; i < stage.end; ++i) {
    if (seconds == nullptr) {
      run_instruction(frame, plan_.instructions[i], parallel);
      continue;
    }
    const auto begin = std::chrono::steady_clock::now();
    run_instruction(frame, plan_.instructions[i], parallel);
    seconds[i] += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
}

int64_t Program::most_images() const { return kMostBytes / (1 + plan_.local + plan_.shared); }

void Program::run(const Outside* inputs, const Outside* outputs, int64_t images, const Parallel& parallel,
                  double* seconds) const {
  if (images == 0) return;
  const int64_t threads = parallel.threads;
  char* shared = plan_.shared > 0 ? scratch(Scratch::shared, plan_.shared * images + slack_) : nullptr;
  const auto local = [&](int64_t room) { return scratch(Scratch::arena, plan_.local * room + slack_); };
  // A few images that threads can not share evenly are divided within each step.
  const bool divided = images < threads || (images % threads != 0 && images < 4 * threads);
  const int64_t of_cache = limits_.cache / std::max<int64_t>(1, plan_.local);
  int64_t block = std::min(std::max(of_cache, least_block_), images);
  if (!divided) {
    const int64_t rounds = ceil_div(images, threads * block);
    block = ceil_div(images, threads * rounds);
  }
  for (const Stage& stage : plan_.stages) {
    if (divided || stage.wide) {
      run_stage({inputs, outputs, stage.wide ? nullptr : local(images), shared, 0, images, images, images}, stage,
                parallel, seconds);
      continue;
    }
    parallel_for(parallel, ceil_div(images, block), 1, [&](int64_t begin, int64_t end) {
      char* memory = local(block);
      std::vector<double> of_thread(seconds == nullptr ? 0 : plan_.instructions.size());
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * block, count = std::min(images - first, block);
        run_stage({inputs, outputs, memory, shared, first, count, images, block}, stage, {nullptr, 1},
                  seconds == nullptr ? nullptr : of_thread.data());
      }
      if (seconds == nullptr) return;
      for (int i = stage.begin; i < stage.end; ++i) {
        double old = seconds[i], sum;
        do sum = old + of_thread[i] / threads;
        while (!__atomic_compare_exchange(&seconds[i], &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
      }
    });
  }
}

int64_t Program::products(const Instruction& of) const {
  if (of.kind != Kind::conv2d && of.kind != Kind::depthwise) return 0;
  const Step& step = graph_.steps[of.step];
  const Shape& y = graph_.values[of.value].shape;
  return count_weights(graph_, step) * y.height * y.width;
}

std::string Program::describe(const Instruction& of, int64_t images) const {
  switch (of.kind) {
    case Kind::read: return "read";
    case Kind::write: return "write";
    case Kind::border: return "border";
    case Kind::conv2d: {
      const Conv& conv = convs_[of.step];
      const Shape& y = graph_.values[of.value].shape;
      const bool tiles = on_tiles(conv, images * y.height * y.width);
      std::string text = std::string(tiles ? "AMX" : kernels_->name) + (conv.integers ? " int8" : " fp32");
      if (by_filtering(conv, images, y, vectors_of(conv, *kernels_))) text += " Winograd";
      return text + (conv.panels != nullptr ? " panel" : " codes");
    }
    case Kind::depthwise: return std::string(kernels_->name) + " depthwise";
    case Kind::point: return "elementwise";
    case Kind::softmax: return "softmax";
    case Kind::pool: return "pool";
    case Kind::move: return "move";
  }
  return "";
}

}  // namespace bqnn::engine
