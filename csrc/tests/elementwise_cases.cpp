// Draws weights and codebooks, and compares the elementwise kernels of every instruction set of this machine with the
// scalar ones, bit for bit; codes with a plain loop as well. The number of threads must not change a bit.
#include "cases.h"
#include "cpu/assign_codes.h"
#include "cpu/spike_slab_kl.h"

namespace bqnn::cases {
namespace {

struct Case {
  int64_t rows, columns;
  bool per_row;
  int num_levels, threads;

  int64_t weights() const { return rows * columns; }
  int64_t codebooks() const { return per_row ? rows : 1; }

  std::string text() const {
    char text[120];
    std::snprintf(text, sizeof text, "[%d, %d] M%d %s, %d threads", static_cast<int>(rows), static_cast<int>(columns),
                  num_levels, per_row ? "channel" : "tensor", threads);
    return text;
  }
};

Case draw_case(Random* random) {
  Case c{};
  c.rows = random->size(40);
  c.columns = random->size(150);
  // Blocks have 2048 weights; a task has at least two of them.
  if (random->chance(3)) c.rows = random->between(1, 4), c.columns = random->between(4000, 20000);
  if (random->chance(2)) c.rows = 0;
  c.per_row = random->chance(50);
  c.num_levels = static_cast<int>(random->between(2, 16));
  c.threads = static_cast<int>(random->between(1, 3));
  return c;
}

struct Operands {
  Buffer<float> weight, log_sigma2, levels, thresholds, tau;

  explicit Operands(const Case& c)
      : weight(c.weights()),
        log_sigma2(c.weights()),
        levels(c.codebooks() * c.num_levels),
        thresholds(c.codebooks() * (c.num_levels - 1)),
        tau(c.codebooks() * c.num_levels) {}
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
    if (random->chance(2)) o.weight[i] = random->one_of({3e38f, -1e38f}), o.log_sigma2[i] = random->one_of({104.0f, 170.0f});
  }
}

// What the kernels of one instruction set make of a case.
struct Results {
  Buffer<uint8_t> codes, packed;
  Buffer<float> kl, grad_weight, grad_log_sigma2, grad_levels;

  Results(const Case& c, int64_t packed_bytes)
      : codes(c.weights()),
        packed(packed_bytes),
        kl(1),
        grad_weight(c.weights()),
        grad_log_sigma2(c.weights()),
        grad_levels(c.codebooks() * c.num_levels) {}

  bool intact() const {
    return codes.intact() && packed.intact() && grad_weight.intact() && grad_log_sigma2.intact() &&
           grad_levels.intact();
  }
};

void run_kernels(const Case& c, const Operands& o, Isa isa, int threads, const Results& r) {
  const Parallel parallel = std_threads(threads);
  const AssignCodes weights{o.weight.data(), o.thresholds.data(), c.rows, c.columns, c.per_row, c.num_levels};
  assign_codes(parallel, isa, weights, r.codes.data());
  assign_codes_packed(parallel, isa, weights, r.packed.data());
  const SpikeSlabKl prior{o.weight.data(), o.log_sigma2.data(), o.levels.data(), o.tau.data(),
                          c.rows,          c.columns,           c.per_row,       c.num_levels};
  r.kl[0] = spike_slab_kl(parallel, isa, prior);
  spike_slab_kl_backward(parallel, isa, prior, 0.7f,
                         {r.grad_weight.data(), r.grad_log_sigma2.data(), r.grad_levels.data()});
}

uint8_t code_of(const Case& c, const Operands& o, int64_t i) {
  const float* thresholds = o.thresholds.data() + (c.per_row ? i / c.columns * (c.num_levels - 1) : 0);
  return static_cast<uint8_t>(
      std::count_if(thresholds, thresholds + c.num_levels - 1, [&](float t) { return o.weight[i] > t; }));
}

// Base-M digits in a byte.
int digits_of(const Case& c) {
  int digits = 1;
  for (int values = c.num_levels; values * c.num_levels <= 256; values *= c.num_levels) ++digits;
  return digits;
}

std::string compare_codes(const Case& c, const Operands& o, const Results& r) {
  for (int64_t i = 0; i < c.weights(); ++i) {
    if (r.codes[i] != code_of(c, o, i)) return "wrong code of weight " + std::to_string(i);
  }
  const int64_t digits = digits_of(c), width = (c.columns + digits - 1) / digits;
  for (int64_t i = 0; i < r.packed.size(); ++i) {
    const int64_t row = i / width, first = i % width * digits;
    int byte = 0;
    for (int64_t k = std::min(first + digits, c.columns) - 1; k >= first; --k) {
      byte = byte * c.num_levels + r.codes[row * c.columns + k];
    }
    if (r.packed[i] != byte) return "wrong packed byte " + std::to_string(i);
  }
  return "";
}

// Where scalar's bits are not those of `found`, or nothing. A NaN has many forms, and an operation of two of them may
// return either.
std::string difference(const char* name, const Buffer<float>& scalar, const Buffer<float>& found) {
  for (int64_t i = 0; i < scalar.size(); ++i) {
    const float a = scalar[i], b = found[i];
    if (std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b))) continue;
    char text[160];
    std::snprintf(text, sizeof text, "%s[%d] is %.9g, scalar's is %.9g", name, static_cast<int>(i),
                  static_cast<double>(b), static_cast<double>(a));
    return text;
  }
  return "";
}

std::string difference(const Results& scalar, const Results& found) {
  if (!found.codes.equals(scalar.codes)) return "codes are not scalar's";
  if (!found.packed.equals(scalar.packed)) return "packed codes are not scalar's";
  std::string wrong = difference("kl", scalar.kl, found.kl);
  if (wrong.empty()) wrong = difference("grad_weight", scalar.grad_weight, found.grad_weight);
  if (wrong.empty()) wrong = difference("grad_log_sigma2", scalar.grad_log_sigma2, found.grad_log_sigma2);
  if (wrong.empty()) wrong = difference("grad_levels", scalar.grad_levels, found.grad_levels);
  return wrong;
}

std::string run_case(uint64_t seed, uint64_t number) {
  Random random(seed, number);
  const Case c = draw_case(&random);
  const Operands o(c);
  fill(&random, c, o);
  const int64_t digits = digits_of(c), packed_bytes = c.rows * ((c.columns + digits - 1) / digits);
  const Results scalar(c, packed_bytes);
  run_kernels(c, o, Isa::scalar, 1, scalar);
  std::string wrong = compare_codes(c, o, scalar);
  if (!wrong.empty()) return c.text() + ": scalar: " + wrong;
  for (const Isa isa : isas()) {
    const Results found(c, packed_bytes);
    run_kernels(c, o, isa, c.threads, found);
    wrong = difference(scalar, found);
    if (!wrong.empty()) return c.text() + ": " + isa_name(isa) + ": " + wrong;
    if (!scalar.intact() || !found.intact()) return c.text() + ": " + isa_name(isa) + ": wrote before an output";
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
  return bqnn::cases::run_cases(argc, argv, 5000, bqnn::cases::run_case, bqnn::cases::closing);
}
