// The GEMM of same_bits.h by wgmma, for sm_90a: the same arguments (tile: a HopperTile), workspace and bits.
#pragma once
#include "gemm/same_bits.h"

namespace gptq {

cudaError_t launch_same_bits_wgmma(const SameBitsGemm& call, cudaStream_t stream);

}  // namespace gptq
