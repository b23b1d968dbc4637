// Where a convolution finds its inputs and puts its outputs: positions, and the runs of K.

constexpr int kBatch = 48;      // positions whose products are finished together
constexpr int kMostTile = 12;   // positions that are multiplied together at most
constexpr int kPositions = 64;  // that are finished together where tiles multiply

// Some positions: where their inputs begin, which row of the products is theirs, where their outputs go, and where their
// residuals are.
struct Positions {
  const char* x[kPositions];
  int64_t row[kPositions];
  char* y[kPositions];
  const char* residual[kPositions];

  BQNN_INLINE void set(int64_t i, int64_t row_, const char* x_, char* y_, const char* residual_) {
    x[i] = x_, row[i] = row_, y[i] = y_, residual[i] = residual_;
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
  int64_t image = first / (width * height), h = first / width % height, w = first % width;
  const int64_t step_x = call.x.bytes(window.stride_w * call.x.pixel), step_y = call.y.bytes(call.y.pixel);
  const int64_t step_residual = call.residual.bytes(call.residual.pixel);
  const int64_t corner = call.x.bytes(group * conv.inputs);
  for (int64_t i = 0; i < count;) {
    const char* x = call.x.at(image, h * window.stride_h - window.top, w * window.stride_w - window.left) + corner;
    char* y = call.y.at(image, h, w);
    const char* residual = call.residual.data == nullptr ? nullptr : call.residual.at(image, h, w);
    const int64_t end = i + smaller(count - i, width - w);
    for (; i < end; ++i, x += step_x, y += step_y, residual += step_residual)
      at->set(i, i, x, y, residual);
    w = 0;
    if (++h == height) h = 0, ++image;
  }
  for (int64_t i = count; i < count + kMostTile; ++i) at->x[i] = at->x[count - 1];
}

// The pieces of K in chunks of `most` lanes at most; returns how many chunks there are.
inline int64_t plan_chunks(const ConvCall& call, int64_t most, Piece* pieces, Chunk* chunks) {
  const Conv& conv = *call.conv;
  const Window& window = conv.window;
  const int64_t across = conv.segments / window.kernel_h;  // 1, or kernel_w
  int64_t count = 0, used = most, panel = 0;
  Piece* next = pieces;
  for (int64_t s = 0; s < conv.segments; ++s) {
    const int64_t row = s / across * window.dilation_h, column = s % across * window.dilation_w;
    const int64_t offset = call.x.bytes(row * call.x.row + column * call.x.pixel);
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
