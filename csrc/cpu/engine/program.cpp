#include "cpu/engine/program.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
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
#endif
#undef BQNN_KERNELS

const Kernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx2) return avx2::kernels;
  if (isa == Isa::avx512 || isa == Isa::amx) return avx512::kernels;
#endif
  (void)isa;
  return scalar::kernels;
}

namespace {

constexpr int64_t kPadding = kSlack / 4;  // numbers that kernels may read beyond the last channel
constexpr int64_t kCache = 1 << 19;       // bytes of images that a thread takes through all steps together
constexpr int64_t kKeptPanels = 1 << 20;  // bytes of panels that are kept; more are made in every call
constexpr int64_t kWideLayer = 1 << 17;   // weights from which on a layer of one position is a stage of its own
constexpr int64_t kWorthAThread = 1 << 18;  // products that repay waking a thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The codes of a channel, one a weight.
void unpack(const Weight& weight, int64_t columns, int64_t channel, std::vector<uint8_t>* codes) {
  const int digits = digits_of_byte(weight.num_levels);
  const int64_t width = ceil_div(columns, digits);
  codes->resize(static_cast<size_t>(width * digits));
  for (int64_t i = 0; i < width; ++i) {
    unsigned byte = weight.codes[channel * width + i];
    for (int d = 0; d < digits; ++d, byte /= weight.num_levels) (*codes)[i * digits + d] = byte % weight.num_levels;
  }
}

}  // namespace

// The memory of a run, or of one thread's part of it.
struct Program::Frame {
  const Outside *inputs, *outputs;
  char *local, *shared;
  int64_t first, images;  // of the batch
  int64_t all;            // images of the batch
  int64_t room;           // images that local memory is for
};

char* Program::keep(int64_t bytes) {
  void* memory = std::aligned_alloc(64, static_cast<size_t>((bytes + kSlack + 63) / 64 * 64));
  if (memory == nullptr) throw std::bad_alloc();
  memory_.emplace_back(static_cast<char*>(memory), &std::free);
  return static_cast<char*>(memory);
}

// A copy of so many numbers, or of none `otherwise`, and zeros beyond.
const float* Program::keep_floats(const float* values, int64_t count, float otherwise) {
  std::vector<float> copy(static_cast<size_t>(count + kPadding), 0.0f);
  for (int64_t i = 0; i < count; ++i) copy[i] = values != nullptr ? values[i] : otherwise;
  floats_.push_back(std::move(copy));
  return floats_.back().data();
}

Program::Program(Graph graph, Isa isa) : graph_(std::move(graph)), kernels_(&kernels_of(isa)) {
  check(graph_);
  const size_t steps = graph_.steps.size();
  std::vector<char> wide(steps, 0);
  int64_t panels = 0;
  const auto weights_of = [&](const Step& step) {
    const Shape &x = graph_.values[step.inputs[0]].shape, &y = graph_.values[step.output].shape;
    const Window& w = step.window;
    return y.channels * (step.op == Op::linear ? x.count() : x.channels / step.groups * w.kernel_h * w.kernel_w);
  };
  for (const Step& step : graph_.steps)
    if (step.op == Op::conv2d || step.op == Op::linear)
      panels += weights_of(step) * size_of(graph_.values[step.inputs[0]].dtype);
  const bool kept = panels <= kKeptPanels;
  for (size_t i = 0; i < steps; ++i) {
    const Step& step = graph_.steps[i];
    const Shape& y = graph_.values[step.output].shape;
    const bool layer = step.op == Op::conv2d || step.op == Op::linear;
    wide[i] = layer && !kept && y.height * y.width == 1 && weights_of(step) >= kWideLayer;
  }
  plan_ = make_plan(graph_, wide);
  convs_.resize(steps);
  for (size_t i = 0; i < steps; ++i) {
    Step& step = graph_.steps[i];
    const int64_t channels = graph_.values[step.output].shape.channels;
    if (step.op == Op::conv2d || step.op == Op::linear) {
      prepare(step, &convs_[i]);
      if (!convs_[i].depthwise && (kept || convs_[i].layout == nullptr)) keep_panels(&convs_[i]);
    } else if (step.op == Op::affine) {
      convs_[i].scale = keep_floats(step.weight.scale, channels, 1.0f);
      convs_[i].bias = keep_floats(step.weight.bias, channels, 0.0f);
    }
    step.weight = Weight{};
  }
}

