// Convolutions of 3 x 3 with a stride of 1 by minimal filtering, F(4 x 4, 3 x 3) of Lavin and Gray ("Fast algorithms for
// convolutional neural networks", CVPR 2016, section 4.3), on integers: 16 outputs take 36 products of 16 bits in place
// of 144 of 8 bits, and are the same sums to the last bit.
//
// A tile of 4 x 4 outputs reads 6 x 6 inputs. Along each side, with the paper's points 0, 1, -1, 2, -2 and infinity,
//
//     t = B' d,  u = G g,  m = t * u,  and y = A' m has an output times 24, 12, 6 and 6,
//
// where the rows of the paper's G are multiplied by as much as makes small integers of them, which A makes up for. So
// every transform is exact: of bytes t is at most 64 * 255, of integers up to 64 u is at most 49 * 64, and both fit 16
// bits. The sums of m, and what A makes of them, are right modulo 2^32. An output times 24 * 24 is 9 * 64 of it: a
// multiplication by the inverse of 9 leaves it times 64, of which the upper 26 bits are the output itself, if it is one
// of 26 bits: what Conv::filtered says.

typedef int16_t Words __attribute__((vector_size(4 * BQNN_LANES)));

constexpr int kSide = kWinogradSide, kReach = kSide + 2, kPoints = kReach * kReach;
constexpr uint32_t kInverseOf9 = 954437177;  // 9 times it is 1 modulo 2^32
constexpr int64_t kTogether = 64 / (kSide * kSide);  // tiles whose outputs are finished together

// Bytes of transformed inputs and of products, which stay in the L2 cache, and of transformed filters.
constexpr int64_t kTileBytes = 3 << 18, kFilterBytes = 5 << 19;

// The sum of products of two 16-bit numbers a lane, modulo 2^32.
BQNN_INLINE UInt add_words(UInt x, UInt w, UInt sum) {
#if BQNN_LANES == 16
  return (UInt)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif BQNN_LANES == 8
  return sum + (UInt)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#else
  const UInt low = (UInt)((Int)(x << 16) >> 16) * (UInt)((Int)(w << 16) >> 16);
  return sum + low + (UInt)((Int)x >> 16) * (UInt)((Int)w >> 16);
#endif
}

// Products [rows][kWidth] of rows of inputs, `step` bytes from one to the next, with the first kCount vectors of a
// strip: kRows at a time, until fewer are left; returns how many these are.
template <int kRows, int kCount>
inline int64_t multiply_rows(const char* x, int64_t step, int64_t rows, const uint32_t* weight, int64_t lanes,
                             uint32_t* products) {
  for (; rows >= kRows; rows -= kRows, x += kRows * step, products += kRows * kWidth) {
    UInt sum[kRows][kCount] = {};
    // Three rows from each of these addresses, which registers hold.
    const char* base[(kRows + 2) / 3];
    BQNN_UNROLL(4) for (int i = 0; i < (kRows + 2) / 3; ++i) base[i] = x + 3 * i * step;
    const uint32_t* w = weight;
    for (int64_t lane = 0; lane < lanes; ++lane, w += kWidth) {
      UInt of[kCount];
      BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v) of[v] = load_lanes(w + v * kLanes);
      BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r) {
        const UInt input = broadcast_lane(base[r / 3] + r % 3 * step + 4 * lane);
        BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v) sum[r][v] = add_words(input, of[v], sum[r][v]);
      }
    }
    BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r)
      BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v)
        __builtin_memcpy(products + r * kWidth + v * kLanes, &sum[r][v], sizeof(UInt));
  }
  return rows;
}

