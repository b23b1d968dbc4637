// The kernel of packed_linear for a few rows: packed_tile.h and packed_output.h have what each thread does, this file
// the product and the order of the phases.
//
// Few rows are bound by the weight's bytes. At 2 bits and 4.3 TB/s those are 17e12 weights a second, to each of which
// an H200 could give 0.8 integer instructions. So the products are the tensor cores' even for one row: seven of eight
// columns are then idle, but decoding is all that is left for the other units.
#pragma once

#include "cuda/packed_choice.h"
#include "cuda/packed_output.h"

namespace bqnn::cuda {

__device__ __forceinline__ void multiply_tile(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                              uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Words that are read once: they need not displace activations and levels in the first cache.
__device__ __forceinline__ Unit load_words(const Unit* words) {
  Unit unit;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(unit.words[0]), "=r"(unit.words[1]), "=r"(unit.words[2]), "=r"(unit.words[3])
      : "l"(words));
  return unit;
}

// Grid: [blocks of rows of the weight, splits of the columns, groups of rows of x].
template <class T>
__global__ void __launch_bounds__(kThreads, T::kBlocks)
    packed_linear_fwd_kernel(const __grid_constant__ PackedLinearCall call, int parts) {
  using Code = typename T::Code;
  __shared__ Unit shared[kSharedUnits];
  const Tile<T> tile(call, parts, blockIdx.x, blockIdx.y, blockIdx.z);
  const int thread = threadIdx.x, column_warp = column_warp_of(tile, thread);

  const Unit* words = reinterpret_cast<const Unit*>(call.words);
  int first_load[T::kLaneRows];  // 32 bits: registers are what limits this kernel
#pragma unroll
  for (int i = 0; i < T::kLaneRows; ++i) first_load[i] = load_place(call, tile, thread, i);
  const auto load = [&](Unit(&loads)[T::kLaneRows], int step) {
    const bool inside = loads_in(call, tile, thread, step);
#pragma unroll
    for (int i = 0; i < T::kLaneRows; ++i) loads[i] = inside ? load_words(words + first_load[i] + 4 * step) : Unit{};
  };
  Unit loads[T::kDepth][T::kLaneRows];
  int step = tile.begin + column_warp;
#pragma unroll
  for (int i = 0; i < T::kDepth; ++i) load(loads[i], step + i * tile.column_warps);

  uint32_t tables[T::kLaneRows][T::kParts][Code::kTable + 1];
  if constexpr (Code::kTable > 0) {
    write_tables(call, tile, thread, shared);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < T::kLaneRows; ++i)
#pragma unroll
      for (int part = 0; part < T::kParts; ++part)
        read_table<T>(call, lane_row(tile, thread, i), part, shared, tables[i][part]);
  }

  int place[T::kColumnTiles];
#pragma unroll
  for (int n = 0; n < T::kColumnTiles; ++n) place[n] = x_place(tile, thread, n);
  uint32_t sums[T::kRowTiles][T::kColumnTiles][4] = {};
  uint32_t totals[T::kColumnTiles][2] = {};  // of the activations alone, for capacity 2
  for (int first = tile.begin; first < tile.end; first += tile.slice) {
    __syncthreads();  // what shared memory held has been read
    stage(call, tile, thread, first, shared);
    __syncthreads();
    const int steps = steps_from(tile, first);
    for (int local = column_warp; local < steps; local += T::kDepth * tile.column_warps) {
#pragma unroll
      for (int i = 0; i < T::kDepth; ++i) {
        if (step < tile.end) {
          float products[T::kRowTiles][T::kColumnTiles][4] = {};
          float all[T::kColumnTiles][4] = {};
          const Unit* units = shared + (step - first) * T::kUnits * 4 * tile.columns;
#pragma unroll
          for (int u = 0; u < T::kUnits; ++u, units += 4 * tile.columns) {
            Unit x[T::kColumnTiles];
#pragma unroll
            for (int n = 0; n < T::kColumnTiles; ++n) {
              x[n] = units[place[n]];
              if constexpr (T::kCapacity == 2) {
                multiply_tile(all[n], kOnes, kOnes, kOnes, kOnes, x[n].words[0], x[n].words[1]);
                multiply_tile(all[n], kOnes, kOnes, kOnes, kOnes, x[n].words[2], x[n].words[3]);
              }
            }
#pragma unroll
            for (int tile_row = 0; tile_row < T::kRowTiles; ++tile_row) {
#pragma unroll
              for (int part = 0; part < T::kParts; ++part) {
                uint32_t upper[4], lower[4];  // pairs of row g and of row g + 8
                const int word = u / Code::kQuads, quad = u % Code::kQuads;
                Code::decode(loads[i][2 * tile_row].words[word], quad, tables[2 * tile_row][part], upper);
                Code::decode(loads[i][2 * tile_row + 1].words[word], quad, tables[2 * tile_row + 1][part], lower);
#pragma unroll
                for (int n = 0; n < T::kColumnTiles; ++n) {
                  float(&c)[4] = products[tile_row][n];
                  multiply_tile(c, upper[0], lower[0], upper[1], lower[1], x[n].words[0], x[n].words[1]);
                  multiply_tile(c, upper[2], lower[2], upper[3], lower[3], x[n].words[2], x[n].words[3]);
                }
              }
            }
          }
#pragma unroll
          for (int n = 0; n < T::kColumnTiles; ++n) {
#pragma unroll
            for (int tile_row = 0; tile_row < T::kRowTiles; ++tile_row)
#pragma unroll
              for (int c = 0; c < 4; ++c)
                sums[tile_row][n][c] = add_step(sums[tile_row][n][c], products[tile_row][n][c], call.mode);
            if constexpr (T::kCapacity == 2) {
              for (int c = 0; c < 2; ++c) totals[n][c] = add_step(totals[n][c], all[n][c], call.mode);
            }
          }
        }
        load(loads[i], step + T::kDepth * tile.column_warps);
        step += tile.column_warps;
      }
    }
  }

  __syncthreads();
#pragma unroll
  for (int tile_row = 0; tile_row < T::kRowTiles; ++tile_row)
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        leave_sum(call, tile, thread, tile_row, n, c, sums[tile_row][n][c], totals[n][c % 2], shared);
  __syncthreads();
  gather(call, tile, thread, blockIdx.y, shared);
}

struct Launcher {
  cudaStream_t stream;

  template <class T>
  void kernel(const PackedLinearCall& call, int parts, Grid grid) const {
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    packed_linear_fwd_kernel<T><<<blocks, kThreads, 0, stream>>>(call, parts);
  }
};

// The kernels for up to kCapacity levels: a translation unit each, which compile at the same time.
template <int kCapacity>
void launch(const PackedLinearCall& call, cudaStream_t stream);

}  // namespace bqnn::cuda
