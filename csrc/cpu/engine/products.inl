// The product of a few positions and a strip of channels: activations straight from the arena, weights from a panel.

// Running sums of kRows rows by kCount vectors, to which the products of so many lanes of K are added: of x(row, lane)
// and w(row, lane, vector). Rows are positions that have one strip's weights, or strips that have one position's
// inputs: what does not depend on the row is loaded once. A chain is how many lanes are added up in 16 bits first,
// where there is no instruction that adds up bytes in 32.
template <int kRows, int kCount>
struct ByteSums {
  UInt sum[kRows][kCount] = {};

  template <int kLanesOfK, class X, class W>
  BQNN_INLINE void add(const X& x, const W& w) {
#if BQNN_LANES == 8
    __m256i part[kRows][kCount];
    BQNN_UNROLL(8) for (int t = 0; t < kLanesOfK; ++t)
      BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r)
        BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v) {
          const __m256i product = _mm256_maddubs_epi16((__m256i)x(r, t), (__m256i)w(r, t, v));
          part[r][v] = t == 0 ? product : _mm256_add_epi16(part[r][v], product);
          // Else GCC adds up in another order, which takes more registers than there are.
          __asm__("" : "+x"(part[r][v]));
        }
    const __m256i ones = _mm256_set1_epi16(1);
    BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r)
      BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v) sum[r][v] += (UInt)_mm256_madd_epi16(part[r][v], ones);
#else
    BQNN_UNROLL(8) for (int t = 0; t < kLanesOfK; ++t)
      BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r)
        BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v) sum[r][v] = dot(x(r, t), w(r, t, v), sum[r][v]);
#endif
  }

#if BQNN_LANES != 8
  static BQNN_INLINE UInt dot(UInt x, UInt w, UInt sum) {
#if BQNN_LANES == 16
    return Int8Operand::dot(x, w, sum);
#else
    BQNN_UNROLL(4) for (int j = 0; j < 4; ++j) sum += (x >> 8 * j & 255) * (UInt)((Int)(w << (24 - 8 * j)) >> 24);
    return sum;
#endif
  }
#endif
};

template <int kRows, int kCount>
struct FloatSums {
  Float sum[kRows][kCount] = {};

  template <int kLanesOfK, class X, class W>
  BQNN_INLINE void add(const X& x, const W& w) {
    BQNN_UNROLL(8) for (int t = 0; t < kLanesOfK; ++t)
      BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r)
        BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v)
          sum[r][v] = multiply_add((Float)x(r, t), (Float)w(r, t, v), sum[r][v]);
  }
};

// Adds the lanes from *k on, in chains of kChain, then of half as many, down to single ones.
template <int kChain, class Sums, class X, class W>
BQNN_INLINE void add_lanes(Sums& sums, const X& x, const W& w, int64_t lanes, int64_t* k, const uint32_t** weight) {
  for (; *k + kChain <= lanes; *k += kChain, *weight += kChain * kWidth) sums.template add<kChain>(x, w);
  if constexpr (kChain > 1) add_lanes<kChain / 2>(sums, x, w, lanes, k, weight);
}

// Sums from the products [kRows] that are `stride` words apart, unless they are the first ones, and back again.
template <class Sums, int kRows, int kCount, class F>
BQNN_INLINE void add_to_products(uint32_t* products, int64_t stride, bool first, const F& f) {
  Sums sums;
  if (!first)
    BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r)
      BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v)
        __builtin_memcpy(&sums.sum[r][v], products + r * stride + v * kLanes, sizeof(UInt));
  f(sums);
  BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r)
    BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v)
      __builtin_memcpy(products + r * stride + v * kLanes, &sums.sum[r][v], sizeof(UInt));
}

// Adds to products [kRows][kWidth] those of positions and the first kCount vectors of a strip, over a chunk of K: in
// the order of K whatever kRows is.
template <template <int, int> class Sums, int kRows, int kCount, int kChain>
__attribute__((noinline)) void multiply_tile(const char* const* position, const Chunk& chunk, const uint32_t* weight,
                                             uint32_t* products, bool first) {
  add_to_products<Sums<kRows, kCount>, kRows, kCount>(products, kWidth, first, [&](auto& sums) BQNN_LAMBDA {
    const auto w = [&](int, int t, int v) BQNN_LAMBDA { return load_lanes(weight + t * kWidth + v * kLanes); };
    for (const Piece *piece = chunk.pieces, *end = piece + chunk.count; piece < end; ++piece) {
      const char* row[kRows];
      BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r) row[r] = position[r] + piece->offset;
      int64_t k = 0;
      const auto x = [&](int r, int t) BQNN_LAMBDA { return broadcast_lane(row[r] + 4 * (k + t)); };
      add_lanes<kChain>(sums, x, w, piece->lanes, &k, &weight);
    }
  });
}

