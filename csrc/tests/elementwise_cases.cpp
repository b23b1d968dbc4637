// Draws weights, codebooks and outputs, and compares the elementwise kernels of every instruction set of this machine
// with the scalar ones, bit for bit; codes with a plain loop as well. The number of threads must not change a bit.
#include <memory>

#include "cases.h"
#include "cpu/train/assign_codes.h"
#include "cpu/train/elementwise.h"
#include "cpu/train/mixture_kl.h"
#include "cpu/train/noise.h"
#include "cpu/train/spike_slab_kl.h"
#include "cpu/train/weights.h"

namespace bqnn::cases {
namespace {

struct Case {
  int64_t rows, columns;
  bool per_row;
  int num_levels, threads;
  PlaneShape shape;  // of outputs
  bool interleaved[3], bfloat16[3];  // the format and the dtype of three tensors of outputs
  Noise noise;
  float slab_sigma2;  // of the mixture, as the next two
  double spike_width, slab_share;

  int64_t weights() const { return rows * columns; }
  int64_t elements() const { return shape.batch * shape.channels * shape.pixels; }
  int64_t codebooks() const { return per_row ? rows : 1; }

  std::string text() const {
    char text[200];
    std::snprintf(text, sizeof text,
                  "[%d, %d] M%d %s, planes [%d, %d, %d] interleaved %d%d%d bfloat16 %d%d%d, %d threads",
                  static_cast<int>(rows), static_cast<int>(columns), num_levels, per_row ? "channel" : "tensor",
                  static_cast<int>(shape.batch), static_cast<int>(shape.channels), static_cast<int>(shape.pixels),
                  interleaved[0], interleaved[1], interleaved[2], bfloat16[0], bfloat16[1], bfloat16[2], threads);
    return text;
  }
};

Case draw_case(Random* random) {
  Case c{};
  c.rows = random->size(40);
  c.columns = random->size(150);
  // Blocks have 2048 weights; a task has two or more of them.
  if (random->chance(3)) c.rows = random->between(1, 4), c.columns = random->between(4000, 20000);
  if (random->chance(2)) c.rows = 0;
  c.per_row = random->chance(50);
  c.num_levels = static_cast<int>(random->between(2, 16));
  c.threads = static_cast<int>(random->between(1, 3));
  c.shape = {random->between(0, 2), random->size(40), random->size(random->chance(3) ? 1500 : 70)};
  const bool interleaved = random->chance(50);  // all, in most cases
  for (int i = 0; i < 3; ++i) {
    c.interleaved[i] = random->chance(70) ? interleaved : !interleaved;
    c.bfloat16[i] = random->chance(30);
  }
  c.noise = {random->next(), random->chance(50) ? 0 : random->next()};
  c.slab_sigma2 = random->one_of({1.0f, 0.1f, 1e-6f, 1e4f, NAN, 0.0f});
  c.spike_width = random->one_of({0.25, 0.02, 3.0});
  c.slab_share = random->one_of({0.1, 1e-6, 0.9});
  return c;
}

struct Operands {
  Buffer<float> weight, log_sigma2, levels, thresholds, tau, grad;
  Buffer<float> planes[3];  // values of the planes; their variance is the second one

