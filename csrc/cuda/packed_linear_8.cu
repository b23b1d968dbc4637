#include "cuda/packed_linear_kernel.cuh"

namespace bqnn::cuda {

template <>
void launch<8>(const PackedLinearCall& call, cudaStream_t stream) {
  choose<8>(call, Launcher{stream});
}

}  // namespace bqnn::cuda
