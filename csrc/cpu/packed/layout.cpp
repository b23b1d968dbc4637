#include "cpu/packed/layout.h"

#include <cstring>
#include <vector>

#include "cpu/packed/affine_levels.h"

namespace bqnn {
namespace {

constexpr uint64_t kMagic = 0x316B6361706E7162;  // "bqnpack1"

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int digits_per_byte(int num_levels) {
  int digits = 1, values = num_levels;
  while (values * num_levels <= 256) values *= num_levels, ++digits;
  return digits;
}

PackedLayout plan(const PackedWeight& w) {
  PackedLayout p{};
  p.magic = kMagic;
  p.channels = w.channels;
  p.columns = w.columns;
  p.groups = w.groups;
  p.blocks = round_up(w.channels / w.groups, kBlock) / kBlock;
  p.inputs = w.columns / (w.kernel_h * w.kernel_w);
  const bool rows_are_runs = w.dilation_w == 1 || w.kernel_w == 1;
  p.segments = rows_are_runs ? w.kernel_h : w.kernel_h * w.kernel_w;
  p.segment = w.columns / p.segments;
  p.padded = round_up(p.segment, w.precision == Precision::int8 ? 64 : 32);
  p.kernel_h = w.kernel_h;
  p.kernel_w = w.kernel_w;
  p.dilation_w = w.dilation_w;
  p.num_levels = w.num_levels;
  p.bits = w.num_levels <= 2 ? 1 : w.num_levels <= 4 ? 2 : 4;
  p.unit = w.precision == Precision::int8 ? 4 : 2;
  p.codebooks = w.codebooks;
  p.precision = w.precision;
  const int64_t padded_channels = p.groups * p.blocks * kBlock, tables = w.codebooks == 1 ? 1 : padded_channels;
  int64_t end = round_up(sizeof(PackedLayout), 64);
  const auto part = [&end](int64_t bytes) {
    const int64_t begin = end;
    end = round_up(end + bytes, 64);
    return begin;
  };
  p.levels = part(tables * kTable * sizeof(float));
  if (w.precision == Precision::int8) {
    p.int8_levels = part(tables * kTable);
    p.int8_scale = part(padded_channels * sizeof(float));
    p.int8_shift = part(padded_channels * sizeof(uint32_t));
  }
  // One vector more: kernels load words at byte offsets.
  p.words = part(p.groups * p.blocks * p.block_words() * sizeof(uint32_t) + 64);
  if (w.numbers && w.num_levels <= 3 && w.codebooks == 1 && w.precision == Precision::fp32)
    p.numbers = part(p.groups * p.blocks * p.number_words() * kBlock * sizeof(uint32_t));
  p.bytes = end;
  return p;
}

// Adds the numbers of channel n, whose codes are in stored order, [input][tap].
void add_numbers(const PackedLayout& p, int64_t n, const uint8_t* codes, uint32_t* words) {
  const int64_t group = n / p.group_channels(), channel = n % p.group_channels(), block = channel / kBlock;
  const int64_t unit = block / kNumberBlocks, left = p.blocks - unit * kNumberBlocks, taps = p.taps();
  const int64_t stride = (left < kNumberBlocks ? left : kNumberBlocks) * kBlock;
  const Numbers number = numbers_of(p.num_levels);
  words += p.numbers_at(group, unit) + block % kNumberBlocks * kBlock + channel % kBlock;
  for (int64_t input = 0; input < p.inputs; ++input) {
    uint32_t power = 1;
    for (int64_t j = 0; j < input % number.weights; ++j) power *= static_cast<uint32_t>(p.num_levels);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t i = input / number.weights * taps + tap;
      words[i / number.in_word * stride] += power * codes[input * taps + tap] << (i % number.in_word * number.bits);
    }
  }
}

}  // namespace

size_t layout_bytes(const PackedWeight& weight) { return static_cast<size_t>(plan(weight).bytes); }