  explicit Operands(const Case& c)
      : weight(c.weights()),
        log_sigma2(c.weights()),
        levels(c.codebooks() * c.num_levels),
        thresholds(c.codebooks() * (c.num_levels - 1)),
        tau(c.codebooks() * c.num_levels),
        grad(c.weights()),
        planes{Buffer<float>(c.elements()), Buffer<float>(c.elements()), Buffer<float>(c.elements())} {}
};

void fill(Random* random, const Case& c, const Operands& o) {
  const float size = random->one_of({1.0f, 1.0f, 1e-3f, 100.0f});
  for (int64_t g = 0; g < c.codebooks(); ++g) {
    float* levels = o.levels.data() + g * c.num_levels;
    double level = random->normal() - 0.3 * c.num_levels;
    for (int m = 0; m < c.num_levels; ++m) levels[m] = static_cast<float>(size * (level += 0.05 + random->uniform()));
    if (random->chance(30)) {
      const float zero = levels[random->between(0, c.num_levels - 1)];
      for (int m = 0; m < c.num_levels; ++m) levels[m] -= zero;
    }
    for (int m = 0; m + 1 < c.num_levels; ++m) {
      const double share = 0.2 + 0.6 * random->uniform();
      o.thresholds[g * (c.num_levels - 1) + m] = static_cast<float>(levels[m] + share * (levels[m + 1] - levels[m]));
    }
    for (int m = 0; m < c.num_levels; ++m) {
      o.tau[g * c.num_levels + m] = size * static_cast<float>(0.05 + 0.4 * random->uniform());
    }
  }
  const bool wild = random->chance(15);
  for (int64_t i = 0; i < c.weights(); ++i) {
    const int64_t codebook = c.per_row ? i / c.columns : 0;
    o.weight[i] = static_cast<float>(size * 3.0 * random->normal());
    o.log_sigma2[i] = static_cast<float>(-6.0 + 3.0 * random->normal());
    o.grad[i] = static_cast<float>(random->normal());
    if (random->chance(10)) o.weight[i] = o.levels[codebook * c.num_levels + random->between(0, c.num_levels - 1)];
    if (random->chance(5)) {
      o.weight[i] = o.thresholds[codebook * (c.num_levels - 1) + random->between(0, c.num_levels - 2)];
    }
    if (!wild) continue;
    constexpr float kWild[] = {NAN, INFINITY, -INFINITY, 1e-40f, 3e38f, -3e38f, 0.0f, -0.0f};
    if (random->chance(3)) o.weight[i] = random->one_of(kWild);
    if (random->chance(3)) o.log_sigma2[i] = static_cast<float>(120.0 * random->normal());
    if (random->chance(1)) o.log_sigma2[i] = NAN;
    // Far from most levels, and yet so wide that their divergences have slopes.
    if (random->chance(2)) {
      o.weight[i] = random->one_of({3e38f, -1e38f});
      o.log_sigma2[i] = random->one_of({104.0f, 170.0f});
    }
  }
  for (const Buffer<float>& plane : o.planes) {
    for (int64_t i = 0; i < plane.size(); ++i) {
      plane[i] = static_cast<float>(random->chance(5) ? 0.0 : random->normal());
      if (wild && random->chance(1)) plane[i] = random->one_of({NAN, INFINITY, -INFINITY, 1e-40f, 3e38f});
    }
  }
}

enum class Format { bytes, bfloat16s, floats };

struct Output {
  std::string name;
  Format format;
  std::unique_ptr<Buffer<uint8_t>> values;

  int64_t width() const { return format == Format::floats ? 4 : format == Format::bfloat16s ? 2 : 1; }
  double operator[](int64_t i) const {
    const uint8_t* at = values->data() + i * width();
    if (format == Format::bytes) return *at;
    float value = 0.0f;  // a bfloat16 number is the upper half of a float
    std::memcpy(reinterpret_cast<uint8_t*>(&value) + sizeof value - width(), at, static_cast<size_t>(width()));
    return value;
  }
};

// What the kernels of one instruction set make of a case.
class Results {
 public:
  uint8_t* bytes(const char* name, int64_t count) { return add(name, Format::bytes, count, 1); }
  float* floats(const char* name, int64_t count) {
    return reinterpret_cast<float*>(add(name, Format::floats, count, sizeof(float)));
  }
  Elements elements(const char* name, bool bfloat16, int64_t count) {
    if (bfloat16) return {add(name, Format::bfloat16s, count, 2), true};
    return {floats(name, count), false};
  }
  // A plane that has `values` already.
  Plane plane(const char* name, bool bfloat16, bool interleaved, const Buffer<float>& values) {
    const Plane plane{elements(name, bfloat16, values.size()), interleaved};
    for (int64_t i = 0; i < values.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, &values[i], sizeof bits);
      if (bfloat16) {
        static_cast<uint16_t*>(plane.elements.data)[i] = static_cast<uint16_t>(bits >> 16);
      } else {
        static_cast<float*>(plane.elements.data)[i] = values[i];
      }
    }
    return plane;
  }

  const Buffer<uint8_t>& operator[](const char* name) const {
    return *std::find_if(outputs_.begin(), outputs_.end(), [&](const Output& o) { return o.name == name; })->values;
  }

