// The driver of packed_linear: rows packed once, then tasks of some rows by a strip of channels.

// Rows of a task: few enough for their activations to stay in the L2 cache, enough to repay decoding the weights, and
// such that there are tasks for every thread.
inline int64_t rows_of_task(int64_t rows, int64_t row_bytes, int64_t strips, int threads) {
  constexpr int64_t kCache = 1 << 20, kLeast = 8 * kTile, kMost = 64 * kTile;
  int64_t most = kCache / row_bytes;
  most = most < kLeast ? kLeast : smaller(most, kMost);
  int64_t chunks = ceil_div(rows, most);
  while (chunks * strips < threads && rows / chunks > 2 * kTile) ++chunks;
  return ceil_div(ceil_div(rows, chunks), kTile) * kTile;
}

// Float activations are multiplied where they are, unless their rows would meet in a few sets of the caches; others are
// packed, in whole lanes.
inline bool needs_packing(const PackedCall& call) {
  const bool meet = call.x.image_stride * 4 % 1024 == 0 && call.images > kTile;
  return call.weight->precision != Precision::fp32 || call.x.dtype != Dtype::float32 || meet;
}

template <class Op>
void run_linear(const PackedCall& call, const Parallel& parallel) {
  using Element = typename Op::Element;
  const PackedLayout& layout = *call.weight;
  const int64_t rows = call.images, columns = layout.columns;
  if (rows == 0) return;
  const char* activations = static_cast<const char*>(call.x.data) + call.x.offset * 4;
  int64_t row_bytes = call.x.image_stride * 4;
  auto* scales = room<float>(Scratch::scales, rows);
  if (needs_packing(call)) {
    row_bytes = ceil_div(columns * static_cast<int64_t>(sizeof(Element)), 64) * 64;
    if (row_bytes % 1024 == 0) row_bytes += 64;
    char* packed = room<char>(Scratch::activations, rows * row_bytes);
    const int64_t padded = ceil_div(columns, Op::kUnit) * Op::kUnit;
    parallel_for(parallel, rows, 1 + (1 << 16) / columns, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        scales[row] = pack_matrix_row<Op>(call, row, padded, reinterpret_cast<Element*>(packed + row * row_bytes));
    });
    activations = packed;
  }

  const int64_t strips = ceil_div(layout.blocks, kStripBlocks);
  const int64_t chunk = rows_of_task(rows, row_bytes, strips, parallel.threads);
  const int64_t work = smaller(chunk, rows) * kWidth * columns;
  parallel_for(parallel, ceil_div(rows, chunk) * strips, 1 + kTaskWork / work, [&](int64_t begin, int64_t end) {
    auto* products = room<typename Op::Product>(Scratch::products, chunk * kWidth);
    auto** position = room<const char*>(Scratch::positions, chunk + kTile);
    const int64_t offset = 0;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_row = task / strips * chunk, first_block = task % strips * kStripBlocks;
      const int64_t count = smaller(rows - first_row, chunk);
      const int blocks = static_cast<int>(layout.blocks - first_block < kStripBlocks ? 1 : kStripBlocks);
      for (int64_t i = 0; i < count + kTile; ++i)
        position[i] = activations + (first_row + smaller(i, count - 1)) * row_bytes;
      multiply_strip<Op>(layout, 0, first_block, blocks, position, count, &offset, products);
      finish_rows<Op>(call, products, kWidth, first_row, count, first_block,
                      smaller(layout.channels - first_block * kBlock, kWidth), scales + first_row);
    }
  });
}
