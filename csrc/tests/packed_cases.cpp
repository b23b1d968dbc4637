// Draws packed layers and compares every instruction set of this machine with a plain loop in double.
//
// "int8" has to have the bits of the rule in bqnn/ops/_int8.py. "fp32" and "bf16" may be off, in each output, by
// kTolerance times the sum of the magnitudes it is made of, and as a whole by kTolerance times its norm; outputs that
// are one weight have to be exact. NaN and infinity have to be in the outputs whose operands hold them, and in no
// other. The number of threads must not change a bit.
#include <cfloat>

#include "cases.h"
#include "cpu/packed/call.h"

namespace bqnn::cases {
namespace {

constexpr double kTolerance = 1e-5;
constexpr int64_t kMostProducts = 600'000;  // of a case

// The largest error of each instruction set in float outputs, as a share of the bound.
double worst[kIsas];

// --- bfloat16 -----------------------------------------------------------------------------------------------------

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float widen(Bf16 half) { return from_bits(static_cast<uint32_t>(half) << 16); }

// To the nearest, ties to even.
Bf16 to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if (std::isnan(value)) return static_cast<Bf16>(bits >> 16 | 0x40);
  return static_cast<Bf16>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// --- a case -------------------------------------------------------------------------------------------------------

enum class Activations { normal, uneven, one_hot, special, denormal, tiny, huge, largest, zero };
constexpr const char* kActivations[] = {"normal",   "uneven", "one-hot", "NaN and infinity", "denormal",
                                        "tiny",     "huge",   "largest", "zero"};
constexpr const char* kPrecisions[] = {"fp32", "bf16", "int8"};

struct Pair {
  int h, w;
};

struct Case {
  bool conv, channels_last, half, per_channel, bias, relu;
  Precision precision;
  Activations activations;
  int num_levels, threads;
  int64_t images, inputs, outputs, groups;  // inputs and outputs of a group; a linear layer is one pixel in one group
  int64_t height, width, out_height, out_width;
  Pair kernel, stride, padding, dilation;

  int64_t channels() const { return outputs * groups; }
  int64_t columns() const { return inputs * kernel.h * kernel.w; }
  int64_t pixels() const { return out_height * out_width; }
  int64_t products() const { return images * pixels() * channels() * columns(); }

  // Where an element stands in memory.
  int64_t x_at(int64_t image, int64_t channel, int64_t h, int64_t w) const {
    const int64_t all = inputs * groups;
    return channels_last ? ((image * height + h) * width + w) * all + channel
                         : ((image * all + channel) * height + h) * width + w;
  }
  int64_t y_at(int64_t image, int64_t channel, int64_t h, int64_t w) const {
    return channels_last ? ((image * out_height + h) * out_width + w) * channels() + channel
                         : ((image * channels() + channel) * out_height + h) * out_width + w;
  }