  // The first that is not scalar's, bit by bit, or nothing. A NaN has many forms, and an operation of two of them may
  // return either.
  std::string difference(const Results& scalar) const {
    for (size_t k = 0; k < outputs_.size(); ++k) {
      const Output &found = outputs_[k], &expected = scalar.outputs_[k];
      if (!found.values->intact()) return "wrote before " + found.name;
      if (found.values->equals(*expected.values)) continue;
      for (int64_t i = 0; i < found.values->size() / found.width(); ++i) {
        const size_t width = static_cast<size_t>(found.width());
        const uint8_t *a = found.values->data() + i * width, *b = expected.values->data() + i * width;
        if (std::memcmp(a, b, width) == 0 || (std::isnan(found[i]) && std::isnan(expected[i]))) continue;
        char text[160];
        std::snprintf(text, sizeof text, "%s[%d] is %.9g, scalar's is %.9g", found.name.c_str(), static_cast<int>(i),
                      found[i], expected[i]);
        return text;
      }
    }
    return "";
  }

 private:
  uint8_t* add(const char* name, Format format, int64_t count, int64_t width) {
    outputs_.push_back({name, format, std::make_unique<Buffer<uint8_t>>(count * width)});
    return outputs_.back().values->data();
  }

  std::vector<Output> outputs_;
};

// Base-M digits in a byte.
int digits_of(const Case& c) {
  int digits = 1;
  for (int values = c.num_levels; values * c.num_levels <= 256; values *= c.num_levels) ++digits;
  return digits;
}

void run_codes(const Case& c, const Operands& o, Isa isa, const Parallel& parallel, Results* r) {
  const int64_t digits = digits_of(c), width = (c.columns + digits - 1) / digits;
  const AssignCodes weights{o.weight.data(), o.thresholds.data(), c.rows, c.columns, c.per_row, c.num_levels};
  assign_codes(parallel, isa, weights, r->bytes("codes", c.weights()));
  assign_codes_packed(parallel, isa, weights, r->bytes("packed", c.rows * width));
}

void run_prior(const Case& c, const Operands& o, Isa isa, const Parallel& parallel, Results* r) {
  const PriorWeights weights{o.weight.data(), o.log_sigma2.data(), o.levels.data(), c.rows,
                             c.columns,       c.per_row,           c.num_levels};
  const auto gradients = [&](const char* weight, const char* log_sigma2, const char* levels) {
    return PriorGradients{r->floats(weight, c.weights()), r->floats(log_sigma2, c.weights()),
                          r->floats(levels, o.levels.size())};
  };
  const SpikeSlabKl spikes{weights, o.tau.data()};
  *r->floats("kl", 1) = spike_slab_kl(parallel, isa, spikes);
  spike_slab_kl_backward(parallel, isa, spikes, 0.7f,
                         gradients("kl's grad_weight", "kl's grad_log_sigma2", "kl's grad_levels"));
  const MixtureKl mixture{weights, c.slab_sigma2, c.spike_width, c.slab_share};
  *r->floats("mixture's kl", 1) = mixture_kl(parallel, isa, mixture);
  mixture_kl_backward(parallel, isa, mixture, 0.7f,
                      gradients("mixture's grad_weight", "mixture's grad_log_sigma2", "mixture's grad_levels"));
}

void run_posterior(const Case& c, const Operands& o, Isa isa, const Parallel& parallel, Results* r) {
  const Posterior q{o.weight.data(),     o.log_sigma2.data(), o.levels.data(),
                    o.thresholds.data(), c.weights(),         c.codebooks(), c.num_levels};
  sample(parallel, isa, q, c.noise, r->floats("sample", c.weights()));
  float* grad_log_sigma2 = r->floats("sample's grad_log_sigma2", c.weights());
  sample_backward(parallel, isa, q, c.noise, o.grad.data(), grad_log_sigma2,
                  r->floats("sample's grad_levels", o.levels.size()));
  for (const Moments mode : {Moments::categorical, Moments::gaussian, Moments::straight_through}) {
    float* mean = mode == Moments::gaussian ? nullptr : r->floats("mean", c.weights());
    const Elements variance = r->elements("variance", c.bfloat16[0], c.weights());
    moments(parallel, isa, q, mode, mean, variance);
    const bool categorical = mode == Moments::categorical;
    float* grad_weight = categorical ? r->floats("moments' grad_weight", c.weights()) : nullptr;
    float* grad_levels = mode == Moments::gaussian ? nullptr : r->floats("moments' grad_levels", o.levels.size());
    float* grad_thresholds = categorical ? r->floats("moments' grad_thresholds", o.thresholds.size()) : nullptr;
    grad_log_sigma2 = r->floats("moments' grad_log_sigma2", c.weights());
    moments_backward(parallel, isa, q, mode, o.grad.data(), variance, grad_weight, grad_log_sigma2, grad_levels,
                     grad_thresholds);
  }
}

void run_planes(const Case& c, const Operands& o, Isa isa, const Parallel& parallel, Results* r) {
  constexpr int64_t kCalls = 37;
  elementwise(isa).random_words(c.noise.seed, c.noise.offset, kCalls,
                                reinterpret_cast<uint32_t*>(r->bytes("words", 16 * kCalls)));
  const auto plane = [&](const char* name, int which) {
    return r->plane(name, c.bfloat16[which], c.interleaved[which], o.planes[which]);
  };
  Plane mean = plane("mean and noise", 0), variance = plane("slope", 1), out = plane("grad times slope", 2);
  add_noise(parallel, isa, c.shape, mean, variance, c.noise, c.per_row);
  multiply(parallel, isa, c.shape, mean, variance, out);
  mean = plane("grad", 0), variance = plane("variance", 1), out = plane("grad of the variance", 2);
  noise_gradient(parallel, isa, c.shape, mean, variance, c.noise, out);
  square(parallel, isa, c.shape, mean, plane("square", 1));
  add_square_gradient(parallel, isa, c.shape, plane("square's gradient", 0), variance, out);
}

Results run_kernels(const Case& c, const Operands& o, Isa isa, int threads) {
  Results results;
  const Parallel parallel = std_threads(threads);
  run_codes(c, o, isa, parallel, &results);
  run_prior(c, o, isa, parallel, &results);
  run_posterior(c, o, isa, parallel, &results);
  run_planes(c, o, isa, parallel, &results);
  return results;
}

uint8_t code_of(const Case& c, const Operands& o, int64_t i) {
  const float* thresholds = o.thresholds.data() + (c.per_row ? i / c.columns * (c.num_levels - 1) : 0);
  return static_cast<uint8_t>(
      std::count_if(thresholds, thresholds + c.num_levels - 1, [&](float t) { return o.weight[i] > t; }));
}

std::string compare_codes(const Case& c, const Operands& o, const Results& r) {
  const Buffer<uint8_t>&codes = r["codes"], &packed = r["packed"];
  for (int64_t i = 0; i < c.weights(); ++i) {
    if (codes[i] != code_of(c, o, i)) return "wrong code of weight " + std::to_string(i);
  }
  const int64_t digits = digits_of(c), width = (c.columns + digits - 1) / digits;
  for (int64_t i = 0; i < packed.size(); ++i) {
    const int64_t row = i / width, first = i % width * digits;
    int byte = 0;
    for (int64_t k = std::min(first + digits, c.columns) - 1; k >= first; --k) {
      byte = byte * c.num_levels + codes[row * c.columns + k];
    }
    if (packed[i] != byte) return "wrong packed byte " + std::to_string(i);
  }
  return "";
}

std::string run_case(uint64_t seed, uint64_t number) {
  Random random(seed, number);
  const Case c = draw_case(&random);
  const Operands o(c);
  fill(&random, c, o);
  const Results scalar = run_kernels(c, o, Isa::scalar, 1);
  std::string wrong = compare_codes(c, o, scalar);
  if (!wrong.empty()) return c.text() + ": scalar: " + wrong;
  for (const Isa isa : isas()) {
    wrong = run_kernels(c, o, isa, c.threads).difference(scalar);
    if (!wrong.empty()) return c.text() + ": " + isa_name(isa) + ": " + wrong;
  }
  return "";
}

std::string closing() {
  std::string text = "; equal on";
  for (const Isa isa : isas()) text += std::string(" ") + isa_name(isa);
  return text;
}

}  // namespace
}  // namespace bqnn::cases

int main(int argc, char** argv) {
  return bqnn::cases::run_cases(argc, argv, 2000, bqnn::cases::run_case, bqnn::cases::closing);
}
