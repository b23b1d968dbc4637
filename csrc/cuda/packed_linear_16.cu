#include "cuda/packed_linear_kernel.cuh"

namespace bqnn::cuda {

template <>
void launch<16>(const PackedLinearCall& call, cudaStream_t stream) {
  choose<16>(call, Launcher{stream});
}

}  // namespace bqnn::cuda