  std::string text() const {
    char shape[160], rest[160];
    if (conv) {
      std::snprintf(shape, sizeof shape, "conv B%d C%d N%d g%d %dx%d k%d,%d s%d,%d p%d,%d d%d,%d%s",
                    static_cast<int>(images), static_cast<int>(inputs * groups), static_cast<int>(channels()),
                    static_cast<int>(groups), static_cast<int>(height), static_cast<int>(width), kernel.h, kernel.w,
                    stride.h, stride.w, padding.h, padding.w, dilation.h, dilation.w,
                    channels_last ? " channels-last" : "");
    } else {
      std::snprintf(shape, sizeof shape, "linear B%d N%d K%d", static_cast<int>(images), static_cast<int>(outputs),
                    static_cast<int>(inputs));
    }
    std::snprintf(rest, sizeof rest, " M%d %s %s %s, %s activations%s%s, %d threads", num_levels,
                  per_channel ? "channel" : "tensor", kPrecisions[static_cast<int>(precision)],
                  half ? "bfloat16" : "float", kActivations[static_cast<int>(activations)], bias ? ", bias" : "",
                  relu ? ", ReLU" : "", threads);
    return std::string(shape) + rest;
  }
};

void draw_linear(Random* random, Case* c) {
  c->images = random->chance(4) ? 0 : random->size(70);
  c->outputs = random->size(300);
  c->inputs = random->size(300);
  if (random->chance(6)) c->inputs = random->between(301, 1500), c->images = std::min<int64_t>(c->images, 40);
  if (random->chance(2)) {
    c->images = random->between(71, 1100), c->inputs = random->size(40), c->outputs = random->size(20);
  }
  c->groups = c->height = c->width = c->out_height = c->out_width = 1;
  c->kernel = c->stride = c->dilation = {1, 1};
  c->padding = {0, 0};
  c->channels_last = false;
  while (c->products() > kMostProducts) (c->images > 3 ? c->images : c->outputs) /= 2;
}

void draw_conv(Random* random, Case* c) {
  const auto pair = [&](int low, int high, int usual_percent, int usual) {
    if (random->chance(usual_percent)) return Pair{usual, usual};
    return Pair{static_cast<int>(random->between(low, high)), static_cast<int>(random->between(low, high))};
  };
  c->images = random->chance(4) ? 0 : random->chance(10) ? random->size(70) : random->between(1, 5);
  c->groups = random->chance(70) ? 1 : random->between(2, 5);
  const bool depthwise = random->chance(6);
  if (depthwise) c->groups = random->size(70);
  c->inputs = depthwise ? 1 : random->size(c->groups == 1 ? 140 : 40);
  c->outputs = depthwise ? random->between(1, 2) : random->size(c->groups == 1 ? 140 : 40);
  if (random->chance(8)) {
    c->groups = random->between(1, 2), c->inputs = random->size(20), c->outputs = random->between(113, 300);
  }
  c->kernel = random->chance(25) ? Pair{1, 1} : pair(1, 5, 30, 3);
  c->stride = pair(1, 3, 60, 1);
  c->dilation = pair(1, 3, 70, 1);
  c->padding = pair(0, 3, 40, 0);
  c->channels_last = random->chance(50);
  const Pair reach = {c->dilation.h * (c->kernel.h - 1) + 1, c->dilation.w * (c->kernel.w - 1) + 1};
  c->height = std::max<int64_t>(random->size(34), reach.h - 2 * c->padding.h);
  c->width = std::max<int64_t>(random->size(34), reach.w - 2 * c->padding.w);
  const auto set_output = [&] {
    c->out_height = (c->height + 2 * c->padding.h - reach.h) / c->stride.h + 1;
    c->out_width = (c->width + 2 * c->padding.w - reach.w) / c->stride.w + 1;
  };
  for (set_output(); c->products() > kMostProducts; set_output()) {
    if (c->images > 2) {
      c->images /= 2;
    } else if (c->height > 2 * reach.h) {
      c->height /= 2;
    } else if (c->width > 2 * reach.w) {
      c->width /= 2;
    } else if (c->outputs >= c->inputs && c->outputs > 1) {
      c->outputs /= 2;
    } else if (c->inputs > 1) {
      c->inputs /= 2;
    } else {
      c->groups = (c->groups + 1) / 2;
    }
  }
}

Case draw_case(Random* random) {
  Case c{};
  c.conv = random->chance(50);
  if (c.conv) {
    draw_conv(random, &c);
  } else {
    draw_linear(random, &c);
  }
  c.precision = static_cast<Precision>(random->between(0, 2));
  c.half = random->chance(30);
  c.per_channel = random->chance(40);
  c.bias = random->chance(60);
  c.num_levels = static_cast<int>(random->chance(50) ? random->between(2, 5) : random->between(2, 16));
  c.threads = static_cast<int>(random->between(1, 3));
  constexpr Activations kUsual[] = {Activations::normal, Activations::uneven, Activations::one_hot};
  constexpr Activations kRest[] = {Activations::special, Activations::denormal, Activations::tiny,
                                   Activations::huge,    Activations::largest,  Activations::zero};
  c.activations = random->chance(60) ? Activations::normal
                                     : random->chance(50) ? random->one_of(kUsual) : random->one_of(kRest);
  c.relu = random->chance(30);
  return c;
}

// --- its operands -------------------------------------------------------------------------------------------------

struct Operands {
  std::vector<float> x;         // as the kernel reads it, after rounding to bfloat16 where it is that
  std::vector<float> levels;    // [codebooks, M]
  std::vector<int8_t> int8_levels;
  std::vector<float> int8_scale;
  std::vector<uint8_t> codes;   // [channels, columns], a byte each
  std::vector<float> bias;

