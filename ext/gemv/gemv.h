// y[M,N] = x[M,K] W^T for M = 1..16 (32 in two launches): one persistent kernel, bound by the bytes of W. See gemv_kernel.cuh.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/pairing.h"

namespace gptq {

// What a block would else have to divide for before it can ask for its first weights.
struct GemvPlan {
  int depth, buffers;                  // ring slots, exchange areas
  int flight;                          // slots asked for at once before the block begins
  bool share_x;                        // the blocks of a cluster have strips of their own and all of k, and bring x in together
  int share;                           // chunks of a strip that are added up by themselves, a multiple of kMathWarps
  int segments;                        // of so many chunks that a block takes: all of a strip, or, in a cluster that splits k, one
  int strips, spare;                   // of a cluster; that many clusters have one strip more
  int ring, x, sums, red, got, total;  // of shared memory
  int x_stride;                        // elements between tokens
  int pass, slot;                      // of gemv_portable: strips at a time, bytes of a slot of one warp's ring
  int red_lanes;                       // float4 slots per column tile and warp: lanes whose columns hold no token leave nothing
};

struct GemvArgs {
  const uint8_t* w;          // strip stream
  const uint16_t* x;         // [M, K], row stride ldx elements (a multiple of 8), 16-byte aligned
  void* y;                   // [M, N] ([M, N/2] from kGated on), row stride ldy elements
  const uint16_t* bias;      // [N] in the order of the outputs ([N/2] of planes), or null
  const uint16_t* residual;  // like y, row stride ldr, or null; may be y itself
  int M, N, K;               // N % 16 == 0, K % 8 == 0
  int ldx, ldy, ldr;
  int paired;     // a Pairing
  bool f32;       // y is float, and what is added up is not rounded; else of x's type
  GemvPlan plan;  // by launch_gemv
};

constexpr int kGemvMaxM = 32;  // beyond 16 in two launches

// `groups` per chunk: 1, 2, 4. `in_a_row`: with one token, half of every SM is left to the GEMV launched next.
cudaError_t launch_gemv(GemvArgs args, int groups, bool zeros, bool bf16, bool in_a_row, cudaStream_t stream);

// In which order a row is added up, for who adds in the same: chunks of 128 k in segments of so many, a multiple of 8.
cudaError_t gemv_segment(int& chunks, int K, int groups, bool zeros);

}  // namespace gptq