void Program::prepare(const Step& step, Conv* conv) {
  const Value &x = graph_.values[step.inputs[0]], &y = graph_.values[step.output];
  conv->window = step.window;
  conv->groups = step.groups;
  conv->inputs = x.shape.channels / step.groups;
  if (step.op == Op::linear) {
    conv->window = Window{};
    conv->window.kernel_h = x.shape.height, conv->window.kernel_w = x.shape.width;
  }
  conv->group_channels = y.shape.channels / step.groups;
  conv->activation = step.activation;
  conv->integers = x.dtype == Dtype::uint8;
  conv->depthwise = is_depthwise(graph_, step);
  const Window& w = conv->window;
  const Buffer& buffer = plan_.buffers[plan_.places[step.inputs[0]].buffer];
  const bool dense = conv->inputs == buffer.pixel() && w.dilation_w == 1;
  // Pixels of a row follow each other in memory where nothing lies between them.
  conv->segments = dense || w.kernel_w == 1 ? w.kernel_h : w.kernel_h * w.kernel_w;
  conv->segment = conv->inputs * w.kernel_h * w.kernel_w / conv->segments;
  make_weight(step, conv);
  conv->scale = keep_floats(step.weight.scale, y.shape.channels, 1.0f);
  conv->bias = keep_floats(step.weight.bias, y.shape.channels, 0.0f);
}

// The weight in the order that its kernel reads: taps, a layout, or numbers of which panels are made.
void Program::make_weight(const Step& step, Conv* conv) {
  const Weight& weight = step.weight;
  const Window& w = conv->window;
  const int64_t channels = conv->channels(), taps = w.kernel_h * w.kernel_w, columns = conv->inputs * taps;
  std::vector<int32_t> shift(static_cast<size_t>(channels + kPadding), 0);
  const int zero = graph_.values[step.inputs[0]].zero;
  std::vector<uint8_t> codes;
  conv->most_integer = 0;
  // Calls f(channel, column, number) for the whole weight, columns as [input][tap].
  const auto each = [&](const auto& f) {
    for (int64_t n = 0; n < channels; ++n) {
      if (weight.codes != nullptr) unpack(weight, columns, n, &codes);
      const int64_t book = weight.codebooks == 1 ? 0 : n * weight.num_levels;
      for (int64_t k = 0; k < columns; ++k) {
        float number;
        if (weight.codes != nullptr)
          number = conv->integers ? static_cast<float>(weight.integers[book + codes[k]]) : weight.levels[book + codes[k]];
        else
          number = conv->integers ? static_cast<float>(weight.integer_numbers[n * columns + k])
                                  : weight.numbers[n * columns + k];
        f(n, k, number);
      }
    }
  };
  if (conv->integers) {
    each([&](int64_t n, int64_t, float number) {
      shift[n] += zero * static_cast<int32_t>(number);
      conv->most_integer = std::max(conv->most_integer, std::abs(static_cast<int>(number)));
    });
  }
  integers_.push_back(std::move(shift));
  conv->shift = integers_.back().data();

  if (conv->depthwise) {
    const int64_t padded = channels + kPadding;
    std::vector<float> of_taps(static_cast<size_t>(taps * padded), 0.0f);
    each([&](int64_t n, int64_t tap, float number) { of_taps[tap * padded + n] = number; });
    conv->taps = keep_floats(of_taps.data(), taps * padded, 0.0f);
    return;
  }
  if (weight.codes == nullptr) {
    auto* numbers = keep(channels * columns * 4);
    each([&](int64_t n, int64_t k, float number) {
      const int64_t at = n * columns + k % taps * conv->inputs + k / taps;
      if (conv->integers)
        reinterpret_cast<int8_t*>(numbers)[at] = static_cast<int8_t>(number);
      else
        reinterpret_cast<float*>(numbers)[at] = number;
    });
    conv->integer_numbers = conv->integers ? reinterpret_cast<const int8_t*>(numbers) : nullptr;
    conv->numbers = conv->integers ? nullptr : reinterpret_cast<const float*>(numbers);
    return;
  }
  const int64_t count = int64_t{weight.codebooks} * weight.num_levels;
  const std::vector<float> levels(static_cast<size_t>(count), 0.0f), ones(static_cast<size_t>(weight.codebooks), 1.0f);
  PackedWeight packed{weight.codes,
                      conv->integers ? levels.data() : weight.levels,
                      weight.integers,
                      ones.data(),
                      channels,
                      columns,
                      conv->groups,
                      weight.num_levels,
                      weight.codebooks,
                      static_cast<int>(w.kernel_h),
                      static_cast<int>(w.kernel_w),
                      conv->segments == w.kernel_h ? 1 : 2,  // what sets the columns of a kernel apart
                      conv->integers ? Precision::int8 : Precision::fp32,
                      LayoutForm::words};
  char* layout = keep(plan_layout(packed).bytes);
  make_layout(packed, layout);
  conv->layout = reinterpret_cast<const PackedLayout*>(layout);
}

