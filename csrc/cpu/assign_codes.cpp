#include "assign_codes.h"

#include <algorithm>
#include <cstring>

#include "elementwise.h"

namespace bqnn {
namespace {

constexpr int64_t kGrain = 1 << 16;  // weights that are worth a thread
constexpr int64_t kBytes = 512;      // packed bytes made at a time: their codes stay in the first cache

// Codes as digits of base M: d of them a byte, the first the least significant.
struct Digits {
  int count;
  uint64_t factor;

  explicit Digits(int num_levels) : count(1), factor(1) {
    // With byte i of a word a code, byte d - 1 of word * factor is sum_i code_i M^i, for a factor that has M^i in byte
    // d - 1 - i. No byte below carries into it, since each is such a sum over fewer codes, at most M^d - 1 <= 255.
    for (uint64_t power = num_levels; power * num_levels <= 256; power *= num_levels) {
      factor = factor << 8 | power;
      ++count;
    }
  }
};

// codes: [8 more than digits.count * bytes may hold], little-endian words are read from every byte's first code.
void pack(const Digits& digits, const uint8_t* codes, int64_t bytes, uint8_t* packed) {
  const int shift = 8 * (digits.count - 1);
  for (int64_t i = 0; i < bytes; ++i) {
    uint64_t word;
    std::memcpy(&word, codes + i * digits.count, sizeof word);
    packed[i] = static_cast<uint8_t>(word * digits.factor >> shift);
  }
}

}  // namespace

void assign_codes(const Parallel& parallel, Isa isa, const AssignCodes& weights, uint8_t* codes) {
  const auto kernel = elementwise(isa).assign_codes;
  const int cuts = weights.num_levels - 1;
  if (!weights.per_row) {
    parallel_for(parallel, weights.rows * weights.columns, kGrain, [&](int64_t begin, int64_t end) {
      kernel(weights.weight + begin, end - begin, weights.thresholds, cuts, codes + begin);
    });
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, weights.columns));
  parallel_for(parallel, weights.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row * weights.columns;
      kernel(weights.weight + first, weights.columns, weights.thresholds + row * cuts, cuts, codes + first);
    }
  });
}

void assign_codes_packed(const Parallel& parallel, Isa isa, const AssignCodes& weights, uint8_t* packed) {
  const auto kernel = elementwise(isa).assign_codes;
  const Digits digits(weights.num_levels);
  const int cuts = weights.num_levels - 1;
  const int64_t width = (weights.columns + digits.count - 1) / digits.count;
  const int64_t chunks = (width + kBytes - 1) / kBytes;  // of a row
  const int64_t grain = std::max<int64_t>(1, kGrain / std::clamp<int64_t>(weights.columns, 1, kBytes * digits.count));
  parallel_for(parallel, weights.rows * chunks, grain, [&](int64_t begin, int64_t end) {
    uint8_t codes[8 * kBytes + 16];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t row = chunk / chunks, byte = chunk % chunks * kBytes, first = byte * digits.count;
      const int64_t bytes = std::min(kBytes, width - byte);
      const int64_t count = std::min(bytes * digits.count, weights.columns - first);
      const float* thresholds = weights.thresholds + (weights.per_row ? row * cuts : 0);
      kernel(weights.weight + row * weights.columns + first, count, thresholds, cuts, codes);
      std::memset(codes + count, 0, 16);  // the digits that pad a row's last byte, and what the last word reads beyond
      pack(digits, codes, bytes, packed + row * width + byte);
    }
  });
}

}  // namespace bqnn
