// How minimal filtering goes on bytes: F(4 x 4, 3 x 3), with section 4.3's points 0, 1, -1, 2, -2 and infinity, on
// integers. 16 outputs take 36 products of 16 bits in place of 144 of 8 bits, and are the same sums to the last bit:
// along each side
//
//     t = B' d,  u = G g,  m = t * u,  and y = A' m has an output times 24, 12, 6 and 6,
//
// where the rows of the paper's G are multiplied by as much as makes small integers of them, which A makes up for. So
// every transform is exact: of bytes t is at most 64 * 255, of integers up to 64 u is at most 49 * 64, and both fit 16
// bits. The sums of m, and what A makes of them, are right modulo 2^32. An output times 24 * 24 is 9 * 64 of it: a
// multiplication by the inverse of 9 leaves it times 64, of which the upper 26 bits are the output itself, if it is one
// of 26 bits: what Conv::filtered says.

typedef int16_t Words __attribute__((vector_size(4 * BQNN_LANES)));
typedef uint8_t Octets __attribute__((vector_size(4 * BQNN_LANES)));

struct FilteredWords {
  using Number = int16_t;
  using Vector = Words;
  static constexpr int kSide = 4;                    // outputs of a tile, along each side
  static constexpr int kPerLane = 2, kParts = 2;     // numbers of a lane of K, and such lanes in one of a panel
  // Twelve rows of two vectors fill the registers of AVX-512, and four those of AVX2.
  static constexpr int kRows = BQNN_LANES == 16 ? 12 : BQNN_LANES == 8 ? 4 : 2, kFewRows = BQNN_LANES == 16 ? 4 : 2;
  static constexpr uint32_t kInverseOf9 = 954437177;  // 9 times it is 1 modulo 2^32
  static constexpr int kBits[kSide] = {3, 2, 1, 1};   // of 24, 12, 6 and 6, beside a 3

  static BQNN_INLINE UInt add_product(UInt x, UInt w, UInt sum) {
#if BQNN_LANES == 16
    return (UInt)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif BQNN_LANES == 8
    return sum + (UInt)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#else
    const UInt low = (UInt)((Int)(x << 16) >> 16) * (UInt)((Int)(w << 16) >> 16);
    return sum + low + (UInt)((Int)x >> 16) * (UInt)((Int)w >> 16);
#endif
  }

  static BQNN_INLINE Words load(const char* bytes) {
#if BQNN_LANES == 16
    return (Words)_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
#elif BQNN_LANES == 8
    return (Words)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
#else
    Words x = {};
    for (int i = 0; i < 2 * kLanes; ++i) x[i] = static_cast<uint8_t>(bytes[i]);
    return x;
#endif
  }

  // B', of six inputs that are `step` apart.
  static BQNN_INLINE void transform_inputs(const Words* d, int step, Words* t) {
    const Words d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
    const Words near = d4 - (d2 << 2), far = d3 - (d1 << 2), even = d4 - d2, odd = (d3 - d1) << 1;
    t[0] = near + (d[0] << 2) - d2;
    t[1] = near + far;
    t[2] = near - far;
    t[3] = even + odd;
    t[4] = even - odd;
    t[5] = d[5 * step] - d3 - (odd << 1);
  }

  // G, of three weights that are `step` apart.
  static BQNN_INLINE void transform_filter(const Words* g, int step, Words* u) {
    const Words a = g[0], b = g[step], c = g[2 * step], ends = a + c, weighted = a + (c << 2), twice = b << 1;
    u[0] = (a << 2) + (a << 1);
    u[1] = -(ends + b);
    u[2] = b - ends;
    u[3] = weighted + twice;
    u[4] = weighted - twice;
    u[5] = (c << 2) + (c << 1);
  }

  // A', of six sums.
  static BQNN_INLINE void transform_outputs(const UInt* m, UInt* y) {
    const UInt ones = m[1] + m[2], one = m[1] - m[2], twos = m[3] + m[4], two = m[3] - m[4];
    y[0] = m[0] + (ones << 2) + twos;
    y[1] = (one << 1) + two;
    y[2] = ones + twos;
    y[3] = one + (two << 1) + m[5];
  }

  // The same along both sides: column(j, y) has transformed column j. Outputs are added up column by column, so that
  // the registers are enough for them.
  template <class F>
  static BQNN_INLINE void transform_products(const F& column, UInt* y) {
    UInt a[kSide], b[kSide];
    column(1, a), column(2, b);
    BQNN_UNROLL(4) for (int i = 0; i < kSide; ++i, y += kSide) {
      const UInt ones = a[i] + b[i], one = a[i] - b[i];
      y[0] = ones << 2, y[1] = one << 1, y[2] = ones, y[3] = one;
    }
    y -= kSide * kSide;
    column(3, a), column(4, b);
    BQNN_UNROLL(4) for (int i = 0; i < kSide; ++i, y += kSide) {
      const UInt twos = a[i] + b[i], two = a[i] - b[i];
      y[0] += twos, y[1] += two, y[2] += twos, y[3] += two << 1;
    }
    y -= kSide * kSide;
    column(0, a), column(5, b);
    BQNN_UNROLL(4) for (int i = 0; i < kSide; ++i) y[i * kSide] += a[i], y[i * kSide + 3] += b[i];
  }

  // The output (i, j) of what A leaves of it.
  static BQNN_INLINE UInt output(UInt y, int i, int j) { return (UInt)((Int)(y * kInverseOf9) >> (kBits[i] + kBits[j])); }

  // Calls f(lane of K, weights) for the lanes that a panel has in one: the 3 x 3 weights of a vector of channels, for
  // each lane, from where the panel has the first of each tap. Bytes 0 and 2, 1 and 3 of four inputs are words, of which
  // the low bytes are the first lane's and the high ones the second's.
  template <class F>
  static BQNN_INLINE void each_lane(const uint32_t* const* taps, const F& f) {
    Octets order;
    for (int i = 0; i < 4 * kLanes; ++i)
      order[i] = static_cast<uint8_t>(i % 4 == 1 ? i + 1 : i % 4 == 2 ? i - 1 : i);
    Words first[9], second[9];
    BQNN_UNROLL(9) for (int t = 0; t < 9; ++t) {
      const Words x = (Words)__builtin_shuffle((Octets)load_lanes(taps[t]), order);
      first[t] = (x << 8) >> 8, second[t] = x >> 8;
    }
    f(0, first), f(1, second);
  }
};