// The same of all rows: as many at a time as fill the registers, and then fewer.
template <int kCount>
__attribute__((noinline)) void multiply_point(const char* x, int64_t step, int64_t rows, const uint32_t* weight,
                                              int64_t lanes, uint32_t* products) {
  constexpr int kMost = BQNN_LANES == 16 ? 12 : BQNN_LANES == 8 ? 4 : 2, kFew = BQNN_LANES == 16 ? 4 : 2;
  const auto from = [&](int64_t first, auto count) BQNN_LAMBDA {
    return rows - multiply_rows<decltype(count)::value, kCount>(x + first * step, step, rows - first, weight, lanes,
                                                                products + first * kWidth);
  };
  from(from(from(0, Constant<kMost>{}), Constant<kFew>{}), Constant<1>{});
}

BQNN_INLINE Words load_words(const char* bytes) {
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
BQNN_INLINE void transform_inputs(const Words* d, int step, Words* t) {
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
BQNN_INLINE void transform_filter(const Words* g, int step, Words* u) {
  const Words a = g[0], b = g[step], c = g[2 * step], ends = a + c, weighted = a + (c << 2), twice = b << 1;
  u[0] = (a << 2) + (a << 1);
  u[1] = -(ends + b);
  u[2] = b - ends;
  u[3] = weighted + twice;
  u[4] = weighted - twice;
  u[5] = (c << 2) + (c << 1);
}

// A', of six sums that are `step` apart: outputs times 24, 12, 6 and 6, so that these bits are left beside a 3.
constexpr int kBitsOf[kSide] = {3, 2, 1, 1};

BQNN_INLINE void transform_outputs(const UInt* m, int step, UInt* y) {
  const UInt m1 = m[step], m2 = m[2 * step], m3 = m[3 * step], m4 = m[4 * step];
  const UInt ones = m1 + m2, one = m1 - m2, twos = m3 + m4, two = m3 - m4;
  y[0] = m[0] + (ones << 2) + twos;
  y[1] = (one << 1) + two;
  y[2] = ones + twos;
  y[3] = one + (two << 1) + m[5 * step];
}

// What a call is divided into, and how far apart the points of its transforms lie: a few cache lines more than they
// take, since 36 streams at a power of two from each other would meet in a few sets of the cache.
struct Winograd {
  int64_t lanes, strips;             // of K; of a group
  int64_t across, down, tiles;       // tiles of an image, and of all
  int64_t together;                  // tiles whose inputs are transformed together
  int64_t input_step, product_step, filter_step;  // from point to point: words of 16 and, the others, of 32 bits

  explicit Winograd(const ConvCall& call) {
    const Conv& conv = *call.conv;
    lanes = conv.inputs / 2, strips = ceil_div(conv.group_channels, kWidth);
    across = ceil_div(call.y.shape.width, kSide), down = ceil_div(call.y.shape.height, kSide);
    tiles = call.images * across * down;
    const int64_t bytes = kPoints * 4 * (lanes + kWidth);
    together = smaller(smaller(kBatch, larger(kTileBytes / bytes / kMostTile * kMostTile, kMostTile)), tiles);
    input_step = together * conv.inputs + 96;
    product_step = together * kWidth + 48;
    filter_step = lanes * kWidth + 48;
  }
};

// The filters of a strip, [point][lane][kWidth] pairs of words, from its panel of bytes.
inline void make_filters(const Conv& conv, const uint32_t* panel, int64_t width, int64_t step, uint32_t* filters) {
  typedef uint8_t Octets __attribute__((vector_size(4 * BQNN_LANES)));
  const int64_t across = conv.inputs / 4;  // lanes of a tap
  int64_t tap[9];
  for (int64_t t = 0; t < 9; ++t)
    tap[t] = (conv.segments == 9 ? t * conv.lanes : t / 3 * conv.lanes + t % 3 * across) * kWidth;
  Octets order;
  for (int i = 0; i < 4 * kLanes; ++i) order[i] = static_cast<uint8_t>(i / 4 * 4 + (i % 4 == 1 ? 2 : i % 4 == 2 ? 1 : i % 4));
  for (int64_t lane = 0; lane < across; ++lane)
    for (int64_t v = 0; v < ceil_div(width, kLanes); ++v) {
      Words pairs[2][9];
      BQNN_UNROLL(9) for (int t = 0; t < 9; ++t) {
        // Bytes 0 and 2, 1 and 3 as words: the low bytes of these are the first pair, and the high ones the second.
        const Words x = (Words)__builtin_shuffle((Octets)load_lanes(panel + tap[t] + lane * kWidth + v * kLanes), order);
        pairs[0][t] = (x << 8) >> 8, pairs[1][t] = x >> 8;
      }
      for (int half = 0; half < 2; ++half) {
        Words rows[kReach * 3], u[kReach];
        uint32_t* to = filters + (2 * lane + half) * kWidth + v * kLanes;
        BQNN_UNROLL(3) for (int j = 0; j < 3; ++j) {
          transform_filter(pairs[half] + j, 3, u);
          BQNN_UNROLL(6) for (int i = 0; i < kReach; ++i) rows[i * 3 + j] = u[i];
        }
        BQNN_UNROLL(6) for (int i = 0; i < kReach; ++i) {
          transform_filter(rows + i * 3, 1, u);
          BQNN_UNROLL(6) for (int j = 0; j < kReach; ++j)
            __builtin_memcpy(to + (i * kReach + j) * step, &u[j], sizeof u[j]);
        }
      }
    }
}

// The inputs of a tile, [point][channel]. Beyond the last channel there is room for a vector.
inline void read_tile(const ConvCall& call, const Winograd& of, int64_t group, int64_t tile, int16_t* inputs) {
  const Window& window = call.conv->window;
  const int64_t image = tile / (of.down * of.across), h = tile / of.across % of.down * kSide - window.top;
  const int64_t w = tile % of.across * kSide - window.left, channels = call.conv->inputs;
  const char* row[kReach];
  int64_t column[kReach];
  // What lies beyond the border goes into outputs that nobody takes.
  for (int64_t i = 0; i < kReach; ++i) {
    row[i] = call.x.at(image, smaller(h + i, call.x.shape.height + window.bottom - 1)) + group * channels;
    column[i] = smaller(w + i, call.x.shape.width + window.right - 1) * call.x.pixel;
  }
  for (int64_t c = 0; c < channels; c += 2 * kLanes) {
    Words half[kPoints], d[kReach], t[kReach];
    BQNN_UNROLL(6) for (int i = 0; i < kReach; ++i) {
      BQNN_UNROLL(6) for (int j = 0; j < kReach; ++j) d[j] = load_words(row[i] + column[j] + c);
      transform_inputs(d, 1, half + i * kReach);
    }
    BQNN_UNROLL(6) for (int j = 0; j < kReach; ++j) {
      transform_inputs(half + j, kReach, t);
      BQNN_UNROLL(6) for (int i = 0; i < kReach; ++i)
        __builtin_memcpy(inputs + (i * kReach + j) * of.input_step + c, &t[i], sizeof t[i]);
    }
  }
}

// The sums [kSide * kSide][kWidth] of a tile's outputs, of the first vectors of a strip.
inline void sum_tile(const uint32_t* products, int64_t step, int64_t vectors, uint32_t* sums) {
  for (int64_t v = 0; v < vectors; ++v, products += kLanes, sums += kLanes) {
    UInt m[kReach], half[kSide * kReach], y[kSide];
    BQNN_UNROLL(6) for (int j = 0; j < kReach; ++j) {
      BQNN_UNROLL(6) for (int i = 0; i < kReach; ++i) m[i] = load_lanes(products + (i * kReach + j) * step);
      transform_outputs(m, 1, y);
      BQNN_UNROLL(4) for (int i = 0; i < kSide; ++i) half[i * kReach + j] = y[i];
    }
    BQNN_UNROLL(4) for (int i = 0; i < kSide; ++i) {
      transform_outputs(half + i * kReach, 1, y);
      BQNN_UNROLL(4) for (int j = 0; j < kSide; ++j) {
        const Int sum = (Int)(y[j] * kInverseOf9) >> (kBitsOf[i] + kBitsOf[j]);
        __builtin_memcpy(sums + (i * kSide + j) * kWidth, &sum, sizeof sum);
      }
    }
  }
}

// The outputs of the tiles [first, first + count) of a strip.
inline void write_tiles(const ConvCall& call, const Winograd& of, int64_t group, int64_t strip, int64_t first,
                        int64_t count, const uint32_t* products) {
  const int64_t height = call.y.shape.height, width = call.y.shape.width;
  const int64_t channels = smaller(call.conv->group_channels - strip * kWidth, kWidth);
  alignas(64) uint32_t sums[kPositions * kWidth];
  Positions at(call);
  for (int64_t i = 0; i < count; i += kTogether) {
    at.num_runs = 0;
    for (int64_t j = 0; j < smaller(kTogether, count - i); ++j) {
      const int64_t tile = first + i + j, image = tile / (of.down * of.across);
      const int64_t h = tile / of.across % of.down * kSide, w = tile % of.across * kSide;
      sum_tile(products + (i + j) * kWidth, of.product_step, ceil_div(channels, kLanes),
               sums + j * kSide * kSide * kWidth);
      for (int64_t r = 0; r < smaller(kSide, height - h); ++r)
        at.add_run(call, (j * kSide + r) * kSide, smaller(kSide, width - w), image, h + r, w);
    }
    finish_batch(call, sums, at, group * call.conv->group_channels + strip * kWidth, channels);
  }
}

inline void run_winograd(const ConvCall& call, int64_t parts, int64_t begin, int64_t end) {
  const Conv& conv = *call.conv;
  const Winograd of(call);
  const int64_t words = panel_words(conv), filter_words = kPoints * of.filter_step;
  // Where one reading is all that there is, strips have it in turns, each with its filters still in the cache.
  const bool once = parts == 1 && of.tiles <= of.together;
  const int64_t most = parts > 1 || once ? 1 : larger(1, smaller(end - begin, kFilterBytes / (4 * filter_words)));
  auto* filters = room<uint32_t>(Scratch::sums, most * filter_words);
  auto* inputs = room<int16_t>(Scratch::activations, kPoints * of.input_step);
  auto* products = room<uint32_t>(Scratch::products, kPoints * of.product_step);
  uint32_t* made = conv.panels == nullptr ? room<uint32_t>(Scratch::panel, words) : nullptr;
  int64_t count = 1, filtered = -1, read = -1;  // the units whose filters are made, and the group whose inputs are
  for (int64_t unit = begin; unit < end; unit += count) {
    const int64_t index = unit / parts, group = index / of.strips, strip = index % of.strips, part = unit % parts;
    count = smaller(most, smaller(end - unit, of.strips - strip));
    const auto width = [&](int64_t s) { return smaller(conv.group_channels - (strip + s) * kWidth, kWidth); };
    for (int64_t s = 0; s < count && index != filtered; ++s) {
      if (made != nullptr) make_panel(conv, group, strip + s, made);
      make_filters(conv, made != nullptr ? made : conv.panels + (index + s) * words, width(s), of.filter_step,
                   filters + s * filter_words);
    }
    filtered = index;
    const int64_t last = of.tiles * (part + 1) / parts;
    for (int64_t first = of.tiles * part / parts; first < last; first += of.together) {
      const int64_t tiles = smaller(of.together, last - first);
      for (int64_t i = 0; i < tiles && !(once && group == read); ++i)
        read_tile(call, of, group, first + i, inputs + i * conv.inputs);
      read = group;
      for (int64_t s = 0; s < count; ++s) {
        const auto multiply = width(s) > kLanes ? &multiply_point<kVectors> : &multiply_point<1>;
        for (int p = 0; p < kPoints; ++p)
          multiply(reinterpret_cast<const char*>(inputs + p * of.input_step), 2 * conv.inputs, tiles,
                   filters + s * filter_words + p * of.filter_step, of.lanes, products + p * of.product_step);
        write_tiles(call, of, group, strip + s, first, tiles, products);
      }
    }
  }
}
