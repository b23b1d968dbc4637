#include "cpu/packed/layout.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/packed/affine_levels.h"

namespace bqnn {
namespace {

constexpr uint64_t kMagic = 0x316B6361706E7162;  // "bqnpack1"

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Places the parts one after the other, each aligned to 64 bytes, and sets the size of the whole.
void place_parts(PackedLayout* p) {
  const int64_t padded_channels = p->groups * p->blocks * kBlock, tables = p->codebooks == 1 ? 1 : padded_channels;
  int64_t end = round_up(sizeof(PackedLayout), 64);
  const auto part = [&end](bool exists, int64_t bytes) {
    const int64_t begin = end;
    if (exists) end = round_up(end + bytes, 64);
    return exists ? begin : 0;
  };
  const bool int8 = p->precision == Precision::int8;
  p->levels = part(true, tables * kTable * 4);
  p->int8_levels = part(int8, tables * kTable);
  p->int8_scale = part(int8, padded_channels * 4);
  p->int8_shift = part(int8, padded_channels * 4);
  // One vector more: kernels load words at byte offsets.
  p->words = part(true, p->groups * p->blocks * p->block_words() * 4 + 64);
  p->indices = part(p->form == LayoutForm::sum_indices, p->groups * p->blocks * p->index_words() * kBlock * 4);
  p->bytes = end;
}

// Adds the sum indices of channel n, whose codes are in stored order, [input][tap].
void add_indices(const PackedLayout& p, int64_t n, const uint8_t* codes, uint32_t* words) {
  const int64_t group = n / p.group_channels, channel = n % p.group_channels, block = channel / kBlock;
  const int64_t unit = block / kIndexBlocks, left = p.blocks - unit * kIndexBlocks, taps = p.taps();
  const int64_t stride = (left < kIndexBlocks ? left : kIndexBlocks) * kBlock;
  const SumIndex index = sum_index(p.num_levels);
  words += p.indices_at(group, unit) + block % kIndexBlocks * kBlock + channel % kBlock;
  for (int64_t input = 0; input < p.inputs; ++input) {
    uint32_t power = 1;
    for (int64_t j = 0; j < input % index.weights; ++j) power *= static_cast<uint32_t>(p.num_levels);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t i = input / index.weights * taps + tap;
      words[i / index.in_word * stride] += power * codes[input * taps + tap] << (i % index.in_word * index.bits);
    }
  }
}

int bits_of_code(int num_levels) { return num_levels <= 2 ? 1 : num_levels <= 4 ? 2 : 4; }

// The smallest magnitude of the levels that is not 0.
float least_magnitude(const float* levels, int64_t count) {
  float least = HUGE_VALF;
  for (int64_t i = 0; i < count; ++i)
    if (levels[i] != 0.0f && !(std::fabs(levels[i]) >= least)) least = std::fabs(levels[i]);
  return least;
}

// Whether a header's own fields are those of a weight whose layout has as many bytes, so that no size overflows.
bool is_of_a_weight(const PackedLayout& p) {
  const auto size = [&p](int64_t value) { return value > 0 && value <= 8 * p.bytes; };
  if (p.bytes > int64_t{1} << 48 || !size(p.channels) || !size(p.columns) || !size(p.groups)) return false;
  if (p.columns > 8 * p.bytes / p.channels) return false;
  if (p.kernel_h < 1 || p.kernel_w < 1 || p.dilation_w < 1 || p.taps() > p.columns) return false;
  if (p.num_levels < 2 || p.num_levels > kMostLevels || (p.codebooks != 1 && p.codebooks != p.channels)) return false;
  if (p.precision != Precision::fp32 && p.precision != Precision::bf16 && p.precision != Precision::int8) return false;
  const bool plain = p.affine == 0 && p.form == LayoutForm::words, indices = p.form == LayoutForm::sum_indices;
  if (!plain && (p.codebooks != 1 || p.precision != Precision::fp32 || p.num_levels > 3)) return false;
  if ((p.affine != 0 && p.affine != 1) || (p.form != LayoutForm::words && !indices)) return false;
  return p.channels % p.groups == 0 && p.columns % p.taps() == 0;
}

}  // namespace

int digits_of_byte(int num_levels) {
  int digits = 1;
  for (int values = num_levels; values * num_levels <= 256; values *= num_levels) ++digits;
  return digits;
}

