#include "cpu/train/assign_codes.h"

#include <algorithm>
#include <cstring>

#include "cpu/train/elementwise.h"

namespace bqnn {
namespace {

constexpr int64_t kGrain = 1 << 16;  // so many weights repay waking a thread
constexpr int64_t kBytes = 512;      // packed bytes made at a time: their codes stay in the first cache

constexpr int kMaxDigits = 8;

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first code has to be a word's lowest byte");

// Makes `bytes` bytes of kDigits codes each, the first the least significant digit; may read sizeof(Word) bytes from
// any byte's first code on.
template <int kDigits, class Word>
void pack(const uint8_t* codes, int num_levels, int64_t bytes, uint8_t* packed) {
  // Byte kDigits - 1 of word * factor is sum_i code_i M^i, for a factor that has M^i in byte kDigits - 1 - i. No byte
  // below carries into it, since each is such a sum over fewer codes, and none is above M^kDigits - 1 <= 255.
  Word factor = 0;
  for (int i = 0, power = 1; i < kDigits; ++i, power *= num_levels) factor = static_cast<Word>(factor << 8 | power);
  for (int64_t i = 0; i < bytes; ++i) {
    Word word;
    std::memcpy(&word, codes + i * kDigits, sizeof word);
    packed[i] = static_cast<uint8_t>(static_cast<Word>(word * factor) >> 8 * (kDigits - 1));
  }
}

using Pack = void (*)(const uint8_t*, int, int64_t, uint8_t*);

struct Packing {
  int digits;
  Pack pack;
};

// d = floor(8 / log2 M) digits.
Packing packing(int num_levels) {
  if (num_levels == 2) return {8, pack<8, uint64_t>};
  if (num_levels == 3) return {5, pack<5, uint64_t>};
  if (num_levels == 4) return {4, pack<4, uint32_t>};
  if (num_levels <= 6) return {3, pack<3, uint32_t>};
  return {2, pack<2, uint16_t>};
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
  const auto [digits, pack] = packing(weights.num_levels);
  const int cuts = weights.num_levels - 1;
  const int64_t width = (weights.columns + digits - 1) / digits;
  const int64_t chunks = (width + kBytes - 1) / kBytes;  // of a row
  const int64_t grain = std::max<int64_t>(1, kGrain / std::clamp<int64_t>(weights.columns, 1, kBytes * digits));
  parallel_for(parallel, weights.rows * chunks, grain, [&, digits = digits, pack = pack](int64_t begin, int64_t end) {
    uint8_t codes[kMaxDigits * kBytes + 2 * sizeof(uint64_t)];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t row = chunk / chunks, byte = chunk % chunks * kBytes, first = byte * digits;
      const int64_t bytes = std::min(kBytes, width - byte);
      const int64_t count = std::min(bytes * digits, weights.columns - first);
      const float* thresholds = weights.thresholds + (weights.per_row ? row * cuts : 0);
      kernel(weights.weight + row * weights.columns + first, count, thresholds, cuts, codes);
      // The digits that pad a row's last byte, and what its word holds beyond them.
      std::memset(codes + count, 0, 2 * sizeof(uint64_t));
      pack(codes, weights.num_levels, bytes, packed + row * width + byte);
    }
  });
}

}  // namespace bqnn
