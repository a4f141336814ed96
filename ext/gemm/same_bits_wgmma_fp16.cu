#include "gemm/same_bits_wgmma_kernel.cuh"

namespace gptq {

SameBitsKernel same_bits_wgmma_fp16(HopperTile tile, bool one_group) { return find_kernel<false>(tile, one_group); }

}  // namespace gptq
