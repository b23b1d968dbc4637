// AMX in plain loops, for the programs of csrc/tests on machines that have AVX-512 but no tiles: the kernels' own code
// runs, and what they ask of the tiles is checked. Tile data is per thread, as it is in hardware.
//
// Included by packed_amx.cpp under BQNN_EMULATE_TILES, after immintrin.h.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace bqnn::tiles {

struct Tile {
  int rows, bytes;  // of a row; 0 where no configuration is loaded
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

// Calls f(sum, a, b) with the 4 bytes of each sum of c, of a row of a and of a column of b, in the order of K.
template <class F>
inline void multiply(int c, int a, int b, const F& f) {
  Tile& to = configured(c);
  const Tile &left = configured(a), &right = configured(b);
  require(to.rows == left.rows && left.bytes == 4 * right.rows && to.bytes == right.bytes, "sizes do not match");
  for (int r = 0; r < to.rows; ++r)
    for (int k = 0; k < right.rows; ++k)
      for (int n = 0; n < to.bytes / 4; ++n) f(to.data[r] + 4 * n, left.data[r] + 4 * k, right.data[k] + 4 * n);
}

inline float normal_or_zero(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7F800000) == 0 ? 0.0f : x;
}

// Denormal numbers count as zeros, of operands and of sums.
inline void dot_bf16(int c, int a, int b) {
  multiply(c, a, b, [](unsigned char* sum, const unsigned char* x, const unsigned char* y) {
    float total;
    std::memcpy(&total, sum, sizeof total);
    for (int i = 0; i < 4; i += 2) {
      const uint32_t x_bits = (x[i] | uint32_t{x[i + 1]} << 8) << 16, y_bits = (y[i] | uint32_t{y[i + 1]} << 8) << 16;
      float x_value, y_value;
      std::memcpy(&x_value, &x_bits, sizeof x_value);
      std::memcpy(&y_value, &y_bits, sizeof y_value);
      const double product = double{normal_or_zero(x_value)} * normal_or_zero(y_value);
      total = normal_or_zero(static_cast<float>(normal_or_zero(total) + product));
    }
    std::memcpy(sum, &total, sizeof total);
  });
}

inline void dot_s8(int c, int a, int b) {
  multiply(c, a, b, [](unsigned char* sum, const unsigned char* x, const unsigned char* y) {
    uint32_t total;  // wraps around
    std::memcpy(&total, sum, sizeof total);
    for (int i = 0; i < 4; ++i)
      total += static_cast<uint32_t>(static_cast<int8_t>(x[i]) * static_cast<int8_t>(y[i]));
    std::memcpy(sum, &total, sizeof total);
  });
}

}  // namespace bqnn::tiles

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig bqnn::tiles::load_config
#define _tile_release bqnn::tiles::release
#define _tile_zero bqnn::tiles::zero
#define _tile_loadd bqnn::tiles::load
#define _tile_stored bqnn::tiles::store
#define _tile_dpbf16ps bqnn::tiles::dot_bf16
#define _tile_dpbssd bqnn::tiles::dot_s8
