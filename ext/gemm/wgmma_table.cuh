// Between the wgmma kernels and the code that chooses and launches them.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "gemm/schedule.cuh"

namespace gptq {

struct WgmmaParams : GemmTiles {  // n_tiles: rows of tiles, as many at a time as a cluster has blocks
  uint16_t* y;
  const uint16_t* bias;
  const uint16_t* residual;
  float* partials;
  int* flags;
  int chunk_bytes;
  int64_t ldy, ldr;
  int stages, groups;
  int paired;
  bool zeros;
  bool one_group;  // of all k
};

// Output rows x tokens of a block's tile.
enum class WgmmaTile : int { k128x16 = 1, k128x32, k128x64, k192x64, k192x96, k128x128, k192x128, k128x192, k128x256, kLast = k128x256 };

// Blocks per SM.
enum class WgmmaSharing : int { kOne = 1, kTwo };

struct WgmmaKernel {
  const void* function;
  int tokens, strips, cluster, threads;
  int turn_bytes;  // of shared memory beside the ring
  bool resumes;    // can go on with the sums of another
};

// A slot's weights; the next ones start at a multiple of 128 bytes, as tensor loads must.
__host__ __device__ constexpr int wgmma_weight_bytes(int strips, int chunk_bytes) { return (strips * chunk_bytes + 127) & ~127; }

// `one`: a chunk holds one scale group, or part of one.
WgmmaKernel wgmma_fp16(WgmmaTile tile, bool one);
WgmmaKernel wgmma_bf16(WgmmaTile tile, bool one);

}  // namespace gptq
