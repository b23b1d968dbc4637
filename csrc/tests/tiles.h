// AMX in plain loops, for the programs of csrc/tests on machines that have AVX-512 but no tiles: the kernels' own code
// runs, and what they ask of the tiles is checked. Tile data is per thread, as it is in hardware.
//
// Included by packed/amx/amx.cpp and engine/amx.cpp under BQNN_EMULATE_TILES, after immintrin.h.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace bqnn::tiles {

struct Tile {
  int rows, bytes;  // rows, and bytes of a row; 0 where no configuration is loaded
  unsigned char data[16][64];
};

inline thread_local Tile tile[8];

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "tiles: %s\n", what);
  std::abort();
}

inline void load_config(const void* config) {
  const auto* byte = static_cast<const unsigned char*>(config);
  require(byte[0] == 1, "the palette is not 1");
  for (int t = 0; t < 8; ++t) {
    tile[t] = {byte[48 + t], byte[16 + 2 * t] + 256 * byte[17 + 2 * t], {}};
    require(tile[t].rows <= 16 && tile[t].bytes <= 64, "a tile is larger than 16 x 64 bytes");
  }
}

inline void release() {
  for (Tile& t : tile) t.rows = t.bytes = 0;
}

inline Tile& configured(int t) {
  require(tile[t].rows > 0, "no configuration is loaded");
  return tile[t];
}

inline void zero(int t) { std::memset(configured(t).data, 0, sizeof tile[t].data); }

inline void load(int t, const void* base, size_t stride) {
  Tile& to = configured(t);
  for (int r = 0; r < to.rows; ++r)
    std::memcpy(to.data[r], static_cast<const char*>(base) + r * stride, static_cast<size_t>(to.bytes));
}

inline void store(int t, void* base, size_t stride) {
  const Tile& from = configured(t);
  for (int r = 0; r < from.rows; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, from.data[r], static_cast<size_t>(from.bytes));
}

inline void check_sizes(int c, int a, int b) {
  const Tile &to = configured(c), &left = configured(a), &right = configured(b);
  require(to.rows == left.rows && left.bytes == 4 * right.rows && to.bytes == right.bytes, "sizes do not match");
}

// Only tiles are read and written below: nothing for a sanitizer to see, and most of the time of a run.
#define BQNN_TILE_PRODUCT [[gnu::no_sanitize("address", "undefined"), gnu::optimize("O3")]] inline

BQNN_TILE_PRODUCT float normal_or_zero(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits & 0x7F800000) == 0 ? 0 : bits;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Element `half` of 4 bytes.
BQNN_TILE_PRODUCT float bf16_at(const unsigned char* bytes, int half) {
  const uint32_t bits = (bytes[2 * half] | uint32_t{bytes[2 * half + 1]} << 8) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return normal_or_zero(value);
}

// Denormal numbers count as zeros, of operands and of sums.
BQNN_TILE_PRODUCT void dot_bf16(int c, int a, int b) {
  check_sizes(c, a, b);
  const int rows = tile[c].rows, steps = tile[b].rows, columns = tile[c].bytes / 4;
  float sum[16][16], y[2][16];
  for (int r = 0; r < rows; ++r) std::memcpy(sum[r], tile[c].data[r], sizeof sum[r]);
  for (int k = 0; k < steps; ++k) {
    for (int half = 0; half < 2; ++half)
      for (int n = 0; n < columns; ++n) y[half][n] = bf16_at(tile[b].data[k] + 4 * n, half);
    for (int r = 0; r < rows; ++r)
      for (int half = 0; half < 2; ++half) {
        const float x = bf16_at(tile[a].data[r] + 4 * k, half);  // times y is exact
        for (int n = 0; n < columns; ++n) sum[r][n] = normal_or_zero(normal_or_zero(sum[r][n]) + x * y[half][n]);
      }
  }
  for (int r = 0; r < rows; ++r) std::memcpy(tile[c].data[r], sum[r], sizeof sum[r]);
}

template <class X>
BQNN_TILE_PRODUCT void dot_integers(int c, int a, int b) {
  check_sizes(c, a, b);
  const int rows = tile[c].rows, steps = tile[b].rows, columns = tile[c].bytes / 4;
  uint32_t sum[16][16];  // wraps around
  for (int r = 0; r < rows; ++r) std::memcpy(sum[r], tile[c].data[r], sizeof sum[r]);
  for (int k = 0; k < steps; ++k)
    for (int i = 0; i < 4; ++i) {
      int y[16];
      for (int n = 0; n < columns; ++n) y[n] = static_cast<int8_t>(tile[b].data[k][4 * n + i]);
      for (int r = 0; r < rows; ++r) {
        const int x = static_cast<X>(tile[a].data[r][4 * k + i]);
        for (int n = 0; n < columns; ++n) sum[r][n] += static_cast<uint32_t>(x * y[n]);
      }
    }
  for (int r = 0; r < rows; ++r) std::memcpy(tile[c].data[r], sum[r], sizeof sum[r]);
}

#undef BQNN_TILE_PRODUCT

}  // namespace bqnn::tiles

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbusd
#define _tile_loadconfig bqnn::tiles::load_config
#define _tile_release bqnn::tiles::release
#define _tile_zero bqnn::tiles::zero
#define _tile_loadd bqnn::tiles::load
#define _tile_stored bqnn::tiles::store
#define _tile_dpbf16ps bqnn::tiles::dot_bf16
#define _tile_dpbssd bqnn::tiles::dot_integers<int8_t>
#define _tile_dpbusd bqnn::tiles::dot_integers<uint8_t>
