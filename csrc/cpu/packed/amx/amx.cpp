// AMX: products of 16 x 64-byte tiles of bfloat16 or 8-bit integers. What tiles do not suit goes to the AVX-512
// kernels: few rows, float32 in a linear layer, and activations that bfloat16 does not hold (NaN, infinity).
#include "cpu/packed/call.h"
#include "cpu/base/scratch.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(BQNN_EMULATE_TILES)
#include "tests/tiles.h"
#endif

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,fma,amx-tile,amx-bf16,amx-int8")

namespace bqnn {

namespace avx512 {
void linear(const LinearCall& call, const Parallel& parallel);
void conv2d(const Conv2dCall& call, const Parallel& parallel);
}  // namespace avx512

namespace amx {

#include "cpu/packed/shared.inl"

#include "cpu/packed/amx/tile.inl"

#include "cpu/packed/amx/operands.inl"

constexpr int64_t kTileBytes = 1024;

// Tiles 0..3 hold products, 4 and 5 activations, 6 and 7 weights. GCC 12 does not tell its optimiser that ldtilecfg
// reads the whole structure: volatile keeps the stores.
struct TileConfig {
  explicit TileConfig(int rows) {
    alignas(64) volatile uint8_t config[64] = {};
    config[0] = 1;
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 64;
      config[48 + t] = static_cast<uint8_t>(t < 6 ? rows : 16);
    }
    _tile_loadconfig(const_cast<const uint8_t*>(config));
  }
  ~TileConfig() { _tile_release(); }
};

#define BQNN_LOAD(tile, base, stride) _tile_loadd(tile, base, static_cast<size_t>(stride))

enum class Kind { bf16, s8 };

#define BQNN_DOT(c, a, b)             \
  do {                                \
    if constexpr (kind == Kind::bf16) \
      _tile_dpbf16ps(c, a, b);        \
    else                              \
      _tile_dpbssd(c, a, b);          \
  } while (0)

// A product of one or two tiles with one or two blocks, or of up to four tiles with one block, over all steps of a run.
// Of the nine products of three parts with three, the six above 2^-24 of the whole are added, or all three of three
// parts with one, in one order whatever the shape: a result does not depend on how the rows of a batch are cut into
// tasks.
template <Kind kind, int kParts, int kLevelParts, int kTiles, int kBlocks>
__attribute__((noinline)) void multiply_tiles(const char* const* tiles, int64_t stride, int64_t step_stride,
                                              int64_t part_stride, const Run& run, const char* panel,
                                              int64_t panel_stride, void* out, bool accumulate) {
  constexpr int64_t kRow = kWidth * 4;
  char* c = static_cast<char*>(out);
  const char *b0 = panel, *b1 = panel + panel_stride;
  if (accumulate) {
    BQNN_LOAD(0, c, kRow);
    if constexpr (kTiles == 2 && kBlocks == 2) {
      BQNN_LOAD(1, c + 64, kRow);
      BQNN_LOAD(2, c + 16 * kRow, kRow);
      BQNN_LOAD(3, c + 16 * kRow + 64, kRow);
    } else if constexpr (kTiles == 1) {
      if constexpr (kBlocks > 1) BQNN_LOAD(1, c + 64, kRow);
    } else {
      if constexpr (kTiles > 1) BQNN_LOAD(1, c + 16 * kRow, kRow);
      if constexpr (kTiles > 2) BQNN_LOAD(2, c + 32 * kRow, kRow);
      if constexpr (kTiles > 3) BQNN_LOAD(3, c + 48 * kRow, kRow);
    }
  } else {
    _tile_zero(0);
    if constexpr (kTiles * kBlocks > 1) _tile_zero(1);
    if constexpr (kTiles * kBlocks > 2) _tile_zero(2);
    if constexpr (kTiles * kBlocks > 3) _tile_zero(3);
  }
  const char *a0 = tiles[0], *a1 = tiles[kTiles > 1 ? 1 : 0], *a2 = tiles[kTiles > 2 ? 2 : 0],
             *a3 = tiles[kTiles > 3 ? 3 : 0];
  for (int s = 0; s < run.segments; ++s) {
    int64_t at = run.offset[s];
    for (int64_t step = 0; step < run.steps; ++step, at += step_stride) {
      const auto a = [&](int tile, int part) {
        return (tile == 0 ? a0 : tile == 1 ? a1 : tile == 2 ? a2 : a3) + at + part * part_stride;
      };
      if constexpr (kTiles == 2 && kBlocks == 2) {
        const auto square = [&] {
          BQNN_DOT(0, 4, 6);
          BQNN_DOT(1, 4, 7);
          BQNN_DOT(2, 5, 6);
          BQNN_DOT(3, 5, 7);
        };
        const auto load_a = [&](int part) {
          BQNN_LOAD(4, a(0, part), stride);
          BQNN_LOAD(5, a(1, part), stride);
        };
        const auto load_b = [&](int part) {
          BQNN_LOAD(6, b0 + part * kTileBytes, 64);
          BQNN_LOAD(7, b1 + part * kTileBytes, 64);
        };
        if constexpr (kParts == 1) {
          load_b(0), load_a(0), square();
        } else if constexpr (kLevelParts == 1) {
          load_b(0);
          load_a(2), square();
          load_a(1), square();
          load_a(0), square();
        } else {
          load_a(0), load_b(2), square();
          load_b(1), square();
          load_a(1), square();
          load_a(2), load_b(0), square();
          load_a(1), square();
          load_a(0), square();
        }
      } else if constexpr (kTiles == 1) {
        const auto row = [&](int part) {
          BQNN_LOAD(6, b0 + part * kTileBytes, 64);
          BQNN_DOT(0, 4, 6);
          if constexpr (kBlocks > 1) {
            BQNN_LOAD(7, b1 + part * kTileBytes, 64);
            BQNN_DOT(1, 4, 7);
          }
        };
        if constexpr (kLevelParts == 1) {
          BQNN_LOAD(6, b0, 64);
          if constexpr (kBlocks > 1) BQNN_LOAD(7, b1, 64);
          for (int part = kParts - 1; part >= 0; --part) {
            BQNN_LOAD(4, a(0, part), stride);
            BQNN_DOT(0, 4, 6);
            if constexpr (kBlocks > 1) BQNN_DOT(1, 4, 7);
          }
        } else {
          BQNN_LOAD(4, a(0, 0), stride);
          row(2), row(1);
          BQNN_LOAD(4, a(0, 1), stride);
          row(1);
          BQNN_LOAD(4, a(0, 2), stride);
          row(0);
          BQNN_LOAD(4, a(0, 1), stride);
          row(0);
          BQNN_LOAD(4, a(0, 0), stride);
          row(0);
        }
      } else {  // one block of channels
        const auto column = [&](int part) {
          BQNN_LOAD(4, a(0, part), stride);
          BQNN_DOT(0, 4, 6);
          BQNN_LOAD(5, a(1, part), stride);
          BQNN_DOT(1, 5, 6);
          if constexpr (kTiles > 2) {
            BQNN_LOAD(4, a(2, part), stride);
            BQNN_DOT(2, 4, 6);
          }
          if constexpr (kTiles > 3) {
            BQNN_LOAD(5, a(3, part), stride);
            BQNN_DOT(3, 5, 6);
          }
        };
        if constexpr (kLevelParts == 1) {
          BQNN_LOAD(6, b0, 64);
          for (int part = kParts - 1; part >= 0; --part) column(part);
        } else {
          BQNN_LOAD(6, b0 + 2 * kTileBytes, 64);
          column(0);
          BQNN_LOAD(6, b0 + kTileBytes, 64);
          column(0), column(1);
          BQNN_LOAD(6, b0, 64);
          column(2), column(1), column(0);
        }
      }
      b0 += kLevelParts * kTileBytes, b1 += kLevelParts * kTileBytes;
    }
  }
  _tile_stored(0, c, kRow);
  if constexpr (kTiles == 2 && kBlocks == 2) {
    _tile_stored(1, c + 64, kRow);
    _tile_stored(2, c + 16 * kRow, kRow);
    _tile_stored(3, c + 16 * kRow + 64, kRow);
  } else if constexpr (kTiles == 1) {
    if constexpr (kBlocks > 1) _tile_stored(1, c + 64, kRow);
  } else {
    if constexpr (kTiles > 1) _tile_stored(1, c + 16 * kRow, kRow);
    if constexpr (kTiles > 2) _tile_stored(2, c + 32 * kRow, kRow);
    if constexpr (kTiles > 3) _tile_stored(3, c + 48 * kRow, kRow);
  }
}

// [tiles * 16] positions times [blocks * 16] channels, one or two blocks, in whatever tiles fit best.
template <Kind kind, int kParts, int kLevelParts>
inline void multiply_amx(int tiles, int blocks, const Strip& strip, const Run& run, const char* panel,
                         int64_t panel_stride, void* out, bool accumulate) {
  const auto part_of = [&](int tile, int block, auto call) {
    call(strip.tile + tile, panel + block * panel_stride,
         static_cast<char*>(out) + (tile * 16 * kWidth + block * 16) * 4);
  };
#define BQNN_PRODUCT(t, b)                                                                                   \
  [&](const char* const* tile, const char* p, void* o) {                                                     \
    multiply_tiles<kind, kParts, kLevelParts, t, b>(tile, strip.row, strip.step, strip.part, run, p,         \
                                                    panel_stride, o, accumulate);                            \
  }
  if (tiles == 1) {
    if (blocks == 2) return part_of(0, 0, BQNN_PRODUCT(1, 2));
    return part_of(0, 0, BQNN_PRODUCT(1, 1));
  }
  int block = 0;
  for (; block + 2 <= blocks; block += 2) {
    int tile = 0;
    for (; tile + 2 <= tiles; tile += 2) part_of(tile, block, BQNN_PRODUCT(2, 2));
    if (tile < tiles) part_of(tile, block, BQNN_PRODUCT(1, 2));
  }
  if (block == blocks) return;
  if (tiles == 4) return part_of(0, block, BQNN_PRODUCT(4, 1));
  if (tiles == 3) return part_of(0, block, BQNN_PRODUCT(3, 1));
  return part_of(0, block, BQNN_PRODUCT(2, 1));
#undef BQNN_PRODUCT
}

// Clears the rows of a decoded tile that lie beyond `left` weights: what the activations hold there belongs to others.
template <int kUnit>
inline void clear_beyond(char* tile, int64_t left) {
  for (int64_t row = left / kUnit; row < 16; ++row) {
    const int64_t kept = left - row * kUnit;  // weights of this row
    const __m512i keep = _mm512_set1_epi32(kept <= 0 ? 0 : static_cast<int>((1u << (kept * 32 / kUnit)) - 1));
    _mm512_store_si512(tile + row * 64, _mm512_and_si512(_mm512_load_si512(tile + row * 64), keep));
  }
}

template <class Op>
inline void decode_amx(const PackedLayout& layout, int64_t group, int64_t block, int64_t first, int64_t steps,
                       char* panel) {
  with_codes_of(layout, [&](auto bits, auto shared) {
    typename Op::template Decoder<bits.value, shared.value> decoder;
    decoder.start(layout, (group * layout.blocks + block) * kBlock);
    constexpr int64_t kStep = 64 / Op::kElement, kWords = kStep * bits.value / 32;
    const uint32_t* words = layout.block(group, block) + first * kWords * kBlock;
    int64_t left = layout.segment - first % (layout.padded / kStep) * kStep;  // of the segment, from this step on
    for (int64_t step = 0; step < steps; ++step, words += kWords * kBlock, panel += Op::kLevelParts * kTileBytes) {
      // The words of the next chunk of K follow; without this each chunk begins with the latency of the L3 cache.
      for (int line = 0; line < kWords; ++line)
        _mm_prefetch(reinterpret_cast<const char*>(words + (steps * kWords + line) * kBlock), _MM_HINT_T1);
      decoder(words, panel);
      if (left < kStep)
        for (int p = 0; p < Op::kLevelParts; ++p) clear_beyond<4 / Op::kElement>(panel + p * kTileBytes, left);
      left = left > kStep ? left - kStep : layout.segment;
    }
  });
}

// One tile of activations times up to 4 blocks over all of K: decodes a step while the tiles of the one before are
// multiplied, through a ring that stays in the L1 cache.
template <Kind kind, class Op, int kBlocks>
inline void stream_amx(const PackedLayout& layout, int64_t first_block, const Strip& strip, int64_t steps, void* out) {
  with_codes_of(layout, [&](auto bits, auto shared) {
    constexpr int64_t kStep = 64 / Op::kElement, kWords = kStep * bits.value / 32;
    constexpr int64_t kSlot = 4 * kTileBytes;
    constexpr int kRing = 4;
    constexpr int64_t kAhead = 16;  // steps between the prefetch of words and their use
    alignas(64) char ring[kRing * kSlot];
    typename Op::template Decoder<bits.value, shared.value> decoder[kBlocks];
    const uint32_t* words[kBlocks];
    for (int b = 0; b < kBlocks; ++b) {
      decoder[b].start(layout, (first_block + b) * kBlock);
      words[b] = layout.block(0, first_block + b);
    }
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const auto decode = [&](int64_t step) {
      char* slot = ring + step % kRing * kSlot;
      for (int b = 0; b < kBlocks; ++b) {
        const uint32_t* word = words[b] + step * kWords * kBlock;
        for (int line = 0; line < kWords; ++line)
          _mm_prefetch(reinterpret_cast<const char*>(word + (kAhead * kWords + line) * kBlock), _MM_HINT_T0);
        decoder[b](word, slot + b * kTileBytes);
      }
      const int64_t left = layout.columns - step * kStep;
      if (left < kStep)
        for (int b = 0; b < kBlocks; ++b) clear_beyond<4 / Op::kElement>(slot + b * kTileBytes, left);
    };
    decode(0);
    for (int64_t step = 0; step < steps; ++step) {
      if (step + 1 < steps) decode(step + 1);
      const char* slot = ring + step % kRing * kSlot;
      const char* a = strip.tile[0] + step * strip.step;
      BQNN_LOAD(4, a, strip.row);
      BQNN_LOAD(6, slot, 64);
      BQNN_DOT(0, 4, 6);
      if constexpr (kBlocks == 4) {
        BQNN_LOAD(7, slot + kTileBytes, 64);
        BQNN_DOT(1, 4, 7);
        BQNN_LOAD(6, slot + 2 * kTileBytes, 64);
        BQNN_DOT(2, 4, 6);
        BQNN_LOAD(7, slot + 3 * kTileBytes, 64);
        BQNN_DOT(3, 4, 7);
      }
    }
    char* c = static_cast<char*>(out);
    _tile_stored(0, c, kWidth * 4);
    if constexpr (kBlocks == 4) {
      _tile_stored(1, c + 64, kWidth * 4);
      _tile_stored(2, c + 128, kWidth * 4);
      _tile_stored(3, c + 192, kWidth * 4);
    }
  });
}

template <Kind kind, class Op>
inline void stream_blocks(const PackedLayout& layout, int64_t first_block, int blocks, const Strip& strip,
                          int64_t steps, void* out) {
  if (blocks == 4) return stream_amx<kind, Op, 4>(layout, first_block, strip, steps, out);
  for (int b = 0; b < blocks; ++b)
    stream_amx<kind, Op, 1>(layout, first_block + b, strip, steps, static_cast<char*>(out) + b * 64);
}

// Activations and levels in so many bfloat16 parts. Three of the ones and one of the others: the levels are affine, and
// a product is of their steps.
template <int kActivationParts, int kPartsOfLevels = kActivationParts>
struct Bf16Operand {
  using Product = float;
  static constexpr int kParts = kActivationParts;
  static constexpr int kLevelParts = kPartsOfLevels;
  static constexpr bool kAffine = kLevelParts < kParts;
  static constexpr int kElement = 2;  // bytes of an activation
  static constexpr bool kInt8 = false;
  using Thread = TileConfig;

