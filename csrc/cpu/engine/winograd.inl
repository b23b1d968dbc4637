// Convolutions of 3 x 3 with a stride of 1 by minimal filtering, also known as Winograd's, after Lavin and Gray ("Fast
// algorithms for convolutional neural networks", CVPR 2016): the inputs of a tile of outputs, and the filters, are
// transformed along both sides, multiplied point by point and summed over the input channels, and the sums transformed
// into outputs. FilteredWords and FilteredFloats are how that goes.

// Bytes of transformed inputs and of products, which stay in the L2 cache, and of transformed filters.
constexpr int64_t kTileBytes = 3 << 18, kFilterBytes = 5 << 19;

// What a call is divided into, and how far apart the points of its transforms lie: a few cache lines more than they
// take, since streams at a power of two from each other would meet in a few sets of the cache.
template <class Way>
struct Tiling {
  static constexpr int kReach = Way::kSide + 2, kPoints = kReach * kReach;
  static constexpr int kChannels = kLanes * Way::kPerLane;  // of a vector of inputs

  int64_t lanes, strips;         // of K; of a group
  int64_t across, down, tiles;   // tiles of an image, and of all
  int64_t together;              // tiles whose inputs are transformed together
  int64_t input_step, product_step, filter_step;  // from point to point: numbers, and, the others, 32-bit words

  explicit Tiling(const ConvCall& call) {
    const Conv& conv = *call.conv;
    lanes = conv.inputs / Way::kPerLane, strips = ceil_div(conv.group_channels, kWidth);
    across = ceil_div(call.y.shape.width, Way::kSide), down = ceil_div(call.y.shape.height, Way::kSide);
    tiles = call.images * across * down;
    const int64_t most = kTileBytes / (kPoints * 4 * (lanes + kWidth)) / Way::kRows * Way::kRows;
    together = smaller(smaller(kBatch, larger(most, Way::kRows)), tiles);
    input_step = together * conv.inputs + 48 * Way::kPerLane;
    product_step = together * kWidth + 48;
    filter_step = lanes * kWidth + 48;
  }
};

// Products [rows][kWidth] of rows of inputs, `step` bytes from one to the next, with the first kCount vectors of a
// strip: kRows at a time, until fewer are left; returns how many these are.
template <class Way, int kRows, int kCount>
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
        BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v) sum[r][v] = Way::add_product(input, of[v], sum[r][v]);
      }
    }
    BQNN_UNROLL(12) for (int r = 0; r < kRows; ++r)
      BQNN_UNROLL(4) for (int v = 0; v < kCount; ++v)
        __builtin_memcpy(products + r * kWidth + v * kLanes, &sum[r][v], sizeof(UInt));
  }
  return rows;
}

// The same of all rows: as many at a time as fill the registers, and then fewer.
template <class Way, int kCount>
__attribute__((noinline)) void multiply_point(const char* x, int64_t step, int64_t rows, const uint32_t* weight,
                                              int64_t lanes, uint32_t* products) {
  const auto from = [&](int64_t first, auto count) BQNN_LAMBDA {
    return rows - multiply_rows<Way, decltype(count)::value, kCount>(x + first * step, step, rows - first, weight, lanes,
                                                                     products + first * kWidth);
  };
  from(from(from(0, Constant<Way::kRows>{}), Constant<Way::kFewRows>{}), Constant<1>{});
}