void Program::keep_panels(Conv* conv) {
  const int64_t strips = ceil_div(conv->group_channels, kernels_->strip), words = kernels_->panel_words(*conv);
  auto* panels = reinterpret_cast<uint32_t*>(keep(conv->groups * strips * words * 4));
  for (int64_t i = 0; i < conv->groups * strips; ++i)
    kernels_->make_panel(*conv, i / strips, i % strips, panels + i * words);
  conv->panels = panels;
  // What they were made of is not needed any more; it was kept last.
  memory_.erase(memory_.end() - 2);
  conv->layout = nullptr, conv->numbers = nullptr, conv->integer_numbers = nullptr;
}

View Program::view(const Frame& frame, int value) const {
  const Value& v = graph_.values[value];
  const Place& place = plan_.places[value];
  const Buffer& b = plan_.buffers[place.buffer];
  View view{nullptr, v.dtype, v.shape, b.pixel(), b.row(), b.bytes() / size_of(v.dtype), v.scale, v.zero};
  char* base = b.shared ? frame.shared + b.offset * frame.all + frame.first * b.bytes()
                        : frame.local + b.offset * frame.room;
  view.data = base + view.bytes(b.top * view.row + b.left * view.pixel + place.channel);
  return view;
}

namespace {

// Sets the border of images to what stands for zero.
void fill_border(const Buffer& b, char* images, int64_t count) {
  const int64_t size = size_of(b.dtype), row = b.row() * size, left = b.left * b.pixel() * size;
  const int64_t right = b.right * b.pixel() * size;
  for (int64_t i = 0; i < count; ++i) {
    char* image = images + i * b.bytes();
    std::memset(image, b.zero, static_cast<size_t>(b.top * row + left));
    for (int64_t h = 0; h + 1 < b.shape.height; ++h)
      std::memset(image + (b.top + h + 1) * row - right, b.zero, static_cast<size_t>(right + left));
    std::memset(image + (b.top + b.shape.height) * row - right, b.zero, static_cast<size_t>(right + b.bottom * row));
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
    fill_border(b, b.shared ? frame.shared + b.offset * frame.all + frame.first * b.bytes()
                            : frame.local + b.offset * frame.room, images);
    return;
  }
  const View y = view(frame, of.value);
  const int64_t rows = images * y.shape.height;
  // An element that is moved or changed counts as a few products.
  const int64_t grain = 1 + kWorthAThread / (16 * y.shape.channels * y.shape.width);
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
      if (of.kind == Kind::depthwise) {
        const int64_t work = products(of) / y.shape.height;
        return parallel_for(parallel, rows, 1 + kWorthAThread / (8 * (1 + work)),
                            [&](int64_t begin, int64_t end) { k.depthwise(call, begin, end); });
      }
      const int64_t strips = conv.groups * ceil_div(conv.group_channels, k.strip);
      const int64_t positions = rows * y.shape.width;
      int64_t parts = parallel.threads / std::gcd<int64_t>(parallel.threads, strips);
      if (strips >= 4 * parallel.threads || parts > positions) parts = 1;
      const int64_t work = products(of) * images / (strips * parts);
      parallel_for(parallel, strips * parts, 1 + kWorthAThread / (1 + work),
                   [&](int64_t begin, int64_t end) { k.conv2d(call, parts, begin, end); });
      return;
    }
    case Kind::point:
    case Kind::softmax: {
      PointCall call{step.op, step.activation, x, {}, y, conv.scale, conv.bias};
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

void Program::run(const Outside* inputs, const Outside* outputs, int64_t images, const Parallel& parallel,
                  double* seconds) const {
  if (images == 0) return;
  const int64_t threads = parallel.threads;
  char* shared = plan_.shared > 0 ? scratch(Scratch::shared, plan_.shared * images + kSlack) : nullptr;
  const auto local = [&](int64_t room) { return scratch(Scratch::arena, plan_.local * room + kSlack); };
  // A few images that threads can not share evenly are divided within each step.
  const bool divided = images < threads || (images % threads != 0 && images < 4 * threads);
  int64_t block = std::max<int64_t>(1, kCache / std::max<int64_t>(1, plan_.local));
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
  const Conv& conv = convs_[of.step];
  const Shape& y = graph_.values[of.value].shape;
  return y.count() * conv.inputs * conv.window.kernel_h * conv.window.kernel_w;
}

std::string Program::describe(const Instruction& of) const {
  switch (of.kind) {
    case Kind::read: return "read";
    case Kind::write: return "write";
    case Kind::border: return "border";
    case Kind::conv2d: {
      const Conv& conv = convs_[of.step];
      std::string text = std::string(kernels_->name) + (conv.integers ? " int8" : " fp32");
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
