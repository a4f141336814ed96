#include "gemm/same_bits_wgmma_kernel.cuh"

namespace gptq {

SameBitsKernel same_bits_wgmma_bf16(HopperTile tile, bool one_group) { return find_kernel<true>(tile, one_group); }

}  // namespace gptq
