#include "cuda/packed_linear_kernel.cuh"

namespace bqnn::cuda {

template <>
void launch<2>(const PackedLinearCall& call, cudaStream_t stream) {
  choose<2>(call, Launcher{stream});
}

}  // namespace bqnn::cuda
