#include "gemm/mma_kernel.cuh"

namespace gptq {

MmaKernel mma_bf16(MmaTile tile, MmaFormat format) { return find_kernel<true>(tile, format); }

}  // namespace gptq
