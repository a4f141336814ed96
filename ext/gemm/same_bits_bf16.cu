#include "gemm/same_bits_kernel.cuh"

namespace gptq {

SameBitsKernel same_bits_bf16(SameBitsTile tile, bool one_group) { return find_kernel<true>(tile, one_group); }

}  // namespace gptq
