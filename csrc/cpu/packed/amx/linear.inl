// packed_linear on AMX, for one operand class: packs the activations, then computes 64 channels by a chunk of rows at a
// time.
#pragma once

// Steps of K whose decoded weights, of two blocks, stay in the L1 cache.
constexpr int64_t kChunk = 8;

// Where row `row` and step `step` of the packed activations stand: chunk by chunk of K, the tiles of a chunk one after
// the other, so that a product walks through memory in order.
inline int64_t activations_at(int64_t row, int64_t step, int64_t steps, int64_t tiles) {
  const int64_t chunk = step / kChunk, tile = row / kTile;
  const int64_t length = steps - chunk * kChunk < kChunk ? steps - chunk * kChunk : kChunk;
  return (chunk * kChunk * tiles + tile * length + step % kChunk) * 1024 + row % kTile * 64;
}

// Packs the rows [begin, end) of x; false where one does not fit. Rows up to the next tile are left as they are.
template <class Op, class X>
inline bool pack_rows(const PackedLayout& layout, const X* x, int64_t begin, int64_t end, int64_t tiles, char* to,
                      float* scales) {
  constexpr int64_t kStep = 64 / Op::kElement;
  const int64_t columns = layout.columns, steps = layout.padded / kStep;
  bool fits = true;
  for (int64_t row = begin; row < end; ++row) {
    const X* from = x + row * columns;
    RowScale r{};
    if constexpr (Op::kInt8) {
      r = row_scale(largest(from, columns));
      scales[row] = r.scale;
    }
    for (int64_t step = 0; step < steps; ++step) {
      char* at = to + activations_at(row, step, steps, tiles);
      const int64_t k = step * kStep, left = columns - k;
      fits &= Op::pack_step(from + k, left < kStep ? left : kStep, r, at, 0);
    }
  }
  return fits;
}

constexpr int kMaxRowTiles = 32;  // of a task

// How many rows a task takes: few enough for their activations to stay in the L2 cache, enough to repay decoding, and
// such that there are tasks for every thread.
template <class Op>
inline int64_t rows_of_task(const PackedLayout& layout, int64_t rows, int64_t channel_tasks, int threads) {
  constexpr int64_t kCache = 1280 << 10, kLeast = 32;
  int64_t most = kCache / (layout.padded * Op::kElement) / kLeast * kLeast;
  if (most < kLeast) most = kLeast;
  if (most > kMaxRowTiles * kTile) most = kMaxRowTiles * kTile;
  int64_t chunks = (2 * threads + channel_tasks - 1) / channel_tasks;
  if (chunks < (rows + most - 1) / most) chunks = (rows + most - 1) / most;
  return ((rows + chunks - 1) / chunks + kLeast - 1) / kLeast * kLeast;
}

template <class Op, class X>
inline bool run_linear_of(const LinearCall& call, const Parallel& parallel) {
  using Product = typename Op::Product;
  constexpr int64_t kStep = 64 / Op::kElement;
  const PackedLayout& layout = *call.weight;
  const int64_t rows = call.rows, channels = layout.channels, steps = layout.padded / kStep;
  if (rows == 0) return true;
  const int64_t tiles = (rows + kTile - 1) / kTile;
  char* activations = scratch(Scratch::activations, static_cast<size_t>(tiles * steps * 1024));
  float* scales = reinterpret_cast<float*>(scratch(Scratch::scales, static_cast<size_t>(rows) * sizeof(float)));
  const X* x = static_cast<const X*>(call.x);
  X* y = static_cast<X*>(call.y);

  bool fits = true;
  parallel_for(parallel, rows, 1 + (1 << 14) / layout.columns, [&](int64_t begin, int64_t end) {
    if (!pack_rows<Op>(layout, x, begin, end, tiles, activations, scales))
      __atomic_store_n(&fits, false, __ATOMIC_RELAXED);
  });
  if (!fits) return false;

  const int64_t channel_tasks = (layout.blocks + kWidth / kBlock - 1) / (kWidth / kBlock);
  const int64_t chunk = rows_of_task<Op>(layout, rows, channel_tasks, parallel.threads);
  const int64_t row_tasks = (rows + chunk - 1) / chunk, chunk_tiles = chunk / kTile;
  // Tasks below some ten microseconds are not worth another thread.
  const int64_t work = ((chunk < rows ? chunk : rows) + 16) * kWidth * layout.padded;
  parallel_for(parallel, channel_tasks * row_tasks, 1 + (int64_t{1} << 22) / work, [&](int64_t begin, int64_t end) {
    typename Op::Thread thread(rows < kTile ? static_cast<int>(rows) : kTile);
    const int64_t panel_stride = Op::panel_bytes(kChunk);
    char* panel = scratch(Scratch::panel, static_cast<size_t>(2 * panel_stride));
    Product* products =
        reinterpret_cast<Product*>(scratch(Scratch::products, static_cast<size_t>(chunk) * kWidth * sizeof(Product)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_tile = task / channel_tasks * chunk_tiles,
                    first_block = task % channel_tasks * (kWidth / kBlock);
      const int count = static_cast<int>(tiles - first_tile < chunk_tiles ? tiles - first_tile : chunk_tiles);
      const int blocks = static_cast<int>(layout.blocks - first_block < kWidth / kBlock ? layout.blocks - first_block
                                                                                        : kWidth / kBlock);
      const char* tile[kMaxRowTiles] = {activations};
      Strip strip{tile, 64, 1024, 0};
      const bool stream = tiles == 1;
      if (stream) {
        for (int b = 0; b < blocks; b += 4)
          Op::stream(layout, first_block + b, blocks - b < 4 ? blocks - b : 4, strip, steps, products + b * kBlock);
      }
      const int together = blocks == 1 ? 1 : 2, apart = blocks == 1 ? 4 : 2;
      for (int64_t step = 0; step < steps && !stream; step += kChunk) {
        const int64_t now = steps - step < kChunk ? steps - step : kChunk;
        for (int t = 0; t < count; ++t)
          tile[t] = activations + activations_at((first_tile + t) * kTile, step, steps, tiles);
        const int64_t offset = 0;
        const Run run{1, now, &offset};
        for (int b = 0; b < blocks; b += together) {
          const int wide = blocks - b < together ? blocks - b : together;
          for (int i = 0; i < wide; ++i)
            Op::decode(layout, 0, first_block + b + i, step, now, panel + i * panel_stride);
          for (int t = 0; t < count; t += apart) {
            const int high = count - t < apart ? count - t : apart;
            strip.tile = tile + t;
            Op::multiply(high, wide, strip, run, panel, panel_stride, products + t * kTile * kWidth + b * kBlock,
                         step > 0);
          }
        }
      }
      const int64_t channel = first_block * kBlock;
      const int64_t width = channels - channel < kWidth ? channels - channel : kWidth;
      const int64_t first_row = first_tile * kTile, last_row = first_row + count * kTile;
      for (int64_t row = first_row; row < last_row && row < rows; ++row)
        finish_row(products + (row - first_row) * kWidth, 1, width, call.bias ? call.bias + channel : nullptr,
                   Op::kInt8 ? layout.int8_scales() + channel : nullptr, Op::kInt8 ? scales[row] : 1.0f,
                   least_output(call.relu), y + row * channels + channel, channels);
    }
  });
  return true;
}

// Whether all of y was written; if not, an activation does not fit the operands and nothing was.
template <class Op>
inline bool run_linear(const LinearCall& call, const Parallel& parallel) {
  return call.half ? run_linear_of<Op, Bf16>(call, parallel) : run_linear_of<Op, float>(call, parallel);
}
