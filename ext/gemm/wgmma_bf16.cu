#include "gemm/wgmma_kernel.cuh"

namespace gptq {

WgmmaKernel wgmma_bf16(WgmmaTile tile, bool one) { return one ? find_kernel<true, true>(tile) : find_kernel<true, false>(tile); }

}  // namespace gptq
