// The passes over the outputs and inputs of the two products, tile by tile: a tile is loaded into dense float rows,
// one a channel, whatever its memory layout, so that the noise can be made in the outputs' logical order.

constexpr int kTileSize = kTileRows * kTileColumns;

// Rows to columns, in log2(kLanes) rounds of interleaving.
BQNN_INLINE void transpose(Float (&rows)[kLanes]) {
  for (int round = 1; round < kLanes; round *= 2) {
    Float next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave(rows[i], rows[i + kLanes / 2], 0);
      next[2 * i + 1] = interleave(rows[i], rows[i + kLanes / 2], kLanes / 2);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// A tile's first element in memory, and the distance of its rows (planar) or of its columns (interleaved).
BQNN_INLINE int64_t tile_start(const Plane& plane, const PlaneShape& shape, const Tile& tile) {
  const int64_t image = tile.image * shape.channels * shape.pixels;
  if (plane.interleaved) return image + tile.column * shape.channels + tile.row;
  return image + tile.row * shape.pixels + tile.column;
}

inline void load_tile(const Plane& plane, const PlaneShape& shape, const Tile& tile, float* out) {
  const int64_t start = tile_start(plane, shape, tile);
  if (!plane.interleaved) {
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t c = 0; c < tile.columns; c += kLanes) {
        const int count = lanes_left(tile.columns - c);
        store_first(out + r * tile.columns + c, load_elements(plane.elements, start + r * shape.pixels + c, count), count);
      }
    return;
  }
  for (int64_t c = 0; c < tile.columns; c += kLanes)
    for (int64_t r = 0; r < tile.rows; r += kLanes) {
      const int columns = lanes_left(tile.columns - c), rows = lanes_left(tile.rows - r);
      Float block[kLanes] = {};
      for (int i = 0; i < columns; ++i)
        block[i] = load_elements(plane.elements, start + (c + i) * shape.channels + r, rows);
      transpose(block);
      for (int i = 0; i < rows; ++i) store_first(out + (r + i) * tile.columns + c, block[i], columns);
    }
}

inline void store_tile(const Plane& plane, const PlaneShape& shape, const Tile& tile, const float* in) {
  const int64_t start = tile_start(plane, shape, tile);
  if (!plane.interleaved) {
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t c = 0; c < tile.columns; c += kLanes) {
        const int count = lanes_left(tile.columns - c);
        store_elements(plane.elements, start + r * shape.pixels + c, load_first(in + r * tile.columns + c, count), count);
      }
    return;
  }
  for (int64_t c = 0; c < tile.columns; c += kLanes)
    for (int64_t r = 0; r < tile.rows; r += kLanes) {
      const int columns = lanes_left(tile.columns - c), rows = lanes_left(tile.rows - r);
      Float block[kLanes] = {};
      for (int i = 0; i < rows; ++i) block[i] = load_first(in + (r + i) * tile.columns + c, columns);
      transpose(block);
      for (int i = 0; i < columns; ++i)
        store_elements(plane.elements, start + (c + i) * shape.channels + r, block[i], rows);
    }
}

// The noise of a tile; its rows follow each other in the outputs' order where they are whole.
inline void tile_noise(const Noise& noise, const PlaneShape& shape, const Tile& tile, float* out) {
  const int64_t first = (tile.image * shape.channels + tile.row) * shape.pixels + tile.column;
  if (tile.columns == shape.pixels) return fill_normals(noise, first, tile.rows * tile.columns, out);
  for (int64_t r = 0; r < tile.rows; ++r)
    fill_normals(noise, first + r * shape.pixels, tile.columns, out + r * tile.columns);
}

// noise / (2 sqrt(variance)), or 0.
BQNN_INLINE Float slope_of(Float variance, Float epsilon) {
  return select(variance > 0.0f, 0.5f * epsilon * inverse_sqrt(variance), Float{});
}

inline void add_noise_tile(const PlaneShape& shape, const Tile& tile, const Plane& mean, const Plane& variance,
                           const Noise& noise, bool keep_slope) {
  alignas(64) float y[kTileSize], v[kTileSize], epsilon[kTileSize];
  load_tile(mean, shape, tile, y);
  load_tile(variance, shape, tile, v);
  tile_noise(noise, shape, tile, epsilon);
  for (int64_t i = 0; i < tile.rows * tile.columns; i += kLanes) {
    const Float positive = max(Float{}, load(v + i)), e = load(epsilon + i);
    store(y + i, load(y + i) + positive * inverse_sqrt(positive) * e);
    if (keep_slope) store(v + i, slope_of(positive, e));
  }
  store_tile(mean, shape, tile, y);
  if (keep_slope) store_tile(variance, shape, tile, v);
}

inline void noise_gradient_tile(const PlaneShape& shape, const Tile& tile, const Plane& grad, const Plane& variance,
                                const Noise& noise, const Plane& out) {
  alignas(64) float g[kTileSize], v[kTileSize], epsilon[kTileSize];
  load_tile(grad, shape, tile, g);
  load_tile(variance, shape, tile, v);
  tile_noise(noise, shape, tile, epsilon);
  for (int64_t i = 0; i < tile.rows * tile.columns; i += kLanes)
    store(g + i, load(g + i) * slope_of(load(v + i), load(epsilon + i)));
  store_tile(out, shape, tile, g);
}

inline void multiply_tile(const PlaneShape& shape, const Tile& tile, const Plane& grad, const Plane& slope,
                          const Plane& out) {
  alignas(64) float g[kTileSize], s[kTileSize];
  load_tile(grad, shape, tile, g);
  load_tile(slope, shape, tile, s);
  for (int64_t i = 0; i < tile.rows * tile.columns; i += kLanes) store(g + i, load(g + i) * load(s + i));
  store_tile(out, shape, tile, g);
}

inline void square_tile(const PlaneShape& shape, const Tile& tile, const Plane& x, const Plane& out) {
  alignas(64) float t[kTileSize];
  load_tile(x, shape, tile, t);
  for (int64_t i = 0; i < tile.rows * tile.columns; i += kLanes) store(t + i, load(t + i) * load(t + i));
  store_tile(out, shape, tile, t);
}

inline void add_square_gradient_tile(const PlaneShape& shape, const Tile& tile, const Plane& grad, const Plane& x,
                                     const Plane& grad_square) {
  alignas(64) float g[kTileSize], t[kTileSize], s[kTileSize];
  load_tile(grad, shape, tile, g);
  load_tile(x, shape, tile, t);
  load_tile(grad_square, shape, tile, s);
  for (int64_t i = 0; i < tile.rows * tile.columns; i += kLanes)
    store(g + i, load(g + i) + 2.0f * load(t + i) * load(s + i));
  store_tile(grad, shape, tile, g);
}
