// packed_linear by tables of sums: those of some columns of a few rows, then all channels.

// Words whose tables, of kRows rows, are made together.
template <class Tables, int kRows>
constexpr int64_t kTableWords = kTablesRoom / kRows / (Tables::kInWord * Tables::kEntries * 4);

template <class Tables, int kRows, int kBlocks>
__attribute__((noinline)) void add_row_sums(IndexStream indices, int64_t ahead, int64_t count, const float* tables,
                                            float* sums, int64_t stride, bool first) {
  const float* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = tables + r * kTableWords<Tables, kRows> * Tables::kInWord * Tables::kEntries;
  add_sums<Tables, kRows, kBlocks>(
      indices, ahead, count, row, [](int64_t i) { return i * Tables::kEntries; }, sums, stride, first);
}

template <class Tables, int kRows>
__attribute__((noinline)) void run_lookup_of(const PackedCall& call, const Parallel& parallel) {
  constexpr int kBlocks = kRows <= 2 ? 8 : 4;
  constexpr int64_t kWords = kTableWords<Tables, kRows>, kRow = kWords * Tables::kInWord * Tables::kEntries;
  const PackedLayout& layout = *call.weight;
  const int64_t words = layout.index_words(), padded = words * Tables::kWordWeights;
  const int64_t row_groups = ceil_div(call.images, kRows);
  const ChannelParts channels(layout.blocks, row_groups, parallel.threads);
  const int64_t parts = channels.parts, most = channels.most_channels(), work = kRows * most * layout.columns;
  parallel_for(parallel, row_groups * parts, 1 + kTaskWork / work, [&](int64_t begin, int64_t end) {
    const Tables of(layout);
    auto* x = room<float>(Scratch::activations, kRows * padded);
    auto* tables = room<float>(Scratch::tables, kRows * kRow);
    auto* sums = room<float>(Scratch::products, kRows * most);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / parts * kRows, count = smaller(call.images - row, kRows);
      const int64_t part = task % parts;
      const int64_t first_block = channels.first_block(part), last_block = channels.first_block(part + 1);
      for (int64_t r = 0; r < count; ++r) pack_matrix_row<FloatOperand>(call, row + r, padded, x + r * padded);
      for (int64_t word = 0; word < words; word += kWords) {
        const int64_t here = smaller(words - word, kWords);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t i = 0; i < here * Tables::kInWord; ++i)
            of.make(x + r * padded + word * Tables::kWordWeights + i * Tables::kWeights,
                    tables + r * kRow + i * Tables::kEntries);
        for_blocks<kBlocks>(first_block, last_block, [&](int64_t block, auto blocks) {
          IndexStream indices = index_stream(layout, 0, block);
          const int64_t ahead = index_stream(layout, 0, block + blocks.value).words - indices.words;
          indices.words += word * indices.stride;
          add_row_sums<Tables, kRows, blocks.value>(indices, ahead, here, tables,
                                                    sums + (block - first_block) * kBlock, most, word == 0);
        });
      }
      finish_rows<FloatOperand>(call, sums, most, row, count, first_block,
                                smaller(last_block * kBlock, layout.channels) - first_block * kBlock, nullptr);
    }
  });
}

template <class Tables>
inline void run_lookup_with(const PackedCall& call, const Parallel& parallel) {
  const auto run = call.images == 1   ? run_lookup_of<Tables, 1>
                   : call.images == 2 ? run_lookup_of<Tables, 2>
                                      : run_lookup_of<Tables, kSumRows>;
  run(call, parallel);
}

inline void run_lookup_linear(const PackedCall& call, const Parallel& parallel) {
  (call.weight->num_levels == 2 ? run_lookup_with<SumTables<2>> : run_lookup_with<SumTables<3>>)(call, parallel);
}
