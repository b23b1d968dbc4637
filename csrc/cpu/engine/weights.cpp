#include "cpu/engine/weights.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace bqnn::engine {
namespace {

constexpr int64_t kPadding = kSlack / 2;  // numbers that kernels may read beyond the last channel

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

// How many pixels of y are computed best as one. A position takes a product for each lane of K and vector of channels,
// and about as long as four to become an output.
int64_t pixels_to_fold(const Conv& conv, const Shape& y, int64_t lanes) {
  const Window& w = conv.window;
  if (conv.groups > 1 || w.stride_w > 1 || w.dilation_w > 1 || y.channels >= lanes) return 1;
  const auto cost = [&](int64_t fold) {
    const int64_t products = w.kernel_h * ceil_div(conv.inputs * (w.kernel_w + fold - 1), conv.integers ? 4 : 1) + 4;
    return products * ceil_div(fold * y.channels, lanes) * (y.width / fold);
  };
  int64_t best = 1;
  for (int64_t fold = 2; fold * y.channels <= 2 * lanes; ++fold)
    if (y.width % fold == 0 && cost(fold) <= cost(best)) best = fold;
  return best;
}

template <class Number>
void repeat(std::vector<Number>* numbers, int64_t times) {
  const size_t count = numbers->size();
  for (int64_t i = 1; i < times; ++i)
    for (size_t c = 0; c < count; ++c) numbers->push_back((*numbers)[c]);
}

// Whether tiles multiply a convolution sooner than vectors: a tile takes a cycle a row for each of its products, filled
// or not, and a vector half a cycle for each lane of K.
bool tiles_pay(const Conv& conv, const Shape& y) {
  const bool in_rows = !conv.gathered && y.height * y.width > 1;
  const int64_t rows = in_rows ? y.height * ceil_div(y.width, kTileRows) * kTileRows : y.height * y.width;
  const int64_t lanes = conv.gathered ? conv.segments * conv.lanes : conv.lanes;
  return 2 * rows * ceil_div(lanes, kTileLanes) <= y.height * y.width * lanes;
}

// Whether short segments are better copied: several of them fill a tile, and a tile that may be loaded at once.
bool gathering_pays(const Conv& conv) {
  return conv.segments > 1 && conv.lanes <= kTileLanes / 2 &&
         ceil_div(conv.segments * conv.lanes, kTileLanes) < conv.segments;
}

// Whether minimal filtering has the sums of a convolution: of integers, those of 26 bits.
bool filtering_fits(const Conv& conv, const Channels& channels) {
  const Window& w = conv.window;
  const bool shape = w.kernel_h == 3 && w.kernel_w == 3 && w.stride_h == 1 && w.stride_w == 1 && w.dilation_h == 1 &&
                     w.dilation_w == 1 && conv.fold == 1;
  if (!shape || conv.depthwise || conv.tiled) return false;
  if (!conv.integers) return true;
  return conv.inputs % 4 == 0 && *std::max_element(channels.most.begin(), channels.most.end()) < 1 << 25;
}

}  // namespace

char* Weights::keep(int64_t bytes) {
  void* memory = std::aligned_alloc(64, static_cast<size_t>((bytes + kSlack + 63) / 64 * 64));
  if (memory == nullptr) throw std::bad_alloc();
  memory_.emplace_back(static_cast<char*>(memory), &std::free);
  return static_cast<char*>(memory);
}

// Numbers a channel, and zeros beyond.
template <class Number>
const Number* Weights::keep_numbers(const std::vector<Number>& numbers) {
  char* memory = keep(static_cast<int64_t>((numbers.size() + kPadding) * sizeof(Number)));
  std::memset(memory, 0, (numbers.size() + kPadding) * sizeof(Number));
  std::memcpy(memory, numbers.data(), numbers.size() * sizeof(Number));
  return reinterpret_cast<const Number*>(memory);
}

int64_t count_weights(const Graph& graph, const Step& step) {
  const Shape &x = graph.values[step.inputs[0]].shape, &y = graph.values[step.output].shape;
  const Window& w = step.window;
  if (step.op == Op::linear) return y.channels * x.count();
  return step.op == Op::conv2d ? y.channels * (x.channels / step.groups * w.kernel_h * w.kernel_w) : 0;
}