// The same of one position and kStrips strips, whose panels and products are as many words apart.
template <template <int, int> class Sums, int kStrips, int kCount, int kChain>
__attribute__((noinline)) void multiply_strips(const char* position, const Chunk& chunk, const uint32_t* weight,
                                               int64_t stride, uint32_t* products, bool first) {
  add_to_products<Sums<kStrips, kCount>, kStrips, kCount>(products, kWidth, first, [&](auto& sums) BQNN_LAMBDA {
    const auto w = [&](int strip, int t, int v) BQNN_LAMBDA {
      return load_lanes(weight + strip * stride + t * kWidth + v * kLanes);
    };
    for (const Piece *piece = chunk.pieces, *end = piece + chunk.count; piece < end; ++piece) {
      int64_t k = 0;
      const auto x = [&](int, int t) BQNN_LAMBDA { return broadcast_lane(position + piece->offset + 4 * (k + t)); };
      add_lanes<kChain>(sums, x, w, piece->lanes, &k, &weight);
    }
  });
}

using MultiplyTile = void(const char* const* position, const Chunk& chunk, const uint32_t* weight, uint32_t* products,
                          bool first);
using MultiplyStrips = void(const char* position, const Chunk& chunk, const uint32_t* weight, int64_t stride,
                            uint32_t* products, bool first);

// Strips that are multiplied together where there is one position: each of their sums waits for itself.
constexpr int kStrips = BQNN_LANES == 16 ? 4 : 3;

// The kernels of a call: of a whole tile, of few positions, of one, and of one with kStrips strips.
struct Tiles {
  MultiplyTile *whole, *few, *one;
  MultiplyStrips* strips;
  int rows, few_rows;
};

template <template <int, int> class Sums, int kRows, int kFew, int kCount, int kChain>
constexpr Tiles tiles() {
  return {&multiply_tile<Sums, kRows, kCount, kChain>, &multiply_tile<Sums, kFew, kCount, kChain>,
          &multiply_tile<Sums, 1, kCount, kChain>, &multiply_strips<Sums, kStrips, kVectors, kChain>, kRows, kFew};
}

// As many positions as the sums of their tile fit the registers.
inline Tiles tiles_of(const Conv& conv, int vectors) {
#if BQNN_LANES == 16
  if (conv.integers) return vectors == 1 ? tiles<ByteSums, 12, 4, 1, 1>() : tiles<ByteSums, 12, 4, 2, 1>();
  return vectors == 1 ? tiles<FloatSums, 12, 4, 1, 1>() : tiles<FloatSums, 12, 4, 2, 1>();
#elif BQNN_LANES == 8
  // A sum of 2 * chain products of 255 and the largest integer fits 16 bits.
  if (conv.integers && conv.most_integer <= 8)
    return vectors == 1 ? tiles<ByteSums, 6, 2, 1, 8>() : tiles<ByteSums, 3, 2, 2, 8>();
  if (conv.integers && conv.most_integer <= 16)
    return vectors == 1 ? tiles<ByteSums, 6, 2, 1, 4>() : tiles<ByteSums, 3, 2, 2, 4>();
  if (conv.integers && conv.most_integer <= 32)
    return vectors == 1 ? tiles<ByteSums, 6, 2, 1, 2>() : tiles<ByteSums, 3, 2, 2, 2>();
  if (conv.integers) return vectors == 1 ? tiles<ByteSums, 6, 2, 1, 1>() : tiles<ByteSums, 3, 2, 2, 1>();
  return vectors == 1 ? tiles<FloatSums, 8, 4, 1, 1>() : tiles<FloatSums, 6, 3, 2, 1>();
#else
  if (conv.integers) return tiles<ByteSums, 2, 2, kVectors, 1>();
  return tiles<FloatSums, 2, 2, kVectors, 1>();
#endif
}