  // Decodes a step of 32 weights: a tile a part.
  template <int kBits, bool kShared>
  struct Decoder {
    Bf16Decoder<kBits, kShared> part[kLevelParts];

    void start(const PackedLayout& layout, int64_t channel) {
      const float* entries = kAffine ? layout.affine_steps : layout.level_table();
      for (int p = 0; p < kLevelParts; ++p) part[p].start(layout, entries, channel, p);
    }

    __attribute__((noinline)) void operator()(const uint32_t* words, char* tile) const {
#pragma GCC unroll 4
      for (int g = 0; g < kBits; ++g) {
        const __m512i word = _mm512_loadu_si512(words + g * kBlock);
#pragma GCC unroll 16
        for (int r = 0; r < 16 / kBits; ++r) {
          const __m512i shifted = _mm512_srli_epi32(word, r * kBits);
#pragma GCC unroll 3
          for (int p = 0; p < kLevelParts; ++p)
            _mm512_store_si512(tile + p * kTileBytes + (g * (16 / kBits) + r) * 64, part[p](shifted));
        }
      }
    }
  };

  static int64_t panel_bytes(int64_t steps) { return steps * kLevelParts * kTileBytes; }

  static void decode(const PackedLayout& layout, int64_t group, int64_t block, int64_t first, int64_t steps,
                     char* panel) {
    decode_amx<Bf16Operand>(layout, group, block, first, steps, panel);
  }

