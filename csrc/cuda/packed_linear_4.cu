#include "cuda/packed_linear_kernel.cuh"

namespace bqnn::cuda {

template <>
void launch<4>(const PackedLinearCall& call, cudaStream_t stream) {
  choose<4>(call, Launcher{stream});
}

}  // namespace bqnn::cuda