void make_layout(const PackedWeight& w, void* memory) {
  PackedLayout p = plan(w);
  const int period = 1 << p.bits, digits = digits_per_byte(w.num_levels);
  AffineLevels affine;
  if (w.precision == Precision::fp32 && w.codebooks == 1 && find_affine(w.levels, w.num_levels, &affine)) {
    p.affine = 1;
    p.affine_offset = affine.offset;
    p.affine_scale = affine.scale;
    for (int i = 0; i < kTable; ++i) p.affine_steps[i] = affine.step[i % period < w.num_levels ? i % period : 0];
  }
  char* base = static_cast<char*>(memory);
  std::memset(base, 0, static_cast<size_t>(p.bytes));
  std::memcpy(base, &p, sizeof p);
  auto* levels = reinterpret_cast<float*>(base + p.levels);
  auto* int8_levels = reinterpret_cast<int8_t*>(base + p.int8_levels);
  auto* scale = reinterpret_cast<float*>(base + p.int8_scale);
  auto* shift = reinterpret_cast<uint32_t*>(base + p.int8_shift);
  auto* words = reinterpret_cast<uint32_t*>(base + p.words);
  const bool int8 = w.precision == Precision::int8;
  const int64_t width = (w.columns + digits - 1) / digits, taps = int64_t{w.kernel_h} * w.kernel_w;
  const auto fill_tables = [&](int64_t table, int64_t codebook) {
    for (int i = 0; i < kTable; ++i) {
      const int m = i % period < w.num_levels ? i % period : 0;
      levels[table * kTable + i] = w.levels[codebook * w.num_levels + m];
      if (int8) int8_levels[table * kTable + i] = w.int8_levels[codebook * w.num_levels + m];
    }
  };
  if (w.codebooks == 1) fill_tables(0, 0);
  const int word_shift = p.bits == 1 ? 5 : p.bits == 2 ? 4 : 3;
  int bit[32];  // where weight i of a word is
  for (int i = 0; i < p.word_weights(); ++i) bit[i] = i % p.unit * (32 / p.unit) + i / p.unit * p.bits;
  std::vector<uint8_t> codes(static_cast<size_t>(width * digits));
  for (int64_t n = 0; n < w.channels; ++n) {
    for (int64_t i = 0; i < width; ++i) {
      unsigned byte = w.codes[n * width + i];
      for (int d = 0; d < digits; ++d, byte /= w.num_levels) codes[i * digits + d] = byte % w.num_levels;
    }
    if (p.numbers != 0) add_numbers(p, n, codes.data(), reinterpret_cast<uint32_t*>(base + p.numbers));
    const int64_t group = n / p.group_channels(), in_group = n % p.group_channels();
    const int64_t lane = group * p.blocks * kBlock + in_group, codebook = w.codebooks == 1 ? 0 : n;
    if (w.codebooks > 1) fill_tables(lane, codebook);
    uint32_t* block = words + (lane / kBlock) * p.block_words() + lane % kBlock;
    int64_t total = 0;
    // Stored order is [input][r][s]; a run of the activations has the inputs fastest.
    int64_t at = 0, in_segment = 0;
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t input = 0; input < p.inputs; ++input, ++at) {
        const unsigned code = codes[input * taps + tap];
        block[(at >> word_shift) * kBlock] |= static_cast<uint32_t>(code) << bit[at & (p.word_weights() - 1)];
        if (int8) total += w.int8_levels[codebook * w.num_levels + code];
        if (++in_segment == p.segment) at += p.padded - p.segment, in_segment = 0;
      }
    }
    if (int8) scale[lane] = w.int8_scale[codebook], shift[lane] = static_cast<uint32_t>(total) * kInt8Offset;
  }
}

const PackedLayout* view_layout(const void* memory, size_t bytes) {
  const auto* p = static_cast<const PackedLayout*>(memory);
  if (bytes < sizeof(PackedLayout) || reinterpret_cast<uintptr_t>(memory) % 64 != 0) return nullptr;
  return p->magic == kMagic && p->bytes == static_cast<int64_t>(bytes) ? p : nullptr;
}

}  // namespace bqnn