  static void multiply(int tiles, int blocks, const Strip& strip, const Run& run, const char* panel,
                       int64_t panel_stride, Product* out, bool accumulate) {
    multiply_amx<Kind::bf16, kParts, kLevelParts>(tiles, blocks, strip, run, panel, panel_stride, out, accumulate);
  }

  static void stream(const PackedLayout& layout, int64_t block, int blocks, const Strip& strip, int64_t steps,
                     Product* out) {
    stream_blocks<Kind::bf16, Bf16Operand>(layout, block, blocks, strip, steps, out);
  }

  // Numbers whose products are as they should be: finite, and finite after rounding to bfloat16; sums of them, too.
  static bool fits(__m512 x) { return amx::fits(x, kAffine ? 0x6F800000 : 0x7F7F7FFF); }

  // Writes n <= 32 activations as one 64-byte step of each part; false where one of them does not fit.
  template <class X>
  static bool pack_step(const X* x, int64_t n, const RowScale&, char* to, int64_t part) {
    const __m512 low = load_activations(x, first_lanes(n)),
                 high = load_activations(x + 16, first_lanes(n - 16 > 0 ? n - 16 : 0));
    if constexpr (kParts == 1) {
      _mm512_storeu_si512(to, to_bf16(low, high));
    } else {
      __m512i parts[3];
      split(low, high, parts);
      for (int p = 0; p < 3; ++p) _mm512_storeu_si512(to + p * part, parts[p]);
    }
    return fits(low) && fits(high);
  }