// The filters of a strip, [point][lane][kWidth], from its panel.
template <class Way>
inline void make_filters(const Conv& conv, const uint32_t* panel, int64_t width, int64_t step, uint32_t* filters) {
  using Vector = typename Way::Vector;
  constexpr int kReach = Tiling<Way>::kReach;
  const int64_t across = conv.inputs / (Way::kParts * Way::kPerLane);  // lanes of the panel that a tap has
  for (int64_t lane = 0; lane < across; ++lane)
    for (int64_t v = 0; v < ceil_div(width, kLanes); ++v) {
      const uint32_t* taps[9];
      BQNN_UNROLL(9) for (int t = 0; t < 9; ++t) {
        const int64_t first = conv.segments == 9 ? t * conv.lanes : t / 3 * conv.lanes + t % 3 * across;
        taps[t] = panel + (first + lane) * kWidth + v * kLanes;
      }
      Way::each_lane(taps, [&](int part, const Vector* weights) BQNN_LAMBDA {
        Vector rows[kReach * 3], u[kReach];
        uint32_t* to = filters + (Way::kParts * lane + part) * kWidth + v * kLanes;
        BQNN_UNROLL(3) for (int j = 0; j < 3; ++j) {
          Way::transform_filter(weights + j, 3, u);
          BQNN_UNROLL(6) for (int i = 0; i < kReach; ++i) rows[i * 3 + j] = u[i];
        }
        BQNN_UNROLL(6) for (int i = 0; i < kReach; ++i) {
          Way::transform_filter(rows + i * 3, 1, u);
          BQNN_UNROLL(6) for (int j = 0; j < kReach; ++j)
            __builtin_memcpy(to + (i * kReach + j) * step, &u[j], sizeof u[j]);
        }
      });
    }
}

// The inputs of a tile, [point][channel]. Beyond the last channel there is room for a vector.
template <class Way>
inline void read_tile(const ConvCall& call, const Tiling<Way>& of, int64_t group, int64_t tile,
                      typename Way::Number* inputs) {
  using Vector = typename Way::Vector;
  constexpr int kReach = Tiling<Way>::kReach;
  const Window& window = call.conv->window;
  const int64_t image = tile / (of.down * of.across), h = tile / of.across % of.down * Way::kSide - window.top;
  const int64_t w = tile % of.across * Way::kSide - window.left, channels = call.conv->inputs;
  const char* row[kReach];
  int64_t column[kReach];
  // What lies beyond the border goes into outputs that nobody takes.
  for (int64_t i = 0; i < kReach; ++i) {
    row[i] = call.x.at(image, smaller(h + i, call.x.shape.height + window.bottom - 1)) + call.x.bytes(group * channels);
    column[i] = call.x.bytes(smaller(w + i, call.x.shape.width + window.right - 1) * call.x.pixel);
  }
  for (int64_t c = 0; c < channels; c += Tiling<Way>::kChannels) {
    Vector half[kReach * kReach], d[kReach], t[kReach];
    BQNN_UNROLL(6) for (int i = 0; i < kReach; ++i) {
      BQNN_UNROLL(6) for (int j = 0; j < kReach; ++j) d[j] = Way::load(row[i] + column[j] + call.x.bytes(c));
      Way::transform_inputs(d, 1, half + i * kReach);
    }
    BQNN_UNROLL(6) for (int j = 0; j < kReach; ++j) {
      Way::transform_inputs(half + j, kReach, t);
      BQNN_UNROLL(6) for (int i = 0; i < kReach; ++i)
        __builtin_memcpy(inputs + (i * kReach + j) * of.input_step + c, &t[i], sizeof t[i]);
    }
  }
}

// Calls put(vector, row, sums [kSide]) for the rows of a tile's outputs, of the first vectors of a strip.
template <class Way, class F>
BQNN_INLINE void sum_tile(const uint32_t* products, int64_t step, int64_t vectors, const F& put) {
  constexpr int kSide = Way::kSide, kReach = Tiling<Way>::kReach;
  for (int64_t v = 0; v < vectors; ++v, products += kLanes) {
    UInt y[kSide * kSide];
    Way::transform_products(
        [&](int j, UInt* column) BQNN_LAMBDA {
          UInt m[kReach];
          BQNN_UNROLL(6) for (int i = 0; i < kReach; ++i) m[i] = load_lanes(products + (i * kReach + j) * step);
          Way::transform_outputs(m, column);
        },
        y);
    BQNN_UNROLL(4) for (int i = 0; i < kSide; ++i) {
      BQNN_UNROLL(4) for (int j = 0; j < kSide; ++j) y[i * kSide + j] = Way::output(y[i * kSide + j], i, j);
      put(v, i, y + i * kSide);
    }
  }
}

