// What a program calls: kernels on images that lie in its arena, one table an instruction set.
//
// Every kernel takes a range of its units, so that threads may divide a step: rows of images, or parts of a product.
#pragma once

#include <cstdint>

#include "cpu/base/isa.h"
#include "cpu/engine/graph.h"
#include "cpu/packed/layout.h"

namespace bqnn::engine {

// Images of a value in memory: channels of a pixel side by side. Kernels may read kSlack bytes beyond the last one, and
// convolutions on tiles as far as slack_of says.
struct View {
  char* data;  // the first image's first channel of pixel (0, 0)
  Dtype dtype;
  Shape shape;
  int64_t pixel, row, image;  // elements from one to the next
  float scale;                // of uint8
  int zero;

  int64_t bytes(int64_t elements) const { return elements * size_of(dtype); }
  char* at(int64_t image_, int64_t h, int64_t w = 0) const {
    return data + bytes(image_ * image + h * row + w * pixel);
  }
  // Takes so many pixels of a row, which follow each other, for one.
  void fold(int64_t pixels) { shape.width /= pixels, shape.channels *= pixels, pixel *= pixels; }
};

constexpr int64_t kSlack = 128;

// How bytes are made of what a step computes from integers. Folded, the stored number is
//
//     the nearest integer to ((q * scale + bias) + r * ratio), clamped to [low, high],
//
// where q is a sum of products, or a stored number, and r what is added, as it is stored: scales and zeros of all of
// them are in scale, bias and ratio. Of mul, q is the product of the stored numbers less their zeros. Else the real number is computed, activated, and divided by the scale of y.
struct Bytes {
  bool folded = false;
  bool saturates = false;  // clamping to bytes is all there is, and no number is too large for 32 bits
  float ratio = 0.0f, low = 0.0f, high = 255.0f;
};

// The weights of a convolution, as its kernels read them.
struct Conv {
  Window window;
  Activation activation;
  int64_t groups, inputs, group_channels;  // channels of x and of y in a group
  bool integers;                           // whether it multiplies integers
  bool depthwise;                          // a channel a group: no product, but a sum of taps
  int64_t segments, segment;               // runs of K that are contiguous in x, and weights in one
  int64_t lanes;                           // of a panel that a segment takes: its weights, and zeros to whole tiles
  bool tiled;                              // whether AMX multiplies it
  bool gathered;                           // tiled, from copies of the inputs in which segments follow each other
  // So many pixels of a row of y are one, with as many times its channels: few channels leave most of a vector unused.
  // The kernel is wider by the pixels that are added, and the weight has zeros where it does not reach.
  int64_t fold = 1;
  int most_integer = 64;                   // the largest magnitude of the integers
  bool filtered = false;                   // whether minimal filtering has its sums, see winograd.inl
  const PackedLayout* layout = nullptr;    // null where the weight is no codes
  const float* numbers = nullptr;          // [channels, columns], columns in the order of the segments
  const int8_t* integer_numbers = nullptr;
  const uint32_t* panels = nullptr;        // all of them, where they are kept
  // Depthwise, [taps][channels and kSlack / 2 more] floats, or [quads][as many channels][4], with zeros after the taps.
  const float* taps = nullptr;
  const int8_t* integer_taps = nullptr;
  Bytes bytes;
  // A number a channel, and kSlack / 2 more: y = sum * scale + bias; shift is what the zero of x adds to a sum, where
  // bytes are not folded.
  const float *scale, *bias;
  const int32_t* shift;

