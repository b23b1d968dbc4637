// packed_linear of a few rows on AVX-512 at three levels, in floats: the 27 sums of three activations times levels are
// two registers, and one permute and one addition take three weights of 16 channels. The permute looks at 5 bits: those
// above a triple need no clearing.
//
// Included inside the namespace of the AVX-512 translation unit, after packed_few_rows.h.
#pragma once

constexpr int kTripleRows = 8;  // at 4096 columns, the sums of so many fit the L2 cache
constexpr int kTriplesOfWord = kTripleWeights / 3;
constexpr int64_t kTripleBytes = 128;    // of the sums of a triple, 32 floats
constexpr int64_t kTriplesAhead = 4096;  // bytes between a prefetch and its use

// Products [kRows][kMostBlocks * 16] of kBlocks blocks, whose words begin at `words` and stand `stride` bytes apart.
// tables[r] holds the sums of each triple by its code.
template <int kRows, int kBlocks>
__attribute__((noinline)) void triple_rows(const char* words, int64_t stride, int64_t count, const char* const* tables,
                                           float* products) {
  const char* table[kRows];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) table[r] = tables[r];
  for (int64_t first = 0; first < count; first += kWordsOfSum) {
    const int64_t end = count - first < kWordsOfSum ? count : first + kWordsOfSum;
    Float sum[kRows][kBlocks] = {};
    for (int64_t w = first; w < end; ++w, words += stride) {
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) _mm_prefetch(words + b * 64 + kTriplesAhead, _MM_HINT_T0);
#pragma GCC unroll 6
      for (int i = 0; i < kTriplesOfWord; ++i) {
        Float low[kRows], high[kRows];
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) {
          low[r] = (Float)load_lanes(table[r]), high[r] = (Float)load_lanes(table[r] + 64);
          table[r] += kTripleBytes;
        }
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) {
          const UInt index = load_lanes(words + b * 64) >> (i * kTripleBits);
#pragma GCC unroll 2
          for (int r = 0; r < kRows; ++r)
            sum[r][b] += (Float)_mm512_permutex2var_ps((__m512)low[r], (__m512i)index, (__m512)high[r]);
        }
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) {
        float* to = products + (r * kMostBlocks + b) * kBlock;
        store(to, first == 0 ? sum[r][b] : (Float)load_lanes(to) + sum[r][b]);
      }
  }
}

// The sums of every triple of n activations, n a multiple of three.
inline void make_triple_sums(const Codebook& book, const float* x, int64_t n, char* to) {
  Float level[3][2] = {};  // of the first, second and third weight, by the triple's code
  for (int code = 0, power = 1; code < 3; ++code, power *= 3)
    for (int value = 0; value < 27; ++value)
      __builtin_memcpy(&level[code][value / 16][value % 16], &book.entries[0][value / power % 3], sizeof(float));
  auto* sums = reinterpret_cast<float*>(to);
  for (int64_t k = 0; k < n; k += 3)
    for (int half = 0; half < 2; ++half, sums += 16)
      store(sums, level[0][half] * x[k] + level[1][half] * x[k + 1] + level[2][half] * x[k + 2]);
}

// Whether this was a call that triples suit, and all of y is written.
template <class X>
inline bool run_triples(const LinearCall& call, const Parallel& parallel) {
  const PackedLayout& layout = *call.weight;
  const int64_t rows = call.rows;
  if (layout.triples == 0 || rows < 1 || rows > kTripleRows) return false;
  const bool bf16 = layout.precision == Precision::bf16;
  const int64_t count = layout.triple_words(), padded = count * kTripleWeights;
  const int64_t table_bytes = count * kTriplesOfWord * kTripleBytes;
  char* activations = scratch(Scratch::activations, static_cast<size_t>(rows * padded) * sizeof(float));
  char* tables = scratch(Scratch::tables, static_cast<size_t>(rows * table_bytes));
  Codebook book;
  read_codebook<FloatOperand>(layout, 0, 0, &book);
  parallel_for(parallel, rows, 1 + (1 << 14) / layout.columns, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* x = reinterpret_cast<float*>(activations) + r * padded;
      pack_row<FloatOperand>(static_cast<const X*>(call.x) + r * layout.columns, layout.columns, bf16, RowScale{}, x);
      for (int64_t k = layout.columns; k < padded; ++k) x[k] = 0.0f;
      make_triple_sums(book, x, padded, tables + r * table_bytes);
    }
  });
  const int64_t units = ceil_div(layout.blocks, kTripleBlocks), work = kTripleBlocks * kBlock * rows * layout.columns;
  parallel_for(parallel, units, 1 + kTaskWork / work, [&](int64_t begin, int64_t end) {
    const int64_t last = end * kTripleBlocks < layout.blocks ? end * kTripleBlocks : layout.blocks;
    for_blocks<kTripleBlocks>(begin * kTripleBlocks, last, [&](int64_t block, auto blocks) {
      const int64_t unit = block / kTripleBlocks, left = layout.blocks - unit * kTripleBlocks;
      const int64_t stride = (left < kTripleBlocks ? left : kTripleBlocks) * 64;
      const char* words = reinterpret_cast<const char*>(layout.triple_unit(unit)) + block % kTripleBlocks * 64;
      const int64_t channel = block * kBlock, rest = layout.channels - channel;
      const int64_t width = rest < blocks.value * kBlock ? rest : blocks.value * kBlock;
      const Epilogue strip = epilogue<FloatOperand>(call, 0, block);
      for (int64_t row = 0; row < rows; row += 2) {
        const int together = rows - row < 2 ? 1 : 2;
        alignas(64) float products[2 * kMostBlocks * kBlock];
        const char* table[2] = {tables + row * table_bytes, tables + (row + together - 1) * table_bytes};
        (together == 1 ? triple_rows<1, blocks.value> : triple_rows<2, blocks.value>)(words, stride, count, table,
                                                                                       products);
        for (int r = 0; r < together; ++r)
          finish_row<FloatOperand>(products + r * kMostBlocks * kBlock, width, strip, 0.0f,
                                   static_cast<X*>(call.y) + (row + r) * layout.channels + channel);
      }
    });
  });
  return true;
}
