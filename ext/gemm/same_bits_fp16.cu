#include "gemm/same_bits_kernel.cuh"

namespace gptq {

SameBitsKernel same_bits_fp16(SameBitsTile tile, bool one_group) { return find_kernel<false>(tile, one_group); }

}  // namespace gptq