  int64_t channels() const { return groups * group_channels; }
};

constexpr int64_t kTileRows = 16, kTileLanes = 16;  // positions of a tile of AMX, and lanes of K

// Whether tiles multiply so many positions of a convolution: fewer leave most of a tile unused.
inline bool on_tiles(const Conv& conv, int64_t positions) { return conv.tiled && positions >= kTileRows / 4; }

// Bytes beyond the last image of x that a convolution may read, `step` of which lie from position to position: tiles
// take them sixteen at a time, whether there are as many or not.
inline int64_t slack_of(const Conv& conv, int64_t step) { return kSlack + (conv.tiled ? kTileRows * step : 0); }

// Whether minimal filtering takes less time for so many images, of a strip of so many vectors: of floats, whose last bits
// it changes, whether it does for any. Both are reckoned in cycles of a core with one product instruction of AVX-512 in
// each. Where channels are multiplied as they are, an output of integers takes 9 / 4 for an input and one of floats 9;
// where they are filtered, a tile of 4 x 4 takes 18, or of 2 x 2 floats 16. Then, of a tile, come its inputs, which strips
// share, and its outputs, and once for all the filters.
inline bool by_filtering(const Conv& conv, int64_t images, const Shape& y, int64_t vectors) {
  if (!conv.filtered) return false;
  const int64_t side = conv.integers ? 4 : 2, strips = (conv.group_channels + 31) / 32, inputs = conv.inputs;
  const int64_t tiles = (y.height + side - 1) / side * ((y.width + side - 1) / side);
  int64_t direct = 0, tile = 0, filters = 0;
  if (conv.integers) {
    direct = vectors * (5 * inputs / 2 + 8);
    tile = vectors * (20 * inputs + 330) + 230 * ((inputs + 31) / 32) / strips, filters = 100 * vectors * inputs;
  } else {
    direct = vectors * (10 * inputs + 8);
    tile = vectors * (18 * inputs + 80) + 80 * ((inputs + 15) / 16) / strips, filters = 60 * vectors * inputs, images = 1;
  }
  return images * (y.height * y.width * direct - tiles * tile) > filters;
}

struct ConvCall {
  const Conv* conv;
  View x, y, residual;  // a residual without data is none
  int64_t images;
  bool by_rows = false;  // whether parts of the positions are whole rows

  // The first position of a part.
  int64_t begin_of(int64_t part, int64_t parts) const {
    const int64_t together = by_rows ? y.shape.width : 1, rows = images * y.shape.height;
    return (by_rows ? rows : rows * y.shape.width) * part / parts * together;
  }
};

struct PointCall {  // affine, activation, add, sub, mul, softmax
  Op op;
  Activation activation;
  View a, b, y;
  const float *scale, *shift;  // a number a channel
  Bytes bytes;
};

struct PoolCall {
  Op op;
  Window window;
  View x, y;
};

struct MoveCall {  // pad, slice, reshape, cat's copies
  View x, y;
  Shape from, to, step;  // y[to + i] = x[from + i * step] for i below count
  Shape count;
  bool reshape, fill;    // fill: everything else of y becomes `number` first
  float number;
};

// An input or output of the program, which is somebody else's tensor: [images, channels, height, width].
struct Outside {
  char* data;
  bool bytes;  // uint8 numbers, else float32
  int64_t image, channel, row, pixel;  // elements
};

struct Kernels {
  int strip, lanes;  // channels of a panel, and of a vector
  // 32-bit words of a panel, and what is in it: the weights of a strip of a group.
  int64_t (*panel_words)(const Conv& conv);
  void (*make_panel)(const Conv& conv, int64_t group, int64_t strip, uint32_t* panel);
  // Units: [part][group][strip], so many parts of the positions of all images.
  void (*conv2d)(const ConvCall& call, int64_t parts, int64_t begin, int64_t end);
  // The same of convolutions that are filtered, by units [group][strip][part].
  void (*winograd)(const ConvCall& call, int64_t parts, int64_t begin, int64_t end);
  // And of those that are tiled, by the same units; null where there are no tiles.
  void (*tiled_conv2d)(const ConvCall& call, int64_t parts, int64_t begin, int64_t end);
  // Units: rows of y.
  void (*depthwise)(const ConvCall& call, int64_t begin, int64_t end);
  void (*point)(const PointCall& call, int64_t begin, int64_t end);
  void (*softmax)(const PointCall& call, int64_t begin, int64_t end);
  void (*pool)(const PoolCall& call, int64_t begin, int64_t end);
  void (*move)(const MoveCall& call, int64_t begin, int64_t end);
  void (*read)(const Outside& from, const View& to, int64_t begin, int64_t end);
  void (*write)(const View& from, const Outside& to, int64_t begin, int64_t end);
  const char* name;
};

const Kernels& kernels_of(Isa isa);

}  // namespace bqnn::engine
