// What the program of packed cases draws: a layer, where its activations and outputs lie in memory, and its operands.
#pragma once

#include <cfloat>

#include "cases.h"
#include "cpu/packed/call.h"

namespace bqnn::cases {

constexpr int64_t kMostProducts = 600'000;  // products of a drawn case at most

// --- bfloat16 -----------------------------------------------------------------------------------------------------

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(Bfloat16 value) { return from_bits(static_cast<uint32_t>(value) << 16); }

// To the nearest, ties to even.
inline Bfloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if (std::isnan(value)) return static_cast<Bfloat16>(bits >> 16 | 0x40);
  return static_cast<Bfloat16>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// --- a case -------------------------------------------------------------------------------------------------------

enum class Activations { normal, uneven, one_hot, special, denormal, tiny, huge, largest, zero };
constexpr const char* kActivations[] = {"normal",   "uneven", "one-hot", "NaN and infinity", "denormal",
                                        "tiny",     "huge",   "largest", "zero"};
constexpr const char* kPrecisions[] = {"fp32", "bf16", "int8"};

struct Pair {
  int h, w;
};

// Where images of so many channels of `height` x `width` pixels lie: in a tensor that has more channels, before and
// after them.
struct Place {
  bool bfloat16, channels_last;
  int64_t before, after;

  int64_t all(int64_t channels) const { return before + channels + after; }
  View view(void* data, int64_t channels, int64_t pixels) const {
    return {data,
            bfloat16 ? Dtype::bfloat16 : Dtype::float32,
            channels_last ? Format::channels_last : Format::contiguous,
            all(channels) * pixels,
            all(channels),
            channels_last ? before : before * pixels};
  }
  // Of element `i`, counted through [images, channels, pixels].
  int64_t at(int64_t i, int64_t channels, int64_t pixels) const {
    const int64_t pixel = i % pixels, channel = before + i / pixels % channels, image = i / pixels / channels;
    return image * all(channels) * pixels +
           (channels_last ? pixel * all(channels) + channel : channel * pixels + pixel);
  }
};

struct Case {
  bool conv, per_channel, bias, relu;
  Place x, y;
  Precision precision;
  Activations activations;
  int num_levels, threads;
  int64_t images, inputs, outputs, groups;  // inputs and outputs of a group; a linear layer is one pixel in one group
  int64_t height, width, out_height, out_width;
  Pair kernel, stride, padding, dilation;

  int64_t channels() const { return outputs * groups; }
  int64_t all_inputs() const { return inputs * groups; }
  int64_t columns() const { return inputs * kernel.h * kernel.w; }
  int64_t pixels() const { return out_height * out_width; }
  int64_t in_pixels() const { return height * width; }
  int64_t products() const { return images * pixels() * channels() * columns(); }

  std::string text() const {
    char shape[200], rest[240];
    if (conv) {
      std::snprintf(shape, sizeof shape, "conv B%d C%d N%d g%d %dx%d k%d,%d s%d,%d p%d,%d d%d,%d%s%s",
                    static_cast<int>(images), static_cast<int>(inputs * groups), static_cast<int>(channels()),
                    static_cast<int>(groups), static_cast<int>(height), static_cast<int>(width), kernel.h, kernel.w,
                    stride.h, stride.w, padding.h, padding.w, dilation.h, dilation.w,
                    x.channels_last ? " x channels-last" : "", y.channels_last ? " y channels-last" : "");
    } else {
      std::snprintf(shape, sizeof shape, "linear B%d N%d K%d", static_cast<int>(images), static_cast<int>(outputs),
                    static_cast<int>(inputs));
    }
    std::snprintf(rest, sizeof rest, " M%d %s %s %s in %d+%d to %s in %d+%d, %s activations%s%s, %d threads",
                  num_levels, per_channel ? "channel" : "tensor", kPrecisions[static_cast<int>(precision)],
                  x.bfloat16 ? "bfloat16" : "float", static_cast<int>(x.before), static_cast<int>(x.after),
                  y.bfloat16 ? "bfloat16" : "float", static_cast<int>(y.before), static_cast<int>(y.after),
                  kActivations[static_cast<int>(activations)], bias ? ", bias" : "", relu ? ", ReLU" : "", threads);
    return std::string(shape) + rest;
  }
};

inline void draw_linear(Random* random, Case* c) {
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
  c->x.channels_last = c->y.channels_last = true;
  while (c->products() > kMostProducts) (c->images > 3 ? c->images : c->outputs) /= 2;
}

inline void draw_conv(Random* random, Case* c) {
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
  c->x.channels_last = random->chance(50);
  c->y.channels_last = random->chance(80) == c->x.channels_last;
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

inline Case draw_case(Random* random) {
  Case c{};
  c.conv = random->chance(50);
  if (c.conv) {
    draw_conv(random, &c);
  } else {
    draw_linear(random, &c);
  }
  c.precision = static_cast<Precision>(random->between(0, 2));
  c.x.bfloat16 = random->chance(30);
  c.y.bfloat16 = random->chance(80) == c.x.bfloat16;
  for (Place* place : {&c.x, &c.y}) {
    if (random->chance(80)) continue;
    place->before = random->between(0, 20), place->after = random->between(0, 20);
  }
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
  std::vector<float> x;         // [images, channels, pixels], after rounding to bfloat16 where it is that
  std::vector<float> levels;    // [codebooks, M]
  std::vector<int8_t> int8_levels;
  std::vector<float> int8_scale;
  std::vector<uint8_t> codes;   // [channels, columns], a byte each
  std::vector<float> bias;

  int64_t codebook(const Case& c, int64_t channel) const { return c.per_channel ? channel : 0; }
  uint8_t code(const Case& c, int64_t channel, int64_t k) const { return codes[channel * c.columns() + k]; }
};

inline void fill_activations(Random* random, const Case& c, std::vector<float>* x) {
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
  if (c.x.bfloat16) {
    for (float& value : *x) value = widen(to_bfloat16(value));
  }
}

inline void fill_levels(Random* random, const Case& c, Operands* o) {
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

inline Operands draw_operands(Random* random, const Case& c) {
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

}  // namespace bqnn::cases
