// The decoder that a call takes, and what adds the parts of a product that was split over blocks.
#include "cuda/packed_linear_kernel.cuh"

namespace bqnn::cuda {

__global__ void __launch_bounds__(kThreads) packed_linear_add_kernel(const __grid_constant__ PackedLinearCall call) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < call.rows * call.channels) add_splits(call, index);
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