  int64_t codebook(const Case& c, int64_t channel) const { return c.per_channel ? channel : 0; }
  uint8_t code(const Case& c, int64_t channel, int64_t k) const { return codes[channel * c.columns() + k]; }
};

void fill_activations(Random* random, const Case& c, std::vector<float>* x) {
  const int64_t a_image = c.inputs * c.groups * c.height * c.width;
  for (int64_t image = 0; image < c.images; ++image) {
    float* row = x->data() + image * a_image;
    const double size = c.activations == Activations::denormal ? 1e-40
                        : c.activations == Activations::tiny   ? std::pow(2.0, -random->between(60, 120))
                        : c.activations == Activations::huge   ? std::pow(2.0, random->between(60, 125))
                        : c.activations == Activations::uneven ? std::pow(2.0, random->between(-40, 40))
                                                               : 1.0;
    const float all = random->chance(50) ? 1.0f : FLT_MAX;
    for (int64_t i = 0; i < a_image; ++i) {
      row[i] = static_cast<float>(size * random->normal());
      if (c.activations == Activations::uneven && random->chance(50)) row[i] = 0.0f;
      if (c.activations == Activations::largest) row[i] = random->chance(90) ? all : -all;
      if (c.activations == Activations::one_hot || c.activations == Activations::zero) row[i] = 0.0f;
    }
    if (c.activations == Activations::one_hot) row[random->between(0, a_image - 1)] = 1.0f;
  }
  if (c.activations == Activations::special && !x->empty()) {
    constexpr float kSpecial[] = {NAN, -NAN, INFINITY, -INFINITY, 3.4e38f, FLT_MAX, 1e-45f};
    for (int64_t i = random->between(1, 4); i > 0; --i) {
      (*x)[random->between(0, static_cast<int64_t>(x->size()) - 1)] = random->one_of(kSpecial);
    }
  }
  if (c.half) {
    for (float& value : *x) value = widen(to_bf16(value));
  }
}

void fill_levels(Random* random, const Case& c, Operands* o) {
  const int64_t codebooks = c.per_channel ? c.channels() : 1;
  const double size = random->one_of({1.0, 1.0, 0.05, 30.0});
  const bool ends = random->chance(10);  // all integers are 127 or -127
  for (int64_t g = 0; g < codebooks; ++g) {
    std::vector<float> levels(c.num_levels);
    double level = random->normal() - 0.3 * c.num_levels;
    for (float& value : levels) value = static_cast<float>(size * (level += 0.05 + random->uniform()));
    if (random->chance(30)) {
      const float zero = levels[random->between(0, c.num_levels - 1)];  // a shift, so that one is 0 and all increase
      for (float& value : levels) value -= zero;
    }
    float largest = 0.0f;
    for (const float value : levels) largest = std::max(largest, std::fabs(value));
    const float scale = largest / 127.0f;
    for (const float value : levels) {
      const double rounded = std::nearbyint(static_cast<double>(value) / scale);
      o->int8_levels.push_back(static_cast<int8_t>(ends ? (value > 0 ? 127 : -127) : rounded));
    }
    o->int8_scale.push_back(scale);
    o->levels.insert(o->levels.end(), levels.begin(), levels.end());
  }
}

Operands draw_operands(Random* random, const Case& c) {
  Operands o;
  o.x.resize(c.images * c.inputs * c.groups * c.height * c.width);
  fill_activations(random, c, &o.x);
  fill_levels(random, c, &o);
  o.codes.resize(c.channels() * c.columns());
  const bool last_only = random->chance(5);
  for (uint8_t& code : o.codes) {
    code = static_cast<uint8_t>(last_only ? c.num_levels - 1 : random->between(0, c.num_levels - 1));
  }
  for (int64_t n = 0; c.bias && n < c.channels(); ++n) o.bias.push_back(static_cast<float>(random->normal()));
  return o;
}

// --- the plain loops ----------------------------------------------------------------------------------------------

// What y has to be, in the order of y: the value, for "fp32" and "bf16" the sum of its terms' magnitudes as well.
struct Expected {
  std::vector<double> value, magnitude;
};

// The integers of an image's activations and their scale, as bqnn/ops/_int8.py has it.
float quantize(const float* x, int64_t count, std::vector<double>* q) {
  float largest = 0.0f;
  q->assign(count, 0.0);
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(x[i])) return NAN;
    largest = std::max(largest, std::fabs(x[i]));
  }
  if (largest == 0.0f) return 0.0f;
  const float lift = largest < 0x1p-64f ? 0x1p64f : 1.0f;
  const float factor = 127.0f / (largest * lift);
  for (int64_t i = 0; i < count; ++i) {
    (*q)[i] = std::clamp(std::nearbyintf(x[i] * lift * factor), -127.0f, 127.0f);
  }
  return largest / 127.0f;
}

