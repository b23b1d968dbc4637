// The tiles of AMX, named by template arguments where the instructions want literals.

// Tiles 0 to 3 hold products, 4 and 5 activations, 6 and 7 weights. GCC 12 does not tell its optimiser that ldtilecfg
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

// What a product of tiles takes: 8-bit integers, unsigned ones times signed ones, or bfloat16.
enum class Dot { integers, bytes, bfloat16 };

#define BQNN_EACH(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7)
#define BQNN_ZERO(t) if constexpr (kIndex == t) _tile_zero(t);
#define BQNN_LOAD(t) if constexpr (kIndex == t) _tile_loadd(t, from, static_cast<size_t>(stride));
#define BQNN_STORE(t) if constexpr (kIndex == t) _tile_stored(t, to, static_cast<size_t>(stride));
#define BQNN_DOT(c, a, b)                                    \
  if constexpr (kProduct == c && kX == a && kWeights == b) { \
    if constexpr (kDot == Dot::integers)                     \
      _tile_dpbssd(c, a, b);                                 \
    else if constexpr (kDot == Dot::bytes)                   \
      _tile_dpbusd(c, a, b);                                 \
    else                                                     \
      _tile_dpbf16ps(c, a, b);                               \
  }
#define BQNN_DOTS(c) BQNN_DOT(c, 4, 6) BQNN_DOT(c, 4, 7) BQNN_DOT(c, 5, 6) BQNN_DOT(c, 5, 7)

template <int kIndex>
BQNN_INLINE void zero_tile() {
  BQNN_EACH(BQNN_ZERO)
}
template <int kIndex>
BQNN_INLINE void load_tile(const char* from, int64_t stride) {
  BQNN_EACH(BQNN_LOAD)
}
template <int kIndex>
BQNN_INLINE void store_tile(char* to, int64_t stride) {
  BQNN_EACH(BQNN_STORE)
}
template <Dot kDot, int kProduct, int kX, int kWeights>
BQNN_INLINE void dot_tiles() {
  BQNN_DOTS(0) BQNN_DOTS(1) BQNN_DOTS(2) BQNN_DOTS(3)
}

#undef BQNN_EACH
#undef BQNN_ZERO
#undef BQNN_LOAD
#undef BQNN_STORE
#undef BQNN_DOT
#undef BQNN_DOTS
