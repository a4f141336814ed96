// A GEMM of mma.sync in the GEMV's order of sums: which tile serves what, and how tiles are shared. The kernel is in same_bits_kernel.cuh.
//
// The order (gemv/gemv_kernel.cuh). K is cut into segments as for the GEMV, a segment's chunks of 128 k into 8 chains, chain w having the
// chunks w, w + 8, ... of it. For each scale group of a chunk, in turn, `part` and `off` start from 0 and go through one mma of 16 k after
// the other: of the weights as expand() leaves them with x, and of the constant of Offset with x. Then
//
//   chain = fma(scale, fma(zero, off, part), chain)     symmetric: part + off          chains start from 0
//   segment = ((0 + chain 0) + chain 1) + ... + chain 7
//   sum = ((0 + segment 0) + segment 1) + ...
//   y = round(fma(sum, power of two, bias) + residual), or round(fma(silu(gate), up, residual))
//
// A block of 4 or 8 warps owns tiles of output rows x tokens, and fills a ring of slots with cp.async, a slot holding one chunk of a tile's
// strips and tokens, in the order of the chains. A warp multiplies two strips, 32 tokens at a time, and expands the weights anew for the
// next 32: that costs less than the registers that `part` of 64 tokens would take from the two sets of sums, chain and segment. Sums of
// earlier segments wait in the workspace. The sums of x are the block's, each warp computing those of 16 tokens.
//
// Tiles that do not fill whole waves of blocks are cut along k, by chains. The block with a tile's first chain owns it, and adds what the
// others leave in the workspace: a chain by itself, unless what they have begins with a segment.
#include "gemm/same_bits.h"

#include <algorithm>
#include <atomic>

#include "common/launch.cuh"
#include "gemm/same_bits_plan.cuh"

namespace gptq {
namespace {

constexpr SameBitsTime kTiles[] = {{static_cast<int>(SameBitsTile::k128x16), 8, 16, 173, 12},
                                   {static_cast<int>(SameBitsTile::k128x32), 8, 32, 145, 0},
                                   {static_cast<int>(SameBitsTile::k128x64), 8, 64, 100, 8}};

// Of two tiles of 128 x 64 for each SM or, by wgmma, of one of 128 x 128.
size_t partial_bytes(const Device& device) {
  return size_t{128} * 128 * sizeof(float) * kPieceSlots * device.sms;
}

int slot_bytes(const SameBitsTime& t, int chunk) { return (t.tokens * kChunkK * 2 + t.strips * chunk + 127) / 128 * 128; }
int sums_bytes(const SameBitsTime& t, int groups) { return t.tokens * groups * static_cast<int>(sizeof(float)); }

}  // namespace

size_t same_bits_workspace_bytes() {
  Device device;
  if (current_device(device) != cudaSuccess) return 0;
  return same_bits_flag_bytes(device) + partial_bytes(device);
}

cudaError_t launch_same_bits(const SameBitsGemm& call, cudaStream_t stream) {
  if (!mma_accepts(call, static_cast<int>(SameBitsTile::kLast))) return cudaErrorInvalidValue;
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  SameBitsParams p;
  if (const cudaError_t status = same_bits_params(p, call, device); status != cudaSuccess) return status;

  const auto kernel_of = [&](const SameBitsTime& t) {
    return (call.bf16 ? same_bits_bf16 : same_bits_fp16)(static_cast<SameBitsTile>(t.tile), call.groups == 1);
  };
  // Up to 32 tokens, where memory is the limit, the fewest padded ones; otherwise the tile that is done first.
  SameBitsWay way;
  const auto consider = [&](const SameBitsTime& t) {
    const SameBitsWay other = same_bits_way(t, p, kernel_of(t).blocks, device, call.split, [&](int bytes) {
      return std::min(kSameBitsDepth, (bytes - sums_bytes(t, p.groups)) / slot_bytes(t, p.chunk_bytes));
    });
    if (other.time < way.time) way = other;
  };
  if (call.tile || call.m <= 32) consider(kTiles[call.tile ? call.tile - 1 : call.m > 16]);
  else
    for (const SameBitsTime& t : kTiles)
      if (t.tokens >= 32) consider(t);
  if (way.tile == nullptr) return cudaErrorInvalidConfiguration;
  const SameBitsTime& tile = *way.tile;
  const SameBitsKernel kernel = kernel_of(tile);
  share_same_bits(p, way, device);
  p.slot = slot_bytes(tile, p.chunk_bytes);
  p.sums = p.stages * p.slot;

  static std::atomic<uint64_t> done[2][2][static_cast<int>(SameBitsTile::kLast) + 1];
  std::atomic<uint64_t>& mine = done[call.bf16][call.groups == 1][tile.tile];
  if (const cudaError_t status = set_limits(kernel.function, mine, device.smem, device); status != cudaSuccess) return status;
  return launch_kernel(kernel.function, {dim3(p.clusters), 32 * kernel.warps, p.sums + sums_bytes(tile, p.groups), stream}, device, p);
}

}  // namespace gptq