// Adds the products of one patch with the weights [columns][outputs] of a group to its outputs.
[[gnu::noinline, gnu::no_sanitize("address", "undefined")]] void add_products(const Case& c, const double* patch,
                                                                              const double* weight, double* value,
                                                                              double* magnitude) {
  const int64_t columns = c.columns(), outputs = c.outputs;
  for (int64_t k = 0; k < columns; ++k) {
    const double x = patch[k], x_size = std::isfinite(x) ? std::fabs(x) : 0.0;
    for (int64_t n = 0; n < outputs; ++n) value[n] += x * weight[k * outputs + n];
    for (int64_t n = 0; n < outputs; ++n) magnitude[n] += x_size * std::fabs(weight[k * outputs + n]);
  }
}

Expected expect(const Case& c, const Operands& o) {
  const bool int8 = c.precision == Precision::int8, bf16 = c.precision == Precision::bf16;
  const int64_t columns = c.columns(), a_image = c.inputs * c.groups * c.height * c.width;
  std::vector<double> weight(c.channels() * columns);  // [groups][columns][outputs]
  for (int64_t n = 0; n < c.channels(); ++n) {
    for (int64_t k = 0; k < columns; ++k) {
      const int64_t level = o.codebook(c, n) * c.num_levels + o.code(c, n, k);
      const double value = int8 ? o.int8_levels[level] : bf16 ? widen(to_bf16(o.levels[level])) : o.levels[level];
      weight[(n / c.outputs * columns + k) * c.outputs + n % c.outputs] = value;
    }
  }
  Expected expected;
  expected.value.resize(c.images * c.channels() * c.pixels());
  expected.magnitude = expected.value;
  std::vector<double> x(a_image), patch(columns), value(c.outputs), magnitude(c.outputs);
  for (int64_t image = 0; image < c.images; ++image) {
    const float* from = o.x.data() + image * a_image;
    const float row_scale = int8 ? quantize(from, a_image, &x) : 1.0f;
    for (int64_t i = 0; !int8 && i < a_image; ++i) x[i] = bf16 ? widen(to_bf16(from[i])) : from[i];
    for (int64_t group = 0; group < c.groups; ++group) {
      for (int64_t pixel = 0; pixel < c.pixels(); ++pixel) {
        const int64_t out_h = pixel / c.out_width, out_w = pixel % c.out_width;
        for (int64_t k = 0; k < columns; ++k) {
          const int64_t tap = k % (c.kernel.h * c.kernel.w), input = k / (c.kernel.h * c.kernel.w);
          const int64_t h = out_h * c.stride.h - c.padding.h + tap / c.kernel.w * c.dilation.h;
          const int64_t w = out_w * c.stride.w - c.padding.w + tap % c.kernel.w * c.dilation.w;
          const bool inside = h >= 0 && h < c.height && w >= 0 && w < c.width;
          patch[k] = inside ? x[c.x_at(0, group * c.inputs + input, h, w)] : 0.0;
        }
        std::fill(value.begin(), value.end(), 0.0);
        std::fill(magnitude.begin(), magnitude.end(), 0.0);
        add_products(c, patch.data(), weight.data() + group * columns * c.outputs, value.data(), magnitude.data());
        for (int64_t i = 0; i < c.outputs; ++i) {
          const int64_t n = group * c.outputs + i, at = c.y_at(image, n, out_h, out_w);
          if (int8) {
            float y = static_cast<float>(value[i]) * o.int8_scale[o.codebook(c, n)];
            y *= row_scale;
            if (c.bias) y += o.bias[n];
            expected.value[at] = y;
          } else {
            expected.value[at] = value[i] + (c.bias ? o.bias[n] : 0.0);
            expected.magnitude[at] = magnitude[i] + (c.bias ? std::fabs(o.bias[n]) : 0.0);
          }
          if (c.relu && expected.value[at] < 0.0) expected.value[at] = 0.0;
        }
      }
    }
  }
  return expected;
}

