// Between the mma kernels and the code that chooses and launches them.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "gemm/schedule.cuh"

namespace gptq {

struct MmaParams : GemmTiles {  // a cluster is one block
  const uint8_t* weight;
  const uint16_t* x;
  void* y;
  const uint16_t* bias;
  const uint16_t* residual;
  float* partials;
  int* flags;
  int k, ldx;
  int64_t ldy, ldr;
  int chunk_bytes, stages, slot, exchange;  // bytes of a chunk of a strip; slots of a ring, bytes of one, bytes before the sums
  int groups, paired;
  bool zeros, f32;
};

// Output rows x tokens of a block's tile.
enum class MmaTile : int { k128x16 = 1, k128x32, k128x64, k256x64, k256x128, kLast = k256x128 };

constexpr int kMmaWarps = 8, kMmaThreads = kMmaWarps * 32;
constexpr int kMmaDepth = 4;  // slots of a ring at most

struct MmaKernel {
  const void* function;
  int blocks;  // per SM that its registers are for
};

// A chunk holds one scale group, or part of one, without and with zero points; or anything, told by the parameters.
enum class MmaFormat : int { kOneGroup, kOneGroupZeros, kAny };

MmaKernel mma_fp16(MmaTile tile, MmaFormat format);
MmaKernel mma_bf16(MmaTile tile, MmaFormat format);

}  // namespace gptq
