// How minimal filtering goes on floats: F(2 x 2, 3 x 3) of section 4.1, 16 products in place of 36. Its sums are as near
// to the true ones as those of a plain convolution are. F(4 x 4, 3 x 3) would be off by four times as much, and ten times
// at the most.
struct FilteredFloats {
  using Number = float;
  using Vector = Float;
  static constexpr int kSide = 2, kPerLane = 1, kParts = 1;
  static constexpr int kRows = BQNN_LANES == 16 ? 12 : BQNN_LANES == 8 ? 6 : 2, kFewRows = BQNN_LANES == 4 ? 2 : 4;

  static BQNN_INLINE UInt add_product(UInt x, UInt w, UInt sum) {
    return (UInt)multiply_add((Float)x, (Float)w, (Float)sum);
  }
  static BQNN_INLINE Float load(const char* numbers) { return (Float)load_lanes(numbers); }

  static BQNN_INLINE void transform_inputs(const Float* d, int step, Float* t) {
    t[0] = d[0] - d[2 * step];
    t[1] = d[step] + d[2 * step];
    t[2] = d[2 * step] - d[step];
    t[3] = d[step] - d[3 * step];
  }

  static BQNN_INLINE void transform_filter(const Float* g, int step, Float* u) {
    const Float ends = 0.5f * (g[0] + g[2 * step]), middle = 0.5f * g[step];
    u[0] = g[0];
    u[1] = ends + middle;
    u[2] = ends - middle;
    u[3] = g[2 * step];
  }

  static BQNN_INLINE void transform_outputs(const UInt* m, UInt* y) {
    const auto at = [&](int i) BQNN_LAMBDA { return (Float)m[i]; };
    y[0] = (UInt)(at(0) + at(1) + at(2));
    y[1] = (UInt)(at(1) - at(2) - at(3));
  }

  // The same along both sides: column(j, y) has transformed column j.
  template <class F>
  static BQNN_INLINE void transform_products(const F& column, UInt* y) {
    UInt half[kSide][4];
    BQNN_UNROLL(4) for (int j = 0; j < 4; ++j) {
      UInt of_column[kSide];
      column(j, of_column);
      BQNN_UNROLL(2) for (int i = 0; i < kSide; ++i) half[i][j] = of_column[i];
    }
    BQNN_UNROLL(2) for (int i = 0; i < kSide; ++i) transform_outputs(half[i], y + i * kSide);
  }

  static BQNN_INLINE UInt output(UInt y, int, int) { return y; }

  template <class F>
  static BQNN_INLINE void each_lane(const uint32_t* const* taps, const F& f) {
    Float weights[9];
    BQNN_UNROLL(9) for (int t = 0; t < 9; ++t) weights[t] = (Float)load_lanes(taps[t]);
    f(0, weights);
  }
};
