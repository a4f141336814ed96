// y = epilogue(x @ W^T) for M from 9 up on sm_90a: weights stay 4-bit in memory and become the A operand of wgmma in registers.
//
// To bind: fill a WgmmaGemm and call launch_wgmma(). It launches on `stream`, allocates nothing, may be captured, and returns what the CUDA
// runtime returned (cudaErrorInvalidValue where the arguments break a rule below). Always a programmatic dependent launch: weights are
// fetched before the kernel ahead in the stream has ended, so they must not come out of that very kernel.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "common/pairing.h"

namespace gptq {

struct WgmmaGemm {
  const void* weight;    // packed stream (common/layout.cuh), n/16 strips x ceil(k/128) chunks, 16-byte aligned
  const void* x;         // [m, k], row stride ldx; 16-byte aligned, ldx % 8 == 0; k in the packed order: for act-order, the caller sorts it
  void* y;               // [m, n], or [m, n/2] from kGated on; row stride ldy; 16-byte aligned, ldy % 8 == 0
  const void* bias;      // [n] in the order of the outputs ([n/2] of planes), or null
  const void* residual;  // like y, row stride ldr % 8 == 0, added before rounding; may be y itself; null with kGated; or null
  void* workspace;       // wgmma_workspace_bytes(), zeroed once when allocated; left zeroed where it must be. One per stream: calls that
                         // may overlap in time must not share it.
  int m, n, k;           // n % 16 == 0, k % 8 == 0
  int ldx, ldy, ldr;     // in elements
  int groups;            // scale groups per 128 k: 1 (group 128 and above), 2, 4; or 0: one group for all of k
  bool zeros;            // the stream carries zero points
  bool bf16;             // type of x, y, bias, residual; otherwise fp16
  int paired;                // a Pairing
  int tile, sharing, split;  // for tests and tuning: a WgmmaTile, WgmmaSharing, GemmSplit; 0 lets the function choose
};

size_t wgmma_workspace_bytes();
cudaError_t launch_wgmma(const WgmmaGemm& call, cudaStream_t stream);

}  // namespace gptq