PackedLayout plan_layout(const PackedWeight& w) {
  PackedLayout p{};
  p.magic = kMagic;
  p.channels = w.channels;
  p.columns = w.columns;
  p.groups = w.groups;
  p.group_channels = w.channels / w.groups;
  p.blocks = round_up(p.group_channels, kBlock) / kBlock;
  p.inputs = w.columns / (int64_t{w.kernel_h} * w.kernel_w);
  const bool rows_are_runs = w.dilation_w == 1 || w.kernel_w == 1;
  p.segments = rows_are_runs ? w.kernel_h : w.kernel_h * w.kernel_w;
  p.segment = w.columns / p.segments;
  p.padded = round_up(p.segment, w.precision == Precision::int8 ? 64 : 32);
  p.kernel_h = w.kernel_h;
  p.kernel_w = w.kernel_w;
  p.dilation_w = w.dilation_w;
  p.num_levels = w.num_levels;
  p.bits = bits_of_code(w.num_levels);
  p.unit = w.precision == Precision::int8 ? 4 : 2;
  p.codebooks = w.codebooks;
  p.precision = w.precision, p.form = w.form;
  place_parts(&p);
  return p;
}

void make_layout(const PackedWeight& w, void* memory) {
  PackedLayout p = plan_layout(w);
  const int period = 1 << p.bits, digits = digits_of_byte(w.num_levels);
  AffineLevels affine;
  if (w.precision == Precision::fp32 && w.codebooks == 1 && find_affine(w.levels, w.num_levels, &affine)) {
    p.affine = 1;
    p.affine_offset = affine.offset, p.affine_scale = affine.scale;
    for (int i = 0; i < kTable; ++i) p.affine_steps[i] = affine.step[i % period < w.num_levels ? i % period : 0];
  }
  p.least_level = least_magnitude(w.levels, int64_t{w.codebooks} * w.num_levels);
  char* base = static_cast<char*>(memory);
  std::memset(base, 0, static_cast<size_t>(p.bytes));
  std::memcpy(base, &p, sizeof p);
  auto* levels = reinterpret_cast<float*>(base + p.levels);
  auto* int8_levels = reinterpret_cast<int8_t*>(base + p.int8_levels);
  auto* scale = reinterpret_cast<float*>(base + p.int8_scale);
  auto* shift = reinterpret_cast<uint32_t*>(base + p.int8_shift);
  auto* words = reinterpret_cast<uint32_t*>(base + p.words);
  const bool int8 = w.precision == Precision::int8;
  const int64_t width = (w.columns + digits - 1) / digits, taps = p.taps();
  const auto fill_tables = [&](int64_t table, int64_t codebook) {
    for (int i = 0; i < kTable; ++i) {
      const int m = i % period < w.num_levels ? i % period : 0;
      levels[table * kTable + i] = w.levels[codebook * w.num_levels + m];
      if (int8) int8_levels[table * kTable + i] = w.int8_levels[codebook * w.num_levels + m];
    }
  };
  if (w.codebooks == 1) fill_tables(0, 0);
  const int word_shift = p.bits == 1 ? 5 : p.bits == 2 ? 4 : 3;
  int bit[32];  // the place of each weight in a word
  for (int i = 0; i < p.word_weights(); ++i) bit[i] = i % p.unit * (32 / p.unit) + i / p.unit * p.bits;
  std::vector<uint8_t> codes(static_cast<size_t>(width * digits));
  for (int64_t n = 0; n < w.channels; ++n) {
    for (int64_t i = 0; i < width; ++i) {
      unsigned byte = w.codes[n * width + i];
      for (int d = 0; d < digits; ++d, byte /= w.num_levels) codes[i * digits + d] = byte % w.num_levels;
    }
    if (p.indices != 0) add_indices(p, n, codes.data(), reinterpret_cast<uint32_t*>(base + p.indices));
    const int64_t group = n / p.group_channels, in_group = n % p.group_channels;
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
  // Small layers would notice the planning: headers that were found right are remembered.
  static thread_local PackedLayout known[16];
  PackedLayout& right = known[reinterpret_cast<uintptr_t>(memory) / 64 % 16];
  if (p->bytes == static_cast<int64_t>(bytes) && std::memcmp(&right, p, sizeof right) == 0) return p;
  if (p->magic != kMagic || p->bytes != static_cast<int64_t>(bytes) || !is_of_a_weight(*p)) return nullptr;
  // All else follows: the sizes and the places of the parts are planned again.
  PackedLayout q = plan_layout({nullptr, nullptr, nullptr, nullptr, p->channels, p->columns, p->groups, p->num_levels,
                                p->codebooks, p->kernel_h, p->kernel_w, p->dilation_w, p->precision, p->form});
  q.affine = p->affine, q.least_level = p->least_level;
  q.affine_offset = p->affine_offset, q.affine_scale = p->affine_scale;
  std::memcpy(q.affine_steps, p->affine_steps, sizeof q.affine_steps);
  if (std::memcmp(&q, p, sizeof q) != 0) return nullptr;
  right = q;
  return p;
}

}  // namespace bqnn
