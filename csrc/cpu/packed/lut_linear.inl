// packed_linear by tables of sums: those of some columns of a few rows, then all channels.
//
// Included inside the namespace of the AVX-512 translation unit, after lut.inl.
#pragma once

// Words whose tables, of kRows rows, are made together.
template <class Sums, int kRows>
constexpr int64_t kSumWords = kTablesRoom / kRows / (Sums::kGroups * Sums::kTable * 4);

template <class Sums, int kRows, int kBlocks>
__attribute__((noinline)) void add_row_sums(CodeStream codes, int64_t ahead, int64_t count, const float* tables,
                                            float* sums, int64_t stride, bool first) {
  const float* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = tables + r * kSumWords<Sums, kRows> * Sums::kGroups * Sums::kTable;
  add_sums<Sums, kRows, kBlocks>(codes, ahead, count, row, [](int64_t i) { return i * Sums::kTable; }, sums, stride,
                                 first);
}

template <class Sums, int kRows, class X>
__attribute__((noinline)) void run_sums_of(const LinearCall& call, const Parallel& parallel) {
  constexpr int kBlocks = kRows <= 2 ? 8 : 4;
  constexpr int64_t kWords = kSumWords<Sums, kRows>, kRow = kWords * Sums::kGroups * Sums::kTable;
  const PackedLayout& layout = *call.weight;
  const int64_t padded = Sums::padded(layout), words = padded / Sums::kWordWeights;
  const int64_t row_groups = ceil_div(call.rows, kRows), units = ceil_div(layout.blocks, kSumUnit);
  const int64_t parts = parts_of_channels(row_groups, units, parallel.threads);
  const int64_t most = ceil_div(units, parts) * kSumUnit * kBlock;  // channels of a part
  const int64_t work = kRows * most * layout.columns;
  parallel_for(parallel, row_groups * parts, 1 + kTaskWork / work, [&](int64_t begin, int64_t end) {
    const Sums of(layout);
    auto* x = reinterpret_cast<float*>(scratch(Scratch::activations, static_cast<size_t>(kRows * padded) * 4));
    auto* tables = reinterpret_cast<float*>(scratch(Scratch::tables, kRows * kRow * 4));
    auto* sums = reinterpret_cast<float*>(scratch(Scratch::products, static_cast<size_t>(kRows * most) * 4));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / parts * kRows, part = task % parts;
      const int64_t count = call.rows - row < kRows ? call.rows - row : kRows;
      const int64_t first_block = units * part / parts * kSumUnit, next = units * (part + 1) / parts * kSumUnit;
      const int64_t last_block = next < layout.blocks ? next : layout.blocks;
      for (int64_t r = 0; r < count; ++r) {
        float* to = x + r * padded;
        pack_row<FloatOperand>(static_cast<const X*>(call.x) + (row + r) * layout.columns, layout.columns, false,
                               RowScale{}, to);
        for (int64_t k = layout.columns; k < padded; ++k) to[k] = 0.0f;
      }
      for (int64_t word = 0; word < words; word += kWords) {
        const int64_t here = words - word < kWords ? words - word : kWords;
        for (int64_t r = 0; r < count; ++r)
          for (int64_t w = 0; w < here; ++w)
            of.make_word(x + r * padded + (word + w) * Sums::kWordWeights,
                         tables + r * kRow + w * Sums::kGroups * Sums::kTable);
        for_blocks<kBlocks>(first_block, last_block, [&](int64_t block, auto blocks) {
          CodeStream codes = Sums::stream(layout, 0, block);
          const int64_t ahead = Sums::stream(layout, 0, block + blocks.value).words - codes.words;
          codes.words += word * codes.word;
          add_row_sums<Sums, kRows, blocks.value>(codes, ahead, here, tables, sums + (block - first_block) * kBlock,
                                                  most, word == 0);
        });
      }
      const int64_t channel = first_block * kBlock, width = last_block * kBlock - channel;
      const int64_t left = layout.channels - channel;
      const Epilogue strip = epilogue<FloatOperand>(call, 0, first_block);
      for (int64_t r = 0; r < count; ++r)
        finish_row<FloatOperand>(sums + r * most, width < left ? width : left, strip, 0.0f,
                                 static_cast<X*>(call.y) + (row + r) * layout.channels + channel);
    }
  });
}

template <class Sums, class X>
inline bool run_sums_with(const LinearCall& call, const Parallel& parallel) {
  const auto run = call.rows == 1   ? run_sums_of<Sums, 1, X>
                   : call.rows == 2 ? run_sums_of<Sums, 2, X>
                                    : run_sums_of<Sums, kSumRows, X>;
  run(call, parallel);
  return true;
}

// Whether this was a call that sums suit, and all of y is written.
template <class X>
inline bool run_sums(const LinearCall& call, const Parallel& parallel) {
  const PackedLayout& layout = *call.weight;
  const bool few = call.rows <= kFewRows;
  if (call.rows == 0 || layout.precision != Precision::fp32 || layout.codebooks > 1) return false;
  if (layout.numbers != 0 && (few || layout.blocks >= kLeastSumBlocks))
    return (layout.num_levels == 2 ? run_sums_with<NumberSums<2>, X> : run_sums_with<NumberSums<3>, X>)(call, parallel);
  // Two weights a permute: no faster than FMA where it shares its port with the additions, but nothing is decoded.
  return few && layout.bits == 2 && run_sums_with<PairSums, X>(call, parallel);
}
