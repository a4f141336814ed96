// Sizes of the attention kernel: its ring, its scratch and its place in the workspace.
#pragma once
#include "attention/attention_decode_schedule.cuh"

namespace gptq {

// Sizes of the kernel for a head dimension and a cache of FP8 or 16-bit elements.
template <int D, bool FP8>
struct AttentionShape {
  static constexpr int kElement = FP8 ? 1 : 2;
  static constexpr int kRow = D * kElement;          // bytes of a token's key
  static constexpr int kPieces = kRow / 16;          // 16-byte pieces of it
  static constexpr int kEntry = kTileTokens * kRow;  // a tile of keys, or of values
  // Entries of a warp's ring: keys, values, keys, ... No more, so that a block fits beside one of the GEMV.
  static constexpr int kDepth = kEntry >= 8192 ? 2 : 4;
  static constexpr int kTiles = D / 16;  // m-tiles of the output: rows are dimensions, columns heads
  static constexpr int kRing = kAttentionWarps * kDepth * kEntry;
  static constexpr int kQueryStride = D * 2 + 16;  // bytes; so that no bank is met twice
};

// Lanes of a fragment whose columns hold one of so many queries: they come first in the order of slot_lane().
__host__ __device__ constexpr int head_lanes(int columns) { return 8 * ((columns + 1) / 2); }
// Shared memory for results of the warps, as many columns at a time as a row has; or queries; or new keys and values: 2 * kMaxNewRows of
// 16 bits just fit.
template <int D>
__host__ __device__ constexpr int exchange_bytes(int part_heads) {
  const int sums = kAttentionWarps * (D / 16) * head_lanes(part_heads) * 16, queries = kPartHeads * (D * 2 + 16);
  return sums > queries ? sums : queries;
}
template <class Team, int D>
__host__ __device__ constexpr int scratch_bytes(int part_heads) {
  if (Team::kWarps == 1) return kAttentionWarps * (kPartHeads * (D * 2 + 16) + kScratchInts * 4);
  return exchange_bytes<D>(part_heads) + kAttentionWarps * kPartHeads * 8 + kScratchInts * 4;
}
template <class Team, int D, bool FP8>
constexpr int attention_smem(int part_heads) {
  return AttentionShape<D, FP8>::kRing + scratch_bytes<Team, D>(part_heads);
}
static_assert(exchange_bytes<64>(1) >= 2 * kMaxNewRows * 64 * 2 && exchange_bytes<128>(1) >= 2 * kMaxNewRows * 128 * 2);
// Floats of a chunk's result in the workspace: the fragments, then for each warp (maximum, sum) of each column.
__host__ __device__ constexpr int slot_floats(int head_dim, int columns) {
  return head_dim / 16 * head_lanes(columns) * 4 + kAttentionWarps * 2 * kPartHeads;
}
// A workspace is as large as single warps need it, with one row each. Blocks are a quarter as many, so that more columns fit.
static_assert(kAttentionWarps * slot_floats(64, 1) >= slot_floats(64, kPartHeads) &&
              kAttentionWarps * slot_floats(128, 1) >= slot_floats(128, kPartHeads));

}  // namespace gptq
