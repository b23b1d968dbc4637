// Products of tiles. A tile is 16 output positions (rows of a linear layer, pixels of a convolution) whose activations
// lie at a constant distance; K is walked in the segments of the layout, in steps of 64 bytes.

constexpr int kTile = 16;             // output positions in a tile
constexpr int kWidth = 64;            // channels that a task computes together, a row of its products
constexpr int kWidthBlocks = kWidth / kBlock;
constexpr int64_t kTileBytes = 1024;  // bytes that a step of a tile takes

// What tiles multiply: operands of the class `Operand`, of which an activation and a level are the sum of one or three.
// Three of the ones and one of the others: the levels are affine, see affine_levels.h, and a product is of their steps.
template <class Operand, int kActivationParts = 1, int kPartsOfLevels = kActivationParts>
struct Tiles {
  using Op = Operand;
  using Element = typename Op::Element;
  using Product = typename Op::Product;
  static constexpr int kActivations = kActivationParts, kLevels = kPartsOfLevels;
  static constexpr bool kAffine = kLevels < kActivations;
  static constexpr int64_t kStep = 64 / sizeof(Element);  // activations
  // Of the nine products of three parts with three, the six above 2^-24 of the whole are added, or all three of three
  // parts with one, in one order whatever the shape: a result does not depend on how the rows of a batch are cut into
  // tasks.
  static constexpr int kProducts = kLevels == 3 ? 6 : kActivations;
  static constexpr int activation_part(int i) { return kLevels == 3 ? "\0\0\1\2\1\0"[i] : kActivations - 1 - i; }
  static constexpr int level_part(int i) { return kLevels == 3 ? "\2\1\1\0\0\0"[i] : 0; }
};

using Int8Tiles = Tiles<SignedOperand>;
using Bfloat16Tiles = Tiles<Bfloat16Operand>;
using SplitTiles = Tiles<Bfloat16Operand, 3>;
using AffineTiles = Tiles<Bfloat16Operand, 3, 1>;

template <class T>
constexpr Dot dot_of() { return T::Op::kInt8 ? Dot::integers : Dot::bfloat16; }

// A product over all steps of a run.
struct Run {
  int segments;
  int64_t steps;           // steps of each segment
  const int64_t* offset;   // [segments]: bytes from a position's first activation to the segment's
  int64_t row, step, part; // bytes from row to row of a tile, from step to step, from a part of activations to the next
  const char* panel;       // [blocks][parts of levels][all steps] of weights
  int64_t panel_part, panel_block;  // bytes from one part of the levels to the next, from one block to the next
};

// Up to four tiles of positions times one block of channels, or two times two.
template <class T, int kTiles, int kBlocks>
__attribute__((noinline)) void multiply_tiles(const char* const* tiles, const Run& run, char* out, bool accumulate) {
  constexpr int64_t kRow = kWidth * 4;
  const auto each_product = [&](const auto& f) __attribute__((always_inline)) {
    unroll<kTiles * kBlocks>([&](auto i) __attribute__((always_inline)) {
      f(i, out + i.value / kBlocks * 16 * kRow + i.value % kBlocks * 64);
    });
  };
  if (accumulate)
    each_product([](auto i, char* at) __attribute__((always_inline)) { load_tile<i.value>(at, kRow); });
  else
    each_product([](auto i, char*) __attribute__((always_inline)) { zero_tile<i.value>(); });
  const char* x[kTiles];
  for (int t = 0; t < kTiles; ++t) x[t] = tiles[t];
  const char* weights = run.panel;
  for (int s = 0; s < run.segments; ++s) {
    int64_t at = run.offset[s];
    for (int64_t step = 0; step < run.steps; ++step, at += run.step, weights += kTileBytes)
      unroll<T::kProducts>([&](auto product) __attribute__((always_inline)) {
        constexpr int i = product.value, last = i == 0 ? 0 : i - 1;
        constexpr int of_x = T::activation_part(i), of_level = T::level_part(i);
        constexpr bool other_x = i == 0 || of_x != T::activation_part(last) || kTiles > 2;
        if constexpr (i == 0 || of_level != T::level_part(last))
          unroll<kBlocks>([&](auto b) __attribute__((always_inline)) {
            load_tile<6 + b.value>(weights + of_level * run.panel_part + b.value * run.panel_block, 64);
          });
        unroll<kTiles>([&](auto t) __attribute__((always_inline)) {
          if constexpr (other_x) load_tile<4 + t.value % 2>(x[t.value] + at + of_x * run.part, run.row);
          unroll<kBlocks>([&](auto b) __attribute__((always_inline)) {
            dot_tiles<dot_of<T>(), t.value * kBlocks + b.value, 4 + t.value % 2, 6 + b.value>();
          });
        });
      });
  }
  each_product([](auto i, char* at) __attribute__((always_inline)) { store_tile<i.value>(at, kRow); });
}

// The tiles that one call multiplies with so many blocks: those of the sums are four.
constexpr int tiles_with(int blocks) { return blocks == 1 ? 4 : 2; }

// [tiles * 16] positions times [blocks * 16] channels, up to tiles_with(blocks) and two.
template <class T>
inline void multiply(const char* const* tile, int tiles, int blocks, const Run& run, typename T::Product* out,
                     bool accumulate) {
  static constexpr decltype(&multiply_tiles<T, 1, 1>) kOf[2][4] = {
      {multiply_tiles<T, 1, 1>, multiply_tiles<T, 2, 1>, multiply_tiles<T, 3, 1>, multiply_tiles<T, 4, 1>},
      {multiply_tiles<T, 1, 2>, multiply_tiles<T, 2, 2>}};
  kOf[blocks - 1][tiles - 1](tile, run, reinterpret_cast<char*>(out), accumulate);
}
