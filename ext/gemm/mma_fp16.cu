#include "gemm/mma_kernel.cuh"

namespace gptq {

MmaKernel mma_fp16(MmaTile tile, MmaFormat format) { return find_kernel<false>(tile, format); }

}  // namespace gptq
