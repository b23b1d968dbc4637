// The decoder that a call takes, what adds the parts of a product that was split over blocks, and what rounds rows.
#include "cuda/packed_linear_kernel.cuh"

namespace bqnn::cuda {

__global__ void __launch_bounds__(kThreads) packed_linear_add_kernel(const __grid_constant__ PackedLinearCall call) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < call.rows * call.channels) add_splits(call, index);
}

// A block a row, which it reads twice: for the largest magnitude, and to round it.
__global__ void __launch_bounds__(kThreads) packed_linear_round_kernel(const __grid_constant__ RoundRowsCall call) {
  __shared__ uint32_t of_warps[kWarps];
  const int thread = threadIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * call.columns;
  uint32_t largest = 0;
  for (int64_t i = thread; i < call.columns; i += kThreads)
    largest = max(largest, magnitude_of(load_activation(call.x, call.x_element, first + i)));
  largest = __reduce_max_sync(~0u, largest);
  if (thread % 32 == 0) of_warps[thread / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) largest = max(largest, of_warps[warp]);
  const Rounding rounding = rounding_of(largest);
  for (int64_t i = thread; i < call.columns; i += kThreads)
    call.q[first + i] = rounded_activation(load_activation(call.x, call.x_element, first + i), rounding);
  if (thread == 0) call.scale[blockIdx.x] = rounding.scale;
}

template <>
void launch<2>(const PackedLinearCall&, cudaStream_t);
template <>
void launch<4>(const PackedLinearCall&, cudaStream_t);
template <>
void launch<8>(const PackedLinearCall&, cudaStream_t);
template <>
void launch<16>(const PackedLinearCall&, cudaStream_t);

int plan_packed_linear(PackedLinearCall* call, int device) {
  int multiprocessors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) divide(call, multiprocessors);
  return error;
}

int launch_round_rows(const RoundRowsCall& call, void* stream) {
  packed_linear_round_kernel<<<static_cast<unsigned>(call.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(call);
  return cudaGetLastError();
}

int launch_packed_linear(const PackedLinearCall& call, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const int m = call.num_levels;
  (m == 2 ? launch<2> : m <= 4 ? launch<4> : m <= 8 ? launch<8> : launch<16>)(call, stream);
  if (call.splits > 1) {
    const int64_t blocks = (call.rows * call.channels + kThreads - 1) / kThreads;
    packed_linear_add_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(call);
  }
  return cudaGetLastError();
}

}  // namespace bqnn::cuda
