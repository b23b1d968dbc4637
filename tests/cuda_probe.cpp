// The kernel of packed_linear on the host: it walks blocks, threads and lanes through the kernel's own functions, with
// the products of mma.m16n8k16 in a plain loop. Built and called by test_cuda_packed_linear.py.

#include <algorithm>
#include <vector>

#include "cuda/packed_choice.h"
#include "cuda/packed_output.h"

namespace bqnn::cuda {
namespace {

// c += a b, of one warp: lane 4 g + t has a(g, 2t), a(g + 8, 2t), a(g, 2t + 8), a(g + 8, 2t + 8), each with the k after
// it; b(2t, g) and b(2t + 8, g) likewise; c(g, 2t), c(g, 2t + 1), c(g + 8, 2t), c(g + 8, 2t + 1).
void multiply_tile(float (*c)[4], const uint32_t (*a)[4], const uint32_t (*b)[2]) {
  const auto element = [](uint32_t pair, int k) { return float_of(k % 2 ? pair & 0xffff0000u : pair << 16); };
  float sums[32][4];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = c[lane][i];
      for (int k = 0; k < 16; ++k)
        sum += element(a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k) *
               element(b[column * 4 + k % 8 / 2][k / 8], k);
      sums[lane][i] = sum;
    }
  std::memcpy(c, sums, sizeof sums);
}

template <class T>
struct Lane {
  uint32_t tables[T::kLaneRows][T::kParts][T::Code::kTable + 1];
  uint32_t sums[T::kRowTiles][T::kColumnTiles][4] = {};
  uint32_t totals[T::kColumnTiles][4] = {};
};

template <class T>
void multiply_step(const PackedLinearCall& call, const Tile<T>& tile, int warp, int step, const Unit* units,
                   Lane<T>* lanes) {
  using Code = typename T::Code;
  float products[T::kRowTiles][T::kColumnTiles][32][4] = {}, all[T::kColumnTiles][32][4] = {};
  for (int u = 0; u < T::kUnits; ++u)
    for (int half = 0; half < 2; ++half)
      for (int n = 0; n < T::kColumnTiles; ++n) {
        uint32_t a[32][4], b[32][2];
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 2; ++i)
            b[lane][i] = units[u * 4 * tile.columns + x_place(tile, lane, n)].words[2 * half + i];
        if constexpr (T::kCapacity == 2) {
          std::fill(&a[0][0], &a[0][0] + 32 * 4, kOnes);
          multiply_tile(all[n], a, b);
        }
        for (int tile_row = 0; tile_row < T::kRowTiles; ++tile_row)
          for (int part = 0; part < T::kParts; ++part) {
            for (int lane = 0; lane < 32; ++lane)
              for (int i = 0; i < 2; ++i) {
                const int thread = 32 * warp + lane, row = 2 * tile_row + i;
                const int load = load_place(call, tile, thread, row) + 4 * step;
                const uint32_t word =
                    loads_in(call, tile, thread, step) ? call.words[4 * load + u / Code::kQuads] : 0;
                uint32_t pairs[4];
                Code::decode(word, u % Code::kQuads, lanes[lane].tables[row][part], pairs);
                for (int j = 0; j < 2; ++j) a[lane][i + 2 * j] = pairs[2 * half + j];
              }
            multiply_tile(products[tile_row][n], a, b);
          }
      }
  for (int lane = 0; lane < 32; ++lane)
    for (int n = 0; n < T::kColumnTiles; ++n)
      for (int c = 0; c < 4; ++c) {
        lanes[lane].totals[n][c] = add_step(lanes[lane].totals[n][c], all[n][lane][c], call.mode);
        for (int tile_row = 0; tile_row < T::kRowTiles; ++tile_row) {
          uint32_t& sum = lanes[lane].sums[tile_row][n][c];
          sum = add_step(sum, products[tile_row][n][lane][c], call.mode);
        }
      }
}

