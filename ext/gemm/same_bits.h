// y = epilogue(x @ W^T) for any number of rows, each with the bits that the GEMV (gemv/gemv.h) gives it: the same operations on the same
// numbers in the same order, by tiles of rows x tokens. See same_bits.cu.
//
// Launches on `stream`, allocates nothing, may be captured, and returns what the CUDA runtime returned (cudaErrorInvalidValue where the
// arguments break a rule below).
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

#include "gemm/mma.h"

namespace gptq {

// The arguments of the mma GEMM, by its rules. Of its own: workspace, of same_bits_workspace_bytes(), zeroed once when allocated and one
// per stream as there; tile, a SameBitsTile.
using SameBitsGemm = MmaGemm;

// For the current device; 0 where there is none.
size_t same_bits_workspace_bytes();
cudaError_t launch_same_bits(const SameBitsGemm& call, cudaStream_t stream);

}  // namespace gptq
