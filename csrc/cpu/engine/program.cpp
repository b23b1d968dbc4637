#include "cpu/engine/program.h"

#include <algorithm>
#include <chrono>

#include "cpu/base/barrier.h"
#include "cpu/base/scratch.h"
#include "cpu/engine/frame.h"

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

constexpr int64_t kMostBytes = int64_t{1} << 50;  // of the images of a run

// Images that a thread takes through all steps together, at least, where the filters of large layers are made for them.
constexpr int64_t kImagesOfFilters = 8;

}  // namespace

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
  for (const Instruction& each : plan_.instructions) load_ += load(each);
}

namespace {

// Adds the time since it was made to an entry, if there is one.
class Stopwatch {
 public:
  explicit Stopwatch(double* to) : to_(to) {
    if (to_ != nullptr) begin_ = std::chrono::steady_clock::now();
  }
  Stopwatch(const Stopwatch&) = delete;
  ~Stopwatch() {
    if (to_ != nullptr) *to_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  double* to_;
  std::chrono::steady_clock::time_point begin_;
};

}  // namespace

// The instructions [begin, end), by one thread.
void Program::run_all(const Frame& frame, int begin, int end, double* seconds) const {
  for (int i = begin; i < end; ++i) {
    const Stopwatch watch(seconds == nullptr ? nullptr : seconds + i);
    run_part(frame, plan_.instructions[i], divide(plan_.instructions[i], frame.images, 1), 0);
  }
}

// The same by all threads, which wait for each other where one needs what another has made. Their times are the first
// one's, waiting included.
void Program::run_together(const Frame& frame, int begin, int end, const Parallel& parallel, double* seconds) const {
  using By = Division::By;
  const int64_t threads = parallel.threads;
  if (threads == 1 || load_ * static_cast<double>(frame.images) < static_cast<double>(limits_.team))
    return run_all(frame, begin, end, seconds);
  Barrier barrier(threads);
  parallel_for(parallel, threads, 1, [&](int64_t first, int64_t last) {
    try {
      By since = By::units;  // how everything has been divided since threads met
      for (int i = begin; i < end; ++i) {
        const Instruction& each = plan_.instructions[i];
        const Stopwatch watch(seconds == nullptr || first > 0 ? nullptr : seconds + i);
        const Division division = divide(each, frame.images, threads);
        const bool goes_on = division.by == since && (since == By::nothing || (since == By::rows && each.joins));
        if (!goes_on && i > begin && !barrier.wait(last - first)) return;
        since = division.by;
        for (int64_t member = first; member < last; ++member) run_part(frame, each, division, member);
      }
    } catch (...) {
      barrier.give_up();
      throw;
    }
  });
}

int64_t Program::most_images() const { return kMostBytes / (1 + std::max(plan_.local + plan_.shared, plan_.divided)); }

void Program::run(const Outside* inputs, const Outside* outputs, int64_t images, const Parallel& parallel,
                  double* seconds) const {
  if (images == 0) return;
  const int64_t threads = parallel.threads;
  const auto memory = [&](Scratch of, int64_t bytes) { return scratch(of, bytes + slack_); };
  // A few images that threads can not share evenly are divided within each step.
  if (images < threads || (images % threads != 0 && images < 4 * threads)) {
    char* local = memory(Scratch::arena, plan_.divided * images);
    const int end = static_cast<int>(plan_.instructions.size());
    return run_together({inputs, outputs, local, nullptr, 0, images, images, images, true}, 0, end, parallel, seconds);
  }
  char* shared = plan_.shared > 0 ? memory(Scratch::shared, plan_.shared * images) : nullptr;
  const int64_t of_cache = limits_.cache / std::max<int64_t>(1, plan_.local);
  int64_t block = std::min(std::max(of_cache, least_block_), images);
  const int64_t rounds = ceil_div(images, threads * block);
  block = ceil_div(images, threads * rounds);
  for (const Stage& stage : plan_.stages) {
    if (stage.wide) {
      run_together({inputs, outputs, nullptr, shared, 0, images, images, images, false}, stage.begin, stage.end,
                   parallel, seconds);
      continue;
    }
    parallel_for(parallel, ceil_div(images, block), 1, [&](int64_t begin, int64_t end) {
      char* local = memory(Scratch::arena, plan_.local * block);
      std::vector<double> of_thread(seconds == nullptr ? 0 : plan_.instructions.size());
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * block, count = std::min(images - first, block);
        run_all({inputs, outputs, local, shared, first, count, images, block, false}, stage.begin, stage.end,
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