template <class T>
void run_block(const PackedLinearCall& call, int parts, int64_t block_x, int block_y, int block_z) {
  const Tile<T> tile(call, parts, block_x, block_y, block_z);
  std::vector<Unit> shared(kSharedUnits, Unit{{~0u, ~0u, ~0u, ~0u}});  // NaN
  std::vector<Lane<T>> lanes(kThreads);
  for (int thread = 0; thread < kThreads; ++thread) write_tables(call, tile, thread, shared.data());
  for (int thread = 0; thread < kThreads; ++thread)
    for (int i = 0; i < T::kLaneRows; ++i)
      for (int part = 0; part < T::kParts; ++part)
        read_table<T>(call, lane_row(tile, thread, i), part, shared.data(), lanes[thread].tables[i][part]);
  for (int first = tile.begin; first < tile.end; first += tile.slice) {
    std::fill(shared.begin(), shared.end(), Unit{{~0u, ~0u, ~0u, ~0u}});
    for (int thread = 0; thread < kThreads; ++thread) stage(call, tile, thread, first, shared.data());
    for (int warp = 0; warp < kWarps; ++warp)
      for (int step = first + column_warp_of(tile, 32 * warp); step < first + steps_from(tile, first);
           step += tile.column_warps)
        multiply_step(call, tile, warp, step,
                      shared.data() + (step - first) * T::kUnits * 4 * tile.columns, &lanes[32 * warp]);
  }
  std::fill(shared.begin(), shared.end(), Unit{{~0u, ~0u, ~0u, ~0u}});
  for (int thread = 0; thread < kThreads; ++thread)
    for (int n = 0; n < T::kColumnTiles; ++n)
      for (int tile_row = 0; tile_row < T::kRowTiles; ++tile_row)
        for (int c = 0; c < 4; ++c) {
          const Lane<T>& lane = lanes[thread];
          leave_sum(call, tile, thread, tile_row, n, c, lane.sums[tile_row][n][c], lane.totals[n][c], shared.data());
        }
  for (int thread = 0; thread < kThreads; ++thread) gather(call, tile, thread, block_y, shared.data());
}

struct Host {
  template <class T>
  void kernel(const PackedLinearCall& call, int parts, Grid grid) const {
    for (int64_t x = 0; x < grid.x; ++x)
      for (int y = 0; y < grid.y; ++y)
        for (int z = 0; z < grid.z; ++z) run_block<T>(call, parts, x, y, z);
  }
};

}  // namespace
}  // namespace bqnn::cuda

extern "C" void probe_divide(bqnn::cuda::PackedLinearCall* call, int multiprocessors) {
  bqnn::cuda::divide(call, multiprocessors);
}

extern "C" void probe_round_rows(const bqnn::cuda::RoundRowsCall* call) {
  using namespace bqnn::cuda;
  for (int64_t row = 0; row < call->rows; ++row) {
    const int64_t first = row * call->columns;
    uint32_t largest = 0;
    for (int64_t i = 0; i < call->columns; ++i)
      largest = std::max(largest, magnitude_of(load_activation(call->x, call->x_element, first + i)));
    const Rounding rounding = rounding_of(largest);
    for (int64_t i = 0; i < call->columns; ++i)
      call->q[first + i] = rounded_activation(load_activation(call->x, call->x_element, first + i), rounding);
    call->scale[row] = rounding.scale;
  }
}

extern "C" void probe_packed_linear(const bqnn::cuda::PackedLinearCall* call) {
  using namespace bqnn::cuda;
  const int m = call->num_levels;
  (m == 2 ? choose<2, Host> : m <= 4 ? choose<4, Host> : m <= 8 ? choose<8, Host> : choose<16, Host>)(*call, Host{});
  if (call->splits > 1)
    for (int64_t index = 0; index < call->rows * call->channels; ++index) add_splits(*call, index);
}
