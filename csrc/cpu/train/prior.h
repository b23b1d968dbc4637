// What the divergences from priors share: weights with their posteriors and levels, and the gradients of all of them.
#pragma once

#include <cstdint>

#include "cpu/train/blocks.h"

namespace bqnn {

// Weights that share a codebook, in rows: all float32, contiguous.
struct PriorWeights {
  const float* weight;      // [rows, columns]
  const float* log_sigma2;  // [rows, columns]
  const float* levels;      // [rows or 1, num_levels], increasing
  int64_t rows, columns;
  bool per_row;    // whether each row has a codebook of its own
  int num_levels;  // 2..16

  int64_t groups() const { return per_row ? rows : 1; }
  Blocks blocks() const { return Blocks(rows * columns, groups()); }
};

struct PriorGradients {
  float* weight;      // [rows, columns]
  float* log_sigma2;  // [rows, columns]
  float* levels;      // [rows or 1, num_levels]
};

// Weights of one codebook that lie in a row, as a kernel is given them.
struct PriorBlock {
  const float* weight;      // [count]
  const float* log_sigma2;  // [count]
  int64_t count;

  PriorBlock(const PriorWeights& weights, const Block& block)
      : weight(weights.weight + block.first), log_sigma2(weights.log_sigma2 + block.first), count(block.count) {}
};

}  // namespace bqnn
