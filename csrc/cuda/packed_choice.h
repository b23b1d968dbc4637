// Which kernel runs a call, and how the device's multiprocessors share it.
#pragma once

#include "cuda/packed_tile.h"

namespace bqnn::cuda {

struct Grid {
  int64_t x;  // blocks of rows of the weight
  int y, z;   // splits of the columns, groups of rows of x
};

template <class T, class Run>
void run_kernel(const PackedLinearCall& call, int parts, const Run& run) {
  const int64_t block_rows = T::kWarpRows * call.row_warps;
  const int group = T::kMaxColumns / parts;
  run.template kernel<T>(
      call, parts, Grid{(call.channels + block_rows - 1) / block_rows, call.splits, (call.rows + group - 1) / group});
}

// Calls run.kernel<Traits>(call, parts, grid) with the kernel for `call`, whose levels fit kCapacity: as many tiles of
// activations as it has columns, three at most, and in groups of rows beyond.
template <int kCapacity, class Run>
void choose(const PackedLinearCall& call, const Run& run) {
  constexpr int kLevelParts = kCapacity == 2 ? 1 : 3;
  const int parts = x_parts(call), columns = call.rows * parts;
  if (call.mode == Mode::fp32) {
    if (columns <= kTileColumns) return run_kernel<LinearTraits<kCapacity, kLevelParts, 1>>(call, parts, run);
    return run_kernel<LinearTraits<kCapacity, kLevelParts, 3>>(call, parts, run);
  }
  if (columns <= kTileColumns) return run_kernel<LinearTraits<kCapacity, 1, 1>>(call, parts, run);
  run_kernel<LinearTraits<kCapacity, 1, 2>>(call, parts, run);
}

struct WarpRows {
  int* rows;

  template <class T>
  void kernel(const PackedLinearCall&, int, Grid) const {
    *rows = T::kWarpRows;
  }
};

// Sets row_warps and splits for a device with so many multiprocessors.
inline void divide(PackedLinearCall* call, int multiprocessors) {
  // A block with fewer bytes of the weight is not worth the second kernel, which adds.
  constexpr int64_t kLeastBytes = 32 << 10;
  // Warps of a block that have rows of their own share the activations that it stages, so the more of these, the more
  // of those. The others share rows and need no second kernel to add what they have.
  call->row_warps = 1;
  while (call->row_warps < kWarps && call->row_warps < call->rows * x_parts(*call)) call->row_warps *= 2;
  call->splits = 1;
  int rows = 0;
  (call->num_levels == 2 ? choose<2, WarpRows> : choose<4, WarpRows>)(*call, {&rows});
  const int64_t block_rows = static_cast<int64_t>(rows) * call->row_warps;
  const int64_t blocks = (call->channels + block_rows - 1) / block_rows;
  if (blocks >= multiprocessors) return;
  const int64_t by_work = block_rows * call->row_loads * 16 / kLeastBytes;
  const int64_t splits = smaller(smaller(2 * multiprocessors / blocks, by_work), (call->row_loads + 3) / 4);
  if (splits > 1) call->splits = static_cast<int32_t>(splits);
}

}  // namespace bqnn::cuda