Conv Weights::prepare(const Step& step, const Buffer& buffer, bool dense, bool keep_panels) {
  const Value& y = graph_.values[step.output];
  Conv conv{};
  switch (step.op) {
    case Op::conv2d:
    case Op::linear:
    case Op::affine:
    case Op::activation:
    case Op::add:
    case Op::sub:
    case Op::mul: break;
    default: return conv;
  }
  Channels channels;
  const auto count = static_cast<size_t>(y.shape.channels);
  channels.scale.assign(count, 1.0f), channels.bias.assign(count, 0.0f);
  if (step.weight.scale != nullptr) std::copy_n(step.weight.scale, count, channels.scale.begin());
  if (step.weight.bias != nullptr) std::copy_n(step.weight.bias, count, channels.bias.begin());
  const bool product = step.op == Op::conv2d || step.op == Op::linear;
  if (product) prepare_product(step, buffer, dense, keep_panels, &conv, &channels);
  conv.bytes = fold_bytes(graph_, step, &channels);
  repeat(&channels.scale, conv.fold), repeat(&channels.bias, conv.fold), repeat(&channels.shift, conv.fold);
  conv.scale = keep_numbers(channels.scale), conv.bias = keep_numbers(channels.bias);
  if (product) conv.shift = keep_numbers(channels.shift);
  return conv;
}

void Weights::prepare_product(const Step& step, const Buffer& buffer, bool dense_y, bool keep_panels, Conv* of,
                              Channels* channels) {
  const Value &x = graph_.values[step.inputs[0]], &y = graph_.values[step.output];
  Conv& conv = *of;
  conv.window = step.window;
  if (step.op == Op::linear) {
    conv.window = Window{};
    conv.window.kernel_h = x.shape.height, conv.window.kernel_w = x.shape.width;
    if (buffer.row() == x.shape.width * buffer.pixel)  // rows follow each other, and are one
      conv.window.kernel_h = 1, conv.window.kernel_w = x.shape.height * x.shape.width;
  }
  conv.activation = step.activation;
  conv.groups = step.groups;
  conv.inputs = x.shape.channels / step.groups;
  conv.group_channels = y.shape.channels / step.groups;
  conv.integers = x.dtype == Dtype::uint8;
  conv.depthwise = is_depthwise(graph_, step);
  if (dense_y && conv.inputs == buffer.pixel) conv.fold = pixels_to_fold(conv, y.shape, kernels_.lanes);
  Window& w = conv.window;
  if (conv.fold > 1) w.kernel_w += conv.fold - 1, w.stride_w = conv.fold, conv.group_channels *= conv.fold;
  // Pixels of a row follow each other in memory where nothing lies between them; but where the channels of one fill
  // tiles, those of the next are a segment of their own.
  const bool whole = kernels_.tiled_conv2d != nullptr && conv.integers && conv.inputs % (4 * kTileLanes) == 0;
  const bool dense = conv.inputs == buffer.pixel && w.dilation_w == 1 && !(whole && step.op == Op::conv2d);
  conv.segments = dense || w.kernel_w == 1 ? w.kernel_h : w.kernel_h * w.kernel_w;
  conv.segment = conv.inputs * w.kernel_h * w.kernel_w / conv.segments;
  conv.lanes = conv.integers ? ceil_div(conv.segment, 4) : conv.segment;
  const bool tiles = kernels_.tiled_conv2d != nullptr && conv.integers && !conv.depthwise;
  conv.gathered = tiles && gathering_pays(conv);
  conv.tiled = tiles && tiles_pay(conv, {conv.group_channels, y.shape.height, y.shape.width / conv.fold});
  conv.gathered = conv.gathered && conv.tiled;
  if (conv.tiled && !conv.gathered) conv.lanes = ceil_div(conv.lanes, kTileLanes) * kTileLanes;
  keep_weight(step, &conv, channels);
  conv.filtered = filtering_fits(conv, *channels);
  if (!conv.depthwise && (keep_panels || conv.layout == nullptr)) this->keep_panels(&conv);
}

