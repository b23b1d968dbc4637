// packed_linear of a few rows on AVX-512, where reading and decoding the words is most of the work: no panel, the
// lanes are 16 channels and several blocks share what is read of the activations.

// Words added up in one float32 sum: its error grows with the number of terms.
constexpr int64_t kWordsOfSum = 256;

// Products [kRows][kMostBlocks * 16] of kBlocks blocks, one codebook for all. Activations are zeros up to the end of
// the last word. 8-bit ones are multiplied by levels + 128, since vpdpbusd wants one operand unsigned: 128 times their
// sum is to be subtracted. Integer sums may wrap around on the way.
template <class Op, int kBits, int kRows, int kBlocks>
__attribute__((noinline)) void dot_rows(const PackedLayout& layout, int64_t block, const char* const* rows,
                                        typename Op::Product* products) {
  constexpr bool kFloats = Op::kUnit == 1;
  constexpr int kLanesOfWord = 32 / kBits / Op::kUnit;
  // Two sums hide the latency of the product where there are few; floats have a shorter one.
  constexpr int kSums = !kFloats && kRows * kBlocks <= 8 ? 2 : 1;
  // A permute looks at 5 or 6 bits: a table for each code among the low 4, and one shift serves two codes or four.
  constexpr int kInNibble = 4 / kBits;
  alignas(64) uint32_t entries[kBlock];
  read_table<Op>(layout, {layout.level_table()}, 0, entries);
  const UInt table = Op::kInt8 ? load_lanes(entries) ^ 0x80808080u : load_lanes(entries);
  UInt tables[kInNibble], count_up;  // bytes or halves that count
  for (uint32_t i = 0; i < 16; ++i)
    count_up[i] = Op::kInt8 ? 0x03020100u + 0x04040404u * i : 0x00010000u + 0x00020002u * i;
  for (int i = 0; i < kInNibble; ++i) tables[i] = kFloats ? table : permute<Op>(count_up >> (i * kBits), table);
  const char* row[kRows];
  BQNN_UNROLL(8) for (int r = 0; r < kRows; ++r) row[r] = rows[r];
  const uint32_t* words = layout.block(0, block);
  const int64_t stride = layout.block_words(), count = layout.padded * kBits / 32;
  for (int64_t first = 0; first < count; first += kWordsOfSum) {
    const int64_t end = smaller(count, first + kWordsOfSum);
    typename Op::Sum sum[kBlocks][kRows][kSums] = {};
    for (int64_t at = first * kLanesOfWord * 4; at < end * kLanesOfWord * 4; at += kLanesOfWord * 4, words += kBlock) {
      UInt word[kBlocks];
      BQNN_UNROLL(8) for (int b = 0; b < kBlocks; ++b) {
        prefetch_words(words + b * stride);
        word[b] = load_lanes(words + b * stride);
      }
      BQNN_UNROLL(32) for (int i = 0; i < kLanesOfWord; ++i) {
        // A float's codes are read from their byte on, so that some need no shift. The last one of a block reads up to
        // 3 bytes of the next, or of the end of the layout.
        constexpr int kInByte = 8 / kBits;
        UInt level[kBlocks];
        BQNN_UNROLL(8) for (int b = 0; b < kBlocks; ++b) {
          const char* byte = reinterpret_cast<const char*>(words + b * stride) + i / kInByte;
          level[b] = kFloats ? permute<Op>(load_lanes(byte) >> (i % kInByte * kBits), table)
                             : permute<Op>(word[b] >> (i / kInNibble * 4), tables[i % kInNibble]);
        }
        // Every half word has every second weight; other lanes hold what follows each other.
        const int lane = kFloats ? i % (kLanesOfWord / 2) * 2 + i / (kLanesOfWord / 2) : i;
        BQNN_UNROLL(8) for (int r = 0; r < kRows; ++r) {
          const UInt x = broadcast_lane(row[r] + at + lane * 4);
          BQNN_UNROLL(8) for (int b = 0; b < kBlocks; ++b)
            sum[b][r][i % kSums] = Op::dot(x, level[b], sum[b][r][i % kSums]);
        }
      }
    }
    BQNN_UNROLL(8) for (int b = 0; b < kBlocks; ++b)
      BQNN_UNROLL(8) for (int r = 0; r < kRows; ++r) {
        typename Op::Product* to = products + (r * kMostBlocks + b) * kBlock;
        UInt total = (UInt)sum[b][r][0];
        if (kSums == 2) total = Op::add(total, sum[b][r][kSums - 1]);
        if (first > 0) total = Op::add(load_lanes(to), total);
        __builtin_memcpy(to, &total, sizeof total);
      }
  }
}