// --- comparing ----------------------------------------------------------------------------------------------------

// How far `y` may be from the value, or a negative number where sums in float may overflow and anything is right.
double allowed(const Case& c, double value, double magnitude) {
  if (magnitude > FLT_MAX / 4) return -1.0;
  // Tiles take denormal numbers for zero: operands, their three parts, and products.
  const double flushed = 16.0 * FLT_MIN * (static_cast<double>(c.columns()) * 100.0 + 1.0);
  const double bound = kTolerance * magnitude + flushed;
  return c.half ? bound + 0x1.02p-8 * (std::fabs(value) + bound) : bound;
}

// What is wrong with y, or nothing.
std::string compare(const Case& c, const Expected& expected, const std::vector<float>& y, Isa isa) {
  const bool int8 = c.precision == Precision::int8, exact = int8 || (c.activations == Activations::one_hot && !c.bias);
  double squares = 0.0, error_squares = 0.0;
  for (size_t i = 0; i < y.size(); ++i) {
    const double value = expected.value[i], bound = allowed(c, value, expected.magnitude[i]);
    bool right;
    if (std::isnan(value)) {
      right = std::isnan(y[i]);
    } else if (exact) {
      const float rounded = static_cast<float>(value);
      const float exactly = c.half ? widen(to_bf16(rounded)) : rounded;
      right = int8 ? bits_of(y[i]) == bits_of(exactly) : y[i] == exactly;
    } else if (std::isinf(value)) {
      right = y[i] == value || (bound < 0.0 && !std::isfinite(y[i]));
    } else if (bound < 0.0) {
      right = true;
    } else {
      const double error = std::fabs(y[i] - value);
      right = error <= bound;  // false for NaN
      if (right && !c.half) worst[static_cast<int>(isa)] = std::max(worst[static_cast<int>(isa)], error / bound);
      squares += value * value, error_squares += error * error;
    }
    if (c.relu && y[i] < 0.0f) right = false;
    if (!right) {
      char text[200];
      std::snprintf(text, sizeof text, "y[%zu] of %zu is %.9g, expected %.9g, may be off by %.3g", i, y.size(),
                    static_cast<double>(y[i]), value, exact ? 0.0 : bound);
      return text;
    }
  }
  // Few outputs may all be sums that cancel; many do not.
  const bool judge_norm = !exact && !c.half && y.size() >= 64 && c.activations == Activations::normal;
  if (judge_norm && std::sqrt(error_squares) > kTolerance * std::sqrt(squares)) {
    char text[100];
    std::snprintf(text, sizeof text, "the norm of the error is %.3g of the output's",
                  std::sqrt(error_squares / squares));
    return text;
  }
  return "";
}

// --- running ------------------------------------------------------------------------------------------------------

// Base-M digits, the first the least significant, each channel padded to a whole byte.
std::vector<uint8_t> pack(const Case& c, const Operands& o) {
  int digits = 1;
  for (int values = c.num_levels; values * c.num_levels <= 256; values *= c.num_levels) ++digits;
  const int64_t columns = c.columns(), width = (columns + digits - 1) / digits;
  std::vector<uint8_t> packed(c.channels() * width);
  for (int64_t i = 0; i < c.channels() * width; ++i) {
    const int64_t channel = i / width, first = i % width * digits;
    int byte = 0;
    for (int64_t k = std::min(first + digits, columns) - 1; k >= first; --k) {
      byte = byte * c.num_levels + o.code(c, channel, k);
    }
    packed[i] = static_cast<uint8_t>(byte);
  }
  return packed;
}

