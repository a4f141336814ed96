// y = epilogue(x @ W^T) for M from 9 up, on every architecture from sm_80 on: weights stay 4-bit in memory and become the A operand of
// mma.sync in registers. For devices without wgmma.
//
// Launches on `stream`, allocates nothing, may be captured, and returns what the CUDA runtime returned (cudaErrorInvalidValue where the
// arguments break a rule below).
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "common/pairing.h"

namespace gptq {

struct MmaGemm {
  const void* weight;    // packed stream (common/layout.cuh), n/16 strips x ceil(k/128) chunks, 16-byte aligned
  const void* x;         // [m, k], row stride ldx; 16-byte aligned, ldx % 8 == 0; k in the packed order: for act-order, the caller sorts it
  void* y;               // [m, n], or [m, n/2] from kGated on; row stride ldy; 4-byte aligned, ldy % 2 == 0 unless it is float
  const void* bias;      // [n] in the order of the outputs ([n/2] of planes), or null
  const void* residual;  // like y, row stride ldr, added before rounding; may be y itself; or null
  void* workspace;       // mma_workspace_bytes(), zeroed once when allocated; left zeroed where it must be. One per stream: calls that may
                         // overlap in time must not share it.
  int m, n, k;           // n % 16 == 0, k % 8 == 0
  int ldx, ldy, ldr;     // in elements
  int groups;            // scale groups per 128 k: 1 (group 128 and above), 2, 4
  bool zeros;            // the stream carries zero points
  bool bf16;             // type of x, y, bias, residual; otherwise fp16
  int paired;            // a Pairing
  bool f32;              // y is float, and sums are not rounded: of the GEMM in the GEMV's order alone, without residual
  int tile, split;       // for tests and tuning: an MmaTile, a GemmSplit; 0 lets the function choose
};

// For the current device; 0 where there is none.
size_t mma_workspace_bytes();
cudaError_t launch_mma(const MmaGemm& call, cudaStream_t stream);

}  // namespace gptq