  // Writes n activations next to each other.
  template <class X>
  static bool pack_run(const X* x, int64_t n, const RowScale& scale, char* to, int64_t part) {
    bool all = true;
    int64_t i = 0;
    if constexpr (kParts == 1 && sizeof(X) == 2) {  // nothing to convert
      const __m512i infinity = _mm512_set1_epi16(0x7F80), sign = _mm512_set1_epi16(static_cast<short>(0x8000));
      for (; i < n; i += 32) {
        const __mmask32 lanes = n - i >= 32 ? 0xFFFFFFFFu : (1u << (n - i)) - 1;
        const __m512i v = _mm512_maskz_loadu_epi16(lanes, x + i);
        all &= _mm512_cmpge_epu16_mask(_mm512_andnot_si512(sign, v), infinity) == 0;
        _mm512_mask_storeu_epi16(to + 2 * i, lanes, v);
      }
      return all;
    }
    for (; i + 32 <= n; i += 32) all &= pack_step(x + i, 32, scale, to + 2 * i, part);
    for (; i < n; i += 16) {
      const __m512 v = load_activations(x + i, first_lanes(n - i));
      all &= pack_square(&v, 1, static_cast<int>(n - i < 16 ? n - i : 16), scale, to + 2 * i, 0, part);
    }
    return all;
  }