// The weight in the order that its kernel reads: taps, a layout, or numbers of which panels are made.
void Weights::keep_weight(const Step& step, Conv* conv, Channels* of_channels) {
  const Weight& weight = step.weight;
  const Window& w = conv->window;
  const int64_t kernel_w = w.kernel_w - (conv->fold - 1);  // of the step itself
  const int64_t channels = conv->channels() / conv->fold, taps = w.kernel_h * kernel_w, columns = conv->inputs * taps;
  of_channels->shift.assign(static_cast<size_t>(channels), 0);
  of_channels->most.assign(static_cast<size_t>(channels), 0.0);
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
          number = conv->integers ? static_cast<float>(weight.integers[book + codes[k]])
                                  : weight.levels[book + codes[k]];
        else
          number = conv->integers ? static_cast<float>(weight.integer_numbers[n * columns + k])
                                  : weight.numbers[n * columns + k];
        f(n, k, number);
      }
    }
  };
  if (conv->integers) {
    std::vector<double> least(static_cast<size_t>(channels), 0.0);
    each([&](int64_t n, int64_t, float number) {
      of_channels->shift[n] += zero * static_cast<int32_t>(number);
      (number > 0.0f ? of_channels->most : least)[n] += 255.0 * std::abs(number);
      conv->most_integer = std::max(conv->most_integer, std::abs(static_cast<int>(number)));
    });
    for (size_t n = 0; n < least.size(); ++n) of_channels->most[n] = std::max(of_channels->most[n], least[n]);
  }

  if (conv->depthwise) {
    const int64_t padded = channels + kPadding;
    const int64_t bytes = (conv->integers ? ceil_div(taps, 4) : taps) * padded * 4;
    auto* memory = keep(bytes);
    std::memset(memory, 0, static_cast<size_t>(bytes));
    each([&](int64_t n, int64_t tap, float number) {
      if (conv->integers)
        reinterpret_cast<int8_t*>(memory)[(tap / 4 * padded + n) * 4 + tap % 4] = static_cast<int8_t>(number);
      else
        reinterpret_cast<float*>(memory)[tap * padded + n] = number;
    });
    conv->taps = conv->integers ? nullptr : reinterpret_cast<const float*>(memory);
    conv->integer_taps = conv->integers ? reinterpret_cast<const int8_t*>(memory) : nullptr;
    return;
  }
  if (weight.codes == nullptr || conv->fold > 1) {
    const int64_t wide = conv->inputs * w.kernel_h * w.kernel_w, bytes = conv->channels() * wide * 4;
    auto* numbers = keep(bytes);
    std::memset(numbers, 0, static_cast<size_t>(bytes));
    each([&](int64_t n, int64_t k, float number) {
      const int64_t row = k % taps / kernel_w, column = k % taps % kernel_w;
      for (int64_t pixel = 0; pixel < conv->fold; ++pixel) {
        const int64_t tap = row * w.kernel_w + column + pixel;
        const int64_t at = (pixel * channels + n) * wide + tap * conv->inputs + k / taps;
        if (conv->integers)
          reinterpret_cast<int8_t*>(numbers)[at] = static_cast<int8_t>(number);
        else
          reinterpret_cast<float*>(numbers)[at] = number;
      }
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

void Weights::keep_panels(Conv* conv) {
  const int64_t strips = ceil_div(conv->group_channels, kernels_.strip), words = kernels_.panel_words(*conv);
  auto* panels = reinterpret_cast<uint32_t*>(keep(conv->groups * strips * words * 4));
  for (int64_t i = 0; i < conv->groups * strips; ++i)
    kernels_.make_panel(*conv, i / strips, i % strips, panels + i * words);
  conv->panels = panels;
  // What they were made of is not needed any more; it was kept last.
  memory_.erase(memory_.end() - 2);
  conv->layout = nullptr, conv->numbers = nullptr, conv->integer_numbers = nullptr;
}

}  // namespace bqnn::engine
