// logits[m, n] = x[m, k] W[n, k]^T with weights of 16 bits: the product of the last layer, which no quantization touches.
//
// A logit is one chain of products along k, 16 at a time in their order, with fp32 sums: the same instructions in the same roles for every
// m, tile and place in it. So a row has the same bits alone, among any others, eager and in a graph. Sums are never rounded to 16 bits.
//
// Launches on `stream`, allocates nothing, may be captured, and returns what the CUDA runtime returned (cudaErrorInvalidValue where the
// arguments break a rule below).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace gptq {

struct HeadProduct {
  const void* weight;  // [n, k], contiguous; 16-byte aligned
  const void* x;       // [m, k], row stride ldx; 16-byte aligned, ldx % 8 == 0
  float* logits;       // [m, n], row stride ldl
  int m, n, k;         // any m and n; k % 8 == 0
  int64_t ldx, ldl;    // in elements
  bool bf16;           // type of weight and x; otherwise fp16
  int tokens;          // of a tile, for tests and tuning: one that the kernels have; 0 lets the function choose
};

// By mma.sync, on every architecture from sm_80 on.
cudaError_t launch_head(const HeadProduct& call, cudaStream_t stream);
// By wgmma, on sm_90a. Its sums may be other bits than those of mma.sync; whoever uses one, uses it always.
cudaError_t launch_head_wgmma(const HeadProduct& call, cudaStream_t stream);

}  // namespace gptq