  // The 16 x 16 values v, positions by activations, go to `to`, `row` bytes from position to position, n of them each.
  static bool pack_square(const __m512* v, int positions, int n, const RowScale&, char* to, int64_t row, int64_t part) {
    bool all = true;
    const __mmask16 lanes = first_lanes(n);
    for (int i = 0; i < positions; ++i) {
      all &= fits(v[i]);
      if constexpr (kParts == 1) {
        _mm256_mask_storeu_epi16(to + i * row, lanes, _mm512_castsi512_si256(to_bf16(v[i], v[i])));
      } else {
        __m512i parts[3];
        split(v[i], v[i], parts);
        for (int p = 0; p < 3; ++p)
          _mm256_mask_storeu_epi16(to + i * row + p * part, lanes, _mm512_castsi512_si256(parts[p]));
      }
    }
    return all;
  }
};

struct Int8Operand {
  using Product = int32_t;
  static constexpr int kParts = 1, kLevelParts = 1;
  static constexpr bool kAffine = false;
  static constexpr int kElement = 1;
  static constexpr bool kInt8 = true;
  using Thread = TileConfig;

  // Decodes a step of 64 weights: one tile.
  template <int kBits, bool kShared>
  struct Decoder {
    Int8Decoder<kBits, kShared> part;

    void start(const PackedLayout& layout, int64_t channel) { part.start(layout, channel); }

