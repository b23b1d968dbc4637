// Convolutions whose K is one chunk: a few positions of a row of outputs at a time are multiplied by all of it and
// finished in the registers, so that the next ones are multiplied while these are finished.

// A row of outputs: where the inputs of the first one begin, where it goes, and where its residual is, and how many
// bytes it is from each to the next.
struct OutputRow {
  const char* x;
  char* y;
  const char* residual;
  int64_t step_x, step_y, step_residual;
};

// Adds to sums, of kRows positions whose inputs begin at x, `step` bytes from one to the next, their products by a
// chunk of K. Every address is one register and a multiple of another, so that few registers are taken; the compiler
// would rather make a pointer of each, and keep those in memory.
template <int kRows, int kCount>
BQNN_INLINE void multiply_row(ByteSums<kRows, kCount>& sums, const char* x, int64_t step, const Chunk& chunk,
                              const uint32_t* weight) {
  static_assert(kRows <= 8);
  int64_t steps_3 = 3 * step, steps_5 = 5 * step, steps_7 = 7 * step;
  __asm__("" : "+r"(steps_3), "+r"(steps_5), "+r"(steps_7));
  const Piece *piece = chunk.pieces, *const end = piece + chunk.count;
  do {
    const char* at = x + piece->offset;
    int64_t left = piece->lanes;
    do {
      const auto position = [&](int r) BQNN_LAMBDA {
        return at + (r == 3 ? steps_3 : r == 5 ? steps_5 : r == 6 ? 2 * steps_3 : r == 7 ? steps_7 : r * step);
      };
      sums.template add<1>([&](int r, int) BQNN_LAMBDA { return broadcast_lane(position(r)); },
                           [&](int, int, int v) BQNN_LAMBDA { return load_lanes(weight + v * kLanes); });
      at += 4, weight += kWidth;
      __asm__("" : "+r"(at));
    } while (--left > 0);
  } while (++piece < end);
}

// The positions [w, w + kRows) of a row, and kCount vectors of channels, of which the last one has so many lanes: all
// of them, if it is whole.
template <class F, int kRows, int kCount, bool kWhole>
__attribute__((noinline)) void finish_tile(const F& finish, const OutputRow& row, int64_t w, const Chunk& chunk,
                                           const uint32_t* weight, int64_t channel, int lanes) {
  constexpr int kTogether = kRows * kCount < kBytesTogether ? 1 : kBytesTogether;
  ByteSums<kRows, kCount> sums;
  multiply_row(sums, row.x + w * row.step_x, row.step_x, chunk, weight);
  typename F::Channels of[kCount];
  BQNN_UNROLL(2) for (int v = 0; v < kCount; ++v) of[v] = finish.channels(channel + v * kLanes);
  char* y = row.y + w * row.step_y + channel;
  const char* residual = row.residual + w * row.step_residual;
  const bool dense = row.step_y == kCount * kLanes;  // outputs follow each other
  BQNN_UNROLL(16) for (int i = 0; i < kRows * kCount; i += kTogether) {
    uint8_t* to[kTogether];
    Int bytes[kTogether];
    BQNN_UNROLL(4) for (int j = 0; j < kTogether; ++j) {
      const int r = (i + j) / kCount, v = (i + j) % kCount;
      to[j] = reinterpret_cast<uint8_t*>(y + r * row.step_y) + v * kLanes;
      bytes[j] = finish.value(sums.sum[r][v], of[v], residual + r * row.step_residual, channel + v * kLanes);
    }
    if constexpr (kTogether > 1 && (kWhole || kCount == 1)) {
      if (kWhole && dense)
        store_saturated_together(to[0], bytes);
      else
        store_saturated(to, bytes, kWhole ? kLanes : lanes);
    } else {
      BQNN_UNROLL(4) for (int j = 0; j < kTogether; ++j)
        F::store(to[j], bytes[j], kWhole || (i + j) % kCount < kCount - 1 ? kLanes : lanes);
    }
  }
}

// The positions [first, last) of a row. What is left of them at the end is computed together with a few that have been
// before, since a position alone would wait for its own sums.
template <class F, int kCount, bool kWhole>
inline void finish_row(const F& finish, const OutputRow& row, int64_t first, int64_t last, const Chunk& chunk,
                       const uint32_t* weight, int64_t channel, int lanes) {
  const auto tile = [&](auto rows, int64_t w) {
    finish_tile<F, decltype(rows)::value, kCount, kWhole>(finish, row, w, chunk, weight, channel, lanes);
  };
  int64_t w = first;
  for (; w + 8 <= last; w += 8) tile(Constant<8>{}, w);
  if (last - w > 4 && last - 8 >= first) return tile(Constant<8>{}, last - 8);
  for (; w + 4 <= last; w += 4) tile(Constant<4>{}, w);
  if (w < last && last - 4 >= first) return tile(Constant<4>{}, last - 4);
  for (; w < last; ++w) tile(Constant<1>{}, w);
}

// The positions [first, last) of all images, and a strip of a group.
template <class F>
inline void finish_positions(const F& finish, const ConvCall& call, const Chunk& chunk, const uint32_t* weight,
                             int64_t group, int64_t strip, int64_t first, int64_t last) {
  const Conv& conv = *call.conv;
  const Window& window = conv.window;
  const View &x = call.x, &y = call.y, &residual = call.residual;
  const bool one = y.shape.height * y.shape.width == 1;  // an image: they make a row
  const int64_t width = one ? call.images : y.shape.width, height = y.shape.height;
  const int64_t before = strip * kWidth, count = smaller(conv.group_channels - before, kWidth);
  const int64_t channel = group * conv.group_channels + before;
  const int lanes = static_cast<int>(count > kLanes ? count - kLanes : count);
  const bool whole = lanes == kLanes;
  const auto of_row = count > kLanes ? (whole ? &finish_row<F, 2, true> : &finish_row<F, 2, false>)
                                     : (whole ? &finish_row<F, 1, true> : &finish_row<F, 1, false>);
  OutputRow row;
  row.step_x = x.bytes(one ? x.image : window.stride_w * x.pixel);
  row.step_y = y.bytes(one ? y.image : y.pixel);
  row.step_residual = residual.bytes(one ? residual.image : residual.pixel);
  int64_t image = first / (width * height), h = first / width % height, w = first % width;
  for (int64_t left = last - first; left > 0; w = 0) {
    const int64_t end = smaller(width, w + left);
    row.x = x.at(image, h * window.stride_h - window.top, -window.left) + x.bytes(group * conv.inputs);
    row.y = y.at(image, h);
    row.residual = residual.data == nullptr ? nullptr : residual.at(image, h);
    of_row(finish, row, w, end, chunk, weight, channel, lanes);
    left -= end - w;
    if (++h == height) h = 0, ++image;
  }
}

// Whether a call is one of those: what it is compiled for once more is bytes, by AVX-512.
inline bool finishes_rows(const ConvCall& call, int64_t chunks) {
  return BQNN_LANES == 16 && chunks == 1 && finishes_bytes(call);
}

// A strip of such a call, at the positions [first, last).
inline void finish_strip(const ConvCall& call, const Chunk& chunk, const uint32_t* weight, int64_t group, int64_t strip,
                         int64_t first, int64_t last) {
  if constexpr (BQNN_LANES == 16)
    with_bytes_finish(call, [&](const auto& finish) {
      finish_positions(finish, call, chunk, weight, group, strip, first, last);
    });
}