// Where a tile of outputs lies.
struct TilePlace {
  int64_t image, h, w;

  template <class Way>
  TilePlace(const Tiling<Way>& of, int64_t tile)
      : image(tile / (of.down * of.across)), h(tile / of.across % of.down * Way::kSide),
        w(tile % of.across * Way::kSide) {}
};

// The outputs of the tiles [first, first + count) of a strip.
template <class Way>
inline void write_tiles(const ConvCall& call, const Tiling<Way>& of, int64_t group, int64_t strip, int64_t first,
                        int64_t count, const uint32_t* products) {
  constexpr int64_t kSide = Way::kSide, kTogether = kPositions / (kSide * kSide);  // tiles that are finished together
  const int64_t height = call.y.shape.height, width = call.y.shape.width;
  const int64_t channels = smaller(call.conv->group_channels - strip * kWidth, kWidth);
  alignas(64) uint32_t sums[kPositions * kWidth];
  Positions at(call);
  for (int64_t i = 0; i < count; i += kTogether) {
    at.num_runs = 0;
    for (int64_t j = 0; j < smaller(kTogether, count - i); ++j) {
      const TilePlace place(of, first + i + j);
      uint32_t* of_tile = sums + j * kSide * kSide * kWidth;
      sum_tile<Way>(products + (i + j) * kWidth, of.product_step, ceil_div(channels, kLanes),
                    [&](int64_t v, int r, const UInt* y) BQNN_LAMBDA {
                      BQNN_UNROLL(4) for (int c = 0; c < kSide; ++c)
                        __builtin_memcpy(of_tile + (r * kSide + c) * kWidth + v * kLanes, &y[c], sizeof y[c]);
                    });
      for (int64_t r = 0; r < smaller(kSide, height - place.h); ++r)
        at.add_run(call, (j * kSide + r) * kSide, smaller(kSide, width - place.w), place.image, place.h + r, place.w);
    }
    finish_batch(call, sums, at, group * call.conv->group_channels + strip * kWidth, channels);
  }
}

// The same of whole tiles, which are finished in the registers.
template <class Way, class F>
inline void finish_tiles(const F& finish, const ConvCall& call, const Tiling<Way>& of, int64_t group, int64_t strip,
                         int64_t first, int64_t count, const uint32_t* products) {
  constexpr int kSide = Way::kSide;
  const View &y = call.y, &residual = call.residual;
  const int64_t channel = group * call.conv->group_channels + strip * kWidth;
  const int64_t channels = smaller(call.conv->group_channels - strip * kWidth, kWidth);
  typename F::Channels scales[kVectors];
  for (int v = 0; v < kVectors; ++v) scales[v] = finish.channels(channel + (v * kLanes < channels ? v * kLanes : 0));
  for (int64_t i = 0; i < count; ++i, products += kWidth) {
    const TilePlace place(of, first + i);
    char* to = y.at(place.image, place.h, place.w) + channel;
    const char* added = residual.data == nullptr ? nullptr : residual.at(place.image, place.h, place.w) + channel;
    sum_tile<Way>(products, of.product_step, ceil_div(channels, kLanes),
                  [&](int64_t v, int r, const UInt* sum) BQNN_LAMBDA {
                    const int64_t c = v * kLanes;
                    const int lanes = lanes_left(channels - c);
                    BQNN_UNROLL(4) for (int j = 0; j < kSide; j += kBytesTogether) {
                      uint8_t* at[kBytesTogether];
                      Int bytes[kBytesTogether];
                      BQNN_UNROLL(4) for (int k = 0; k < kBytesTogether; ++k) {
                        at[k] = reinterpret_cast<uint8_t*>(to + r * y.row + (j + k) * y.pixel + c);
                        const char* beside = added + r * residual.row + (j + k) * residual.pixel;
                        bytes[k] = finish.value(sum[j + k], scales[v], beside, c);
                      }
                      store_saturated(at, bytes, lanes);
                    }
                  });
  }
}

