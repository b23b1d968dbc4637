// Where a convolution finds its inputs and puts its outputs: positions, and the runs of K.

constexpr int kBatch = 48;      // positions whose products are finished together
constexpr int kMostTile = 12;   // positions that are multiplied together at most
constexpr int kPositions = 64;  // that are finished together where tiles multiply

// Positions whose outputs lie at one distance from each other: the row of the products that the first one has, where
// its output goes, and its residual is.
struct Run {
  int64_t row, count;
  char* y;
  const char* residual;
};

// Some positions: where the inputs of each begin, and the runs of their outputs, so many bytes from one to the next.
struct Positions {
  const char* x[kPositions];
  Run runs[kPositions];
  int64_t num_runs = 0;
  int64_t step_y, step_residual;

  explicit Positions(const ConvCall& call) {
    const bool one = call.y.shape.height * call.y.shape.width == 1;  // an image
    step_y = call.y.bytes(one ? call.y.image : call.y.pixel);
    step_residual = call.residual.bytes(one ? call.residual.image : call.residual.pixel);
  }

  BQNN_INLINE void add_run(const ConvCall& call, int64_t row, int64_t count, int64_t image, int64_t h, int64_t w) {
    const char* residual = call.residual.data == nullptr ? nullptr : call.residual.at(image, h, w);
    runs[num_runs++] = {row, count, call.y.at(image, h, w), residual};
  }
};

// A run of K that is contiguous in x: where it is, in bytes from a position on, and how many lanes it has.
struct Piece {
  int64_t offset, lanes;
};

// Pieces whose part of a panel stays in the L1 cache while a batch of positions is multiplied by it.
struct Chunk {
  const Piece* pieces;
  int64_t count, panel;  // pieces, and the first word of the panel
};

constexpr int64_t kChunkLanes = 256;

// The positions [first, first + count), counted through the outputs of all images.
inline void place(const ConvCall& call, int64_t group, int64_t first, int64_t count, Positions* at) {
  const Conv& conv = *call.conv;
  const Window& window = conv.window;
  const int64_t width = call.y.shape.width, height = call.y.shape.height;
  const int64_t corner = call.x.bytes(group * conv.inputs);
  at->num_runs = 0;
  if (width * height == 1) {
    at->add_run(call, 0, count, first, 0, 0);
    for (int64_t i = 0; i < count; ++i) at->x[i] = call.x.at(first + i, -window.top, -window.left) + corner;
  } else {
    int64_t image = first / (width * height), h = first / width % height, w = first % width;
    const int64_t step = call.x.bytes(window.stride_w * call.x.pixel);
    for (int64_t i = 0; i < count;) {
      const char* x = call.x.at(image, h * window.stride_h - window.top, w * window.stride_w - window.left) + corner;
      const int64_t here = smaller(count - i, width - w);
      at->add_run(call, i, here, image, h, w);
      for (int64_t j = 0; j < here; ++j, x += step) at->x[i + j] = x;
      i += here, w = 0;
      if (++h == height) h = 0, ++image;
    }
  }
  // A tile that is not full takes the last one again.
  for (int64_t i = count; i < smaller(count + kMostTile, kPositions); ++i) at->x[i] = at->x[count - 1];
}

// Where a segment of K begins, in bytes from a position on.
inline int64_t segment_offset(const ConvCall& call, int64_t segment) {
  const Window& window = call.conv->window;
  const int64_t across = call.conv->segments / window.kernel_h;  // 1, or kernel_w
  return call.x.bytes(segment / across * window.dilation_h * call.x.row +
                      segment % across * window.dilation_w * call.x.pixel);
}

// The pieces of K in chunks of `most` lanes at most; returns how many chunks there are.
inline int64_t plan_chunks(const ConvCall& call, int64_t most, Piece* pieces, Chunk* chunks) {
  const Conv& conv = *call.conv;
  int64_t count = 0, used = most, panel = 0;
  Piece* next = pieces;
  for (int64_t s = 0; s < conv.segments; ++s) {
    const int64_t offset = segment_offset(call, s);
    for (int64_t lane = 0; lane < conv.lanes;) {
      if (used == most) chunks[count++] = {next, 0, panel}, used = 0;
      // A piece as short as a few lanes would not repay its loop.
      int64_t here = smaller(conv.lanes - lane, most - used);
      if (here < conv.lanes - lane && here < 16) {
        used = most;
        continue;
      }
      *next++ = {offset + lane * 4, here};
      ++chunks[count - 1].count;
      lane += here, used += here, panel += here * kWidth;
    }
  }
  return count;
}
