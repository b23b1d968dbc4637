// A weight in blocks of a fixed size, each with one codebook, and the sums over them: the same whatever the threads.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/base/parallel.h"
#include "cpu/train/weights.h"

namespace bqnn {

constexpr int64_t kBlock = 2048;    // weights of a block; sums within one are float32, those of blocks double
constexpr int64_t kBlockGrain = 2;  // so many blocks repay waking a thread

struct Blocks {
  int64_t groups, columns, per_group;

  Blocks(int64_t weights, int64_t groups)
      : groups(groups), columns(groups > 0 ? weights / groups : 0), per_group((columns + kBlock - 1) / kBlock) {}

  int64_t count() const { return groups * per_group; }

  Block operator[](int64_t i) const {
    const int64_t group = i / per_group, from = i % per_group * kBlock;
    return {group, group * columns + from, columns - from < kBlock ? columns - from : kBlock};
  }
};

// Calls body(block, sums) for every block, `sums` being `width` zeros, and adds them up in the order of the blocks:
// out [groups, width].
template <class F>
void sum_over_blocks(const Parallel& parallel, const Blocks& blocks, int64_t width, float* out, const F& body) {
  std::vector<double> sums(blocks.count() * width);
  parallel_for(parallel, blocks.count(), kBlockGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(blocks[i], sums.data() + i * width);
  });
  for (int64_t group = 0; group < blocks.groups; ++group) {
    for (int64_t k = 0; k < width; ++k) {
      double total = 0.0;
      for (int64_t i = 0; i < blocks.per_group; ++i) total += sums[(group * blocks.per_group + i) * width + k];
      out[group * width + k] = static_cast<float>(total);
    }
  }
}

// The sum of body(block), a double, over all blocks of all groups, in their order.
template <class F>
float sum_over_blocks(const Parallel& parallel, const Blocks& blocks, const F& body) {
  std::vector<double> sums(blocks.count());
  parallel_for(parallel, blocks.count(), kBlockGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = body(blocks[i]);
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return static_cast<float>(total);
}

}  // namespace bqnn