// Whether they are all whole, and bytes.
template <class Way>
inline bool finishes_whole_tiles(const ConvCall& call) {
  const Shape& y = call.y.shape;
  return finishes_bytes(call) && y.height % Way::kSide == 0 && y.width % Way::kSide == 0;
}

template <class Way>
inline void filter_conv2d(const ConvCall& call, int64_t parts, int64_t begin, int64_t end) {
  using Number = typename Way::Number;
  constexpr int kPoints = Tiling<Way>::kPoints;
  const Conv& conv = *call.conv;
  const Tiling<Way> of(call);
  const int64_t words = panel_words(conv), filter_words = kPoints * of.filter_step;
  // Where one reading is all that there is, strips have it in turns, each with its filters still in the cache.
  const bool once = parts == 1 && of.tiles <= of.together;
  const int64_t most = parts > 1 || once ? 1 : larger(1, smaller(end - begin, kFilterBytes / (4 * filter_words)));
  auto* filters = room<uint32_t>(Scratch::sums, most * filter_words);
  auto* inputs = room<Number>(Scratch::activations, kPoints * of.input_step);
  auto* products = room<uint32_t>(Scratch::products, kPoints * of.product_step);
  uint32_t* made = conv.panels == nullptr ? room<uint32_t>(Scratch::panel, words) : nullptr;
  int64_t count = 1, filtered = -1, read = -1;  // the units whose filters are made, and the group whose inputs are
  for (int64_t unit = begin; unit < end; unit += count) {
    const int64_t index = unit / parts, group = index / of.strips, strip = index % of.strips, part = unit % parts;
    count = smaller(most, smaller(end - unit, of.strips - strip));
    const auto width = [&](int64_t s) { return smaller(conv.group_channels - (strip + s) * kWidth, kWidth); };
    for (int64_t s = 0; s < count && index != filtered; ++s) {
      if (made != nullptr) make_panel(conv, group, strip + s, made);
      make_filters<Way>(conv, made != nullptr ? made : conv.panels + (index + s) * words, width(s), of.filter_step,
                        filters + s * filter_words);
    }
    filtered = index;
    const int64_t last = of.tiles * (part + 1) / parts;
    for (int64_t first = of.tiles * part / parts; first < last; first += of.together) {
      const int64_t tiles = smaller(of.together, last - first);
      for (int64_t i = 0; i < tiles && !(once && group == read); ++i)
        read_tile<Way>(call, of, group, first + i, inputs + i * conv.inputs);
      read = group;
      for (int64_t s = 0; s < count; ++s) {
        const auto multiply = width(s) > kLanes ? &multiply_point<Way, kVectors> : &multiply_point<Way, 1>;
        for (int p = 0; p < kPoints; ++p)
          multiply(reinterpret_cast<const char*>(inputs + p * of.input_step), conv.inputs * sizeof(Number), tiles,
                   filters + s * filter_words + p * of.filter_step, of.lanes, products + p * of.product_step);
        if (finishes_whole_tiles<Way>(call))
          with_bytes_finish(call, [&](const auto& finish) {
            finish_tiles(finish, call, of, group, strip + s, first, tiles, products);
          });
        else
          write_tiles(call, of, group, strip + s, first, tiles, products);
      }
    }
  }
}

inline void run_winograd(const ConvCall& call, int64_t parts, int64_t begin, int64_t end) {
  return call.conv->integers ? filter_conv2d<FilteredWords>(call, parts, begin, end)
                             : filter_conv2d<FilteredFloats>(call, parts, begin, end);
}
