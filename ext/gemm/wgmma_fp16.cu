#include "gemm/wgmma_kernel.cuh"

namespace gptq {

WgmmaKernel wgmma_fp16(WgmmaTile tile, bool one) { return one ? find_kernel<false, true>(tile) : find_kernel<false, false>(tile); }

}  // namespace gptq