// Calls f(first_block, blocks) with kMost (8, 4, 2 or 1) blocks, a constant, or fewer, until all are done.
template <int kMost, class F>
inline void for_blocks(int64_t begin, int64_t end, const F& f) {
  int64_t block = begin;
  for (; block + kMost <= end; block += kMost) f(block, Constant<kMost>{});
  if constexpr (kMost == 8) return for_blocks<4>(block, end, f);
  for (; block < end; ++block) f(block, Constant<1>{});
}

// Tasks of few rows: `compute(block, blocks, products)` for all blocks, up to kMost together, then the outputs.
template <class Op, int kMost, int kRows, class F>
inline void run_blocks(const PackedCall& call, const Parallel& parallel, const float* scales, const F& compute) {
  const PackedLayout& layout = *call.weight;
  const int64_t units = ceil_div(layout.blocks, 4), work = 4 * kBlock * kRows * layout.columns;
  parallel_for(parallel, units, 1 + kTaskWork / work, [&](int64_t begin, int64_t end) {
    for_blocks<kMost>(4 * begin, smaller(4 * end, layout.blocks), [&](int64_t block, auto blocks) {
      alignas(64) typename Op::Product products[kRows * kMostBlocks * kBlock];
      compute(block, blocks, products);
      finish_rows<Op>(call, products, kMostBlocks * kBlock, 0, call.images, block,
                      smaller(layout.channels - block * kBlock, blocks.value * kBlock), scales);
    });
  });
}

// Blocks whose sums fit the registers, by rows.
constexpr int kMostOf[kFewRows + 1] = {0, 8, 4, 4, 4, 2, 2, 2, 2};

// Up to kRows rows; those beyond the last are the first one again.
template <class Op, int kRows>
__attribute__((noinline)) void run_rows(const PackedCall& call, const Parallel& parallel) {
  using Element = typename Op::Element;
  using Product = typename Op::Product;
  const PackedLayout& layout = *call.weight;
  const bool shared = layout.codebooks == 1;
  const int64_t groups = groups_of_words(layout), padded = groups * 16 * layout.word_weights(), rows = call.images;
  int64_t row_bytes = padded * static_cast<int64_t>(sizeof(Element));
  if (row_bytes % 1024 == 0) row_bytes += 64;  // rows would meet in a few sets of the caches
  char* packed = room<char>(Scratch::activations, rows * row_bytes);
  char* turned = shared ? nullptr : room<char>(Scratch::tables, rows * row_bytes);
  const char* row[kRows];
  float scales[kRows];
  uint32_t shift[kRows];
  parallel_for(parallel, rows, 1 + (1 << 14) / layout.columns, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      auto* to = reinterpret_cast<Element*>(packed + r * row_bytes);
      scales[r] = pack_matrix_row<Op>(call, r, padded, to);
      uint32_t sum = 0;
      if constexpr (Op::kInt8)
        for (int64_t k = 0; k < layout.columns; ++k) sum += static_cast<uint32_t>(int32_t{to[k]});
      shift[r] = 128u * sum;
      row[r] = packed + r * row_bytes;
      if (!shared) row[r] = turn_activations(row[r], groups, 32 / layout.bits / Op::kUnit, turned + r * row_bytes);
    }
  });
  for (int64_t r = rows; r < kRows; ++r) row[r] = row[0];
  with_codes_of(layout, [&](auto bits, auto shared) {
    constexpr int kMost = shared.value ? kMostOf[kRows] : 1;
    run_blocks<Op, kMost, kRows>(call, parallel, scales, [&](int64_t block, auto blocks, Product* products) {
      if constexpr (shared.value)
        dot_rows<Op, bits.value, kRows, blocks.value>(layout, block, row, products);
      else
        channel_rows<Op, bits.value, kRows>(layout, block, row, products);
      if constexpr (Op::kInt8)
        for (int r = 0; r < rows; ++r)
          for (int i = 0; i < blocks.value * kBlock; i += kLanes) {
            Product* at = products + r * kMostBlocks * kBlock + i;
            const UInt product = load_lanes(at) - shift[r];
            __builtin_memcpy(at, &product, sizeof product);
          }
    });
  });
}

template <class Op>
inline void run_gemv(const PackedCall& call, const Parallel& parallel) {
  const auto run = call.images == 1   ? run_rows<Op, 1>
                   : call.images == 2 ? run_rows<Op, 2>
                   : call.images <= 4 ? run_rows<Op, 4>
                   : call.images <= 6 ? run_rows<Op, 6>
                                      : run_rows<Op, 8>;
  run(call, parallel);
}
