// Between the kernels of the GEMM in the GEMV's order and the code that chooses and launches them.
#pragma once
#include <cuda_runtime.h>

#include "gemm/mma_table.cuh"

namespace gptq {

// Chunks of a strip come in segments, and those of a segment in `kChains` chains: chain w has its chunks w, w + kChains, ... A chain is the
// unit in which tiles are cut along k: GemmTiles::chunks counts chains, those of all segments in order.
constexpr int kChains = 8;  // as many as warps that multiply in the GEMV

struct SameBitsParams : MmaParams {
  int k_chunks, segment;  // chunks of a strip, and of a segment: a multiple of kChains
  int sums;               // bytes before the sums of x in shared memory
};

// Output rows x tokens of a block's tile.
enum class SameBitsTile : int { k128x16 = 1, k128x32, k128x64, kLast = k128x64 };

enum class HopperTile : int { k128x16 = 1, k128x32, k128x64, k128x96, k128x128, kLast = k128x128 };

// Tiles of sums that a block can leave in the workspace: chains of its first, incomplete segment each by itself (no more than kChains - 1),
// then whole segments. One more is for the block itself.
constexpr int kPieces = kChains, kPieceSlots = kPieces + 1;
constexpr int kLongestCut = 2 * kChains - 1;  // chains of a block, so that the pieces suffice
constexpr int kSameBitsDepth = 4;             // slots of the ring at most
constexpr int kSameBitsWarps = 8;             // that hold sums, in a block at most

struct SameBitsKernel {
  const void* function;
  int warps, blocks;  // of a block; per SM that its registers are for
  int total_bytes;    // of shared memory for sums of a segment
};

// one_group: a chunk holds one scale group, or part of one; otherwise two or four.
SameBitsKernel same_bits_fp16(SameBitsTile tile, bool one_group);
SameBitsKernel same_bits_bf16(SameBitsTile tile, bool one_group);
SameBitsKernel same_bits_wgmma_fp16(HopperTile tile, bool one_group);
SameBitsKernel same_bits_wgmma_bf16(HopperTile tile, bool one_group);

}  // namespace gptq