PackedWeight weight_of(const Case& c, const Operands& o, const uint8_t* codes) {
  const bool int8 = c.precision == Precision::int8;
  return {codes,
          o.levels.data(),
          int8 ? o.int8_levels.data() : nullptr,
          int8 ? o.int8_scale.data() : nullptr,
          c.channels(),
          c.columns(),
          c.groups,
          c.num_levels,
          static_cast<int>(o.int8_scale.size()),
          c.kernel.h,
          c.kernel.w,
          c.dilation.w,
          c.precision,
          true};
}

template <class T>
void call_kernel(const Case& c, Isa isa, const PackedLayout* layout, const T* x, const float* bias, T* y, int threads) {
  const PackedKernels& kernels = packed_kernels(isa);
  if (c.conv) {
    kernels.conv2d({layout, x, y, bias, c.images, c.height, c.width, c.out_height, c.out_width, c.stride.h,
                    c.stride.w, c.padding.h, c.padding.w, c.dilation.h, c.channels_last, c.half, c.relu},
                   std_threads(threads));
  } else {
    kernels.linear({layout, x, y, bias, c.images, c.half, c.relu}, std_threads(threads));
  }
}

float as_float(float value) { return value; }
float as_float(Bf16 value) { return widen(value); }

// T: float, or Bf16 where the case is `half`.
template <class T>
std::string run_on(const Case& c, const Operands& o) {
  const std::vector<uint8_t> codes = pack(c, o);
  const PackedWeight weight = weight_of(c, o, codes.data());
  const Buffer<unsigned char> memory(static_cast<int64_t>(layout_bytes(weight)));
  make_layout(weight, memory.data());
  const PackedLayout* layout = view_layout(memory.data(), layout_bytes(weight));
  if (layout == nullptr) return "make_layout made no layout";
  const Expected expected = expect(c, o);
  const Buffer<T> x(static_cast<int64_t>(o.x.size()));
  for (int64_t i = 0; i < x.size(); ++i) {
    if constexpr (sizeof(T) == sizeof(float)) {
      x[i] = o.x[i];
    } else {
      x[i] = to_bf16(o.x[i]);
    }
  }
  const Buffer<float> bias(static_cast<int64_t>(o.bias.size()));
  std::copy(o.bias.begin(), o.bias.end(), bias.data());
  for (const Isa isa : isas()) {
    const std::string name = std::string(isa_name(isa)) + ": ";
    const int64_t count = static_cast<int64_t>(expected.value.size());
    const Buffer<T> y(count), threaded(count);
    call_kernel(c, isa, layout, x.data(), bias.data(), y.data(), 1);
    std::vector<float> found(count);
    for (int64_t i = 0; i < count; ++i) found[i] = as_float(y[i]);
    const std::string wrong = compare(c, expected, found, isa);
    if (!wrong.empty()) return name + wrong;
    if (c.threads > 1) {
      call_kernel(c, isa, layout, x.data(), bias.data(), threaded.data(), c.threads);
      if (!threaded.equals(y)) return name + "another result with " + std::to_string(c.threads) + " threads";
    }
    if (!y.intact() || !threaded.intact()) return name + "wrote before y";
  }
  return "";
}

std::string run_case(uint64_t seed, uint64_t number) {
  Random random(seed, number);
  const Case c = draw_case(&random);
  const Operands o = draw_operands(&random, c);
  const std::string wrong = c.half ? run_on<Bf16>(c, o) : run_on<float>(c, o);
  return wrong.empty() ? wrong : c.text() + ": " + wrong;
}

std::string closing() {
  std::string text = "; largest error as a share of the bound:";
  for (const Isa isa : isas()) {
    char number[40];
    std::snprintf(number, sizeof number, " %s %.3f", isa_name(isa), worst[static_cast<int>(isa)]);
    text += number;
  }
  return text;
}

}  // namespace
}  // namespace bqnn::cases

int main(int argc, char** argv) {
  return bqnn::cases::run_cases(argc, argv, 6000, bqnn::cases::run_case, bqnn::cases::closing);
}
