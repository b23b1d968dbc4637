// The driver of packed_linear: rows packed once, then tasks of some rows by a strip of channels.
//
// Included inside the namespace of a translation unit that has set the target, after panel.inl.
#pragma once

constexpr int64_t kTaskWork = int64_t{1} << 20;  // products of two numbers that repay waking a thread

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of a task: few enough for their activations to stay in the L2 cache, enough to repay decoding the weights, and
// such that there are tasks for every thread.
inline int64_t rows_of_task(int64_t rows, int64_t row_bytes, int64_t strips, int threads) {
  constexpr int64_t kCache = 1 << 20, kLeast = 8 * kTile, kMost = 64 * kTile;
  int64_t most = kCache / row_bytes;
  most = most < kLeast ? kLeast : most > kMost ? kMost : most;
  int64_t chunks = ceil_div(rows, most);
  while (chunks * strips < threads && rows / chunks > 2 * kTile) ++chunks;
  return ceil_div(ceil_div(rows, chunks), kTile) * kTile;
}

template <class Op, class X>
void run_linear(const LinearCall& call, const Parallel& parallel) {
  using Element = typename Op::Element;
  using Product = typename Op::Product;
  const PackedLayout& layout = *call.weight;
  const X* x = static_cast<const X*>(call.x);
  X* y = static_cast<X*>(call.y);
  const int64_t rows = call.rows, columns = layout.columns, channels = layout.channels;
  if (rows == 0) return;
  const bool bf16 = layout.precision == Precision::bf16;
  // Float activations are multiplied where they are, unless their rows would meet in a few sets of the caches; others
  // are packed, in whole lanes.
  const char* activations = static_cast<const char*>(call.x);
  int64_t row_bytes = columns * static_cast<int64_t>(sizeof(Element));
  auto* scales = reinterpret_cast<float*>(scratch(Scratch::scales, static_cast<size_t>(rows) * sizeof(float)));
  if (Op::kInt8 || bf16 || call.half || (row_bytes % 1024 == 0 && rows > kTile)) {
    row_bytes = (row_bytes + 63) / 64 * 64;
    if (row_bytes % 1024 == 0) row_bytes += 64;
    char* packed = scratch(Scratch::activations, static_cast<size_t>(rows * row_bytes));
    parallel_for(parallel, rows, 1 + (1 << 16) / columns, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const X* from = x + row * columns;
        RowScale scale{};
        if constexpr (Op::kInt8) scale = row_scale(largest(from, columns));
        scales[row] = scale.scale;
        auto* to = reinterpret_cast<Element*>(packed + row * row_bytes);
        pack_row<Op>(from, columns, bf16, scale, to);
        for (int64_t k = columns; k % Op::kUnit; ++k) to[k] = static_cast<Element>(Op::kZero);
      }
    });
    activations = packed;
  }

  const int64_t strips = ceil_div(layout.blocks, kStripBlocks);
  const int64_t chunk = rows_of_task(rows, row_bytes, strips, parallel.threads);
  const int64_t work = (chunk < rows ? chunk : rows) * kWidth * columns;
  parallel_for(parallel, ceil_div(rows, chunk) * strips, 1 + kTaskWork / work, [&](int64_t begin, int64_t end) {
    const auto room = static_cast<size_t>(chunk);
    auto* products = reinterpret_cast<Product*>(scratch(Scratch::products, room * kWidth * sizeof(Product)));
    auto** position = reinterpret_cast<const char**>(scratch(Scratch::positions, (room + kTile) * sizeof(char*)));
    const int64_t offset = 0;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_row = task / strips * chunk, first_block = task % strips * kStripBlocks;
      const int64_t count = rows - first_row < chunk ? rows - first_row : chunk;
      const int blocks = static_cast<int>(layout.blocks - first_block < kStripBlocks ? 1 : kStripBlocks);
      for (int64_t i = 0; i < count + kTile; ++i)
        position[i] = activations + (first_row + (i < count ? i : count - 1)) * row_bytes;
      multiply_strip<Op>(layout, 0, first_block, blocks, position, count, &offset, products);
      const int64_t channel = first_block * kBlock;
      const int64_t width = channels - channel < kWidth ? channels - channel : kWidth;
      const Epilogue strip = epilogue<Op>(call, 0, first_block);
      X* to = y + first_row * channels + channel;
      for (int64_t i = 0; i < count; ++i, to += channels)
        finish_row<Op>(products + i * kWidth, width, strip, scales[first_row + i], to);
    }
  });
}