    __attribute__((noinline)) void operator()(const uint32_t* words, char* tile) const {
#pragma GCC unroll 8
      for (int g = 0; g < 2 * kBits; ++g) {
        const __m512i word = _mm512_loadu_si512(words + g * kBlock);
#pragma GCC unroll 8
        for (int r = 0; r < 8 / kBits; ++r)
          _mm512_store_si512(tile + (g * (8 / kBits) + r) * 64, part(_mm512_srli_epi32(word, r * kBits)));
      }
    }
  };

  static int64_t panel_bytes(int64_t steps) { return steps * kTileBytes; }

  static void decode(const PackedLayout& layout, int64_t group, int64_t block, int64_t first, int64_t steps,
                     char* panel) {
    decode_amx<Int8Operand>(layout, group, block, first, steps, panel);
  }

  static void multiply(int tiles, int blocks, const Strip& strip, const Run& run, const char* panel,
                       int64_t panel_stride, Product* out, bool accumulate) {
    multiply_amx<Kind::s8, 1, 1>(tiles, blocks, strip, run, panel, panel_stride, out, accumulate);
  }

  static void stream(const PackedLayout& layout, int64_t block, int blocks, const Strip& strip, int64_t steps,
                     Product* out) {
    stream_blocks<Kind::s8, Int8Operand>(layout, block, blocks, strip, steps, out);
  }

  template <class X>
  static bool pack_step(const X* x, int64_t n, const RowScale& scale, char* to, int64_t) {
    _mm512_storeu_si512(to, quantize_step(x, n, scale));
    return true;
  }

  template <class X>
  static bool pack_run(const X* x, int64_t n, const RowScale& scale, char* to, int64_t) {
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) _mm512_storeu_si512(to + i, quantize_step(x + i, 64, scale));
    if (i < n) _mm512_mask_storeu_epi8(to + i, (uint64_t{1} << (n - i)) - 1, quantize_step(x + i, n - i, scale));
    return true;
  }

  static bool pack_square(const __m512* v, int positions, int n, const RowScale& scale, char* to, int64_t row,
                          int64_t) {
    for (int i = 0; i < positions; ++i)
      _mm_mask_storeu_epi8(to + i * row, first_lanes(n), _mm512_cvtsepi32_epi8(quantize(v[i], scale)));
    return true;
  }
};

#include "cpu/packed/amx/linear.inl"

#include "cpu/packed/amx/affine.inl"

#include "cpu/packed/amx/conv2d.inl"

// Measured: float32 in three parts, six products for one, is no faster than FMA in a linear layer; and up to so many
// rows a tile is too empty, and the vector kernels, which write no decoded weights, are faster.
bool better_on_vectors(const LinearCall& call) {
  const PackedLayout& layout = *call.weight;
  return layout.precision == Precision::fp32 || call.rows <= (layout.precision == Precision::int8 ? 4 : 1);
}

// Measured: of 16 channels or fewer, FMA wins where the parts' products are mostly of padding.
bool better_on_vectors(const Conv2dCall& call) {
  const PackedLayout& layout = *call.weight;
  if (layout.precision != Precision::fp32 || layout.blocks > 1) return false;
  const int64_t tiles = (call.out_height * (call.width + 2 * call.padding_w) + kTile - 1) / kTile;
  const int64_t computed = tiles * kTile * layout.segments * layout.padded;
  return computed * 2 > 3 * call.out_height * call.out_width * layout.columns;
}

void linear(const LinearCall& call, const Parallel& parallel) {
  if (better_on_vectors(call)) return avx512::linear(call, parallel);
  const bool done = call.weight->precision == Precision::int8 ? run_linear<Int8Operand>(call, parallel)
                                                              : run_linear<Bf16Operand<1>>(call, parallel);
  if (!done) avx512::linear(call, parallel);
}

void conv2d(const Conv2dCall& call, const Parallel& parallel) {
  if (better_on_vectors(call)) return avx512::conv2d(call, parallel);
  const Precision precision = call.weight->precision;
  const bool done = precision == Precision::int8   ? run_conv2d<Int8Operand>(call, parallel)
                    : precision == Precision::bf16 ? run_conv2d<Bf16Operand<1>>(call, parallel)
                    : call.weight->affine        ? run_conv2d<Bf16Operand<3, 1>>(call, parallel)
                                                 : run_conv2d<Bf16Operand<3>>(call, parallel);
  if (!done) avx512::conv2d(call, parallel);
}

}  // namespace amx
}  // namespace bqnn

#pragma GCC pop_options
#endif
