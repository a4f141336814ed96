// The GEMM in the GEMV's order for sm_90a: wgmma gives the bits that mma.sync gives, so a Hopper has the order of same_bits.cu at the speed
// of its tensor cores.
//
// A block owns tiles of 128 output rows x 16 to 128 tokens. Two warpgroups own 64 rows each, and multiply as those of the wgmma GEMM do
// (wgmma.cu), but with weights as the GEMV expands them; with 64 tokens in turns. Of one more warpgroup a thread feeds the ring, and three
// warps compute the sums of x, each of every third chunk, for all. Where tiles are wide, sums of a segment wait in shared memory while a
// chain is added up, but for those that registers have room for.
#include "gemm/same_bits_wgmma.h"

#include <algorithm>
#include <atomic>

#include "common/launch.cuh"
#include "gemm/same_bits_plan.cuh"
#include "gemm/weight_map.cuh"
#include "gemm/wgmma_table.cuh"

namespace gptq {
namespace {

// By an H200; 128x96 by its neighbours, and somewhat more. The first two each serve alone, whatever they take.
constexpr SameBitsTime kTiles[] = {{static_cast<int>(HopperTile::k128x16), 8, 16, 100, 10},
                                   {static_cast<int>(HopperTile::k128x32), 8, 32, 100, 10},
                                   {static_cast<int>(HopperTile::k128x64), 8, 64, 105, 12},
                                   {static_cast<int>(HopperTile::k128x96), 8, 96, 110, 18},
                                   {static_cast<int>(HopperTile::k128x128), 8, 128, 100, 18}};
constexpr int kMaxStages = 8, kBarriers = 3 * 8;  // of a slot, in bytes

}  // namespace

cudaError_t launch_same_bits_wgmma(const SameBitsGemm& call, cudaStream_t stream) {
  if (!mma_accepts(call, static_cast<int>(HopperTile::kLast))) return cudaErrorInvalidValue;
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  if (device.capability != 90) return cudaErrorNoKernelImageForDevice;
  SameBitsParams p;
  if (const cudaError_t status = same_bits_params(p, call, device); status != cudaSuccess) return status;

  const auto kernel_of = [&](const SameBitsTime& t) {
    return (call.bf16 ? same_bits_wgmma_bf16 : same_bits_wgmma_fp16)(static_cast<HopperTile>(t.tile), call.groups == 1);
  };
  const auto slot_bytes = [&](const SameBitsTime& t) {
    return t.tokens * (kChunkK * 2 + p.groups * 4) + wgmma_weight_bytes(t.strips, p.chunk_bytes) + kBarriers;
  };
  SameBitsWay way;
  const auto consider = [&](const SameBitsTime& t) {
    const SameBitsKernel kernel = kernel_of(t);
    const SameBitsWay other = same_bits_way(t, p, kernel.blocks, device, call.split, [&](int bytes) {
      return std::min(kMaxStages, (bytes - kernel.total_bytes) / slot_bytes(t));
    });
    if (other.time < way.time) way = other;
  };
  if (call.tile || call.m <= 32) consider(kTiles[call.tile ? call.tile - 1 : call.m > 16]);
  else
    for (const SameBitsTime& t : kTiles)
      if (t.tokens >= 64) consider(t);
  if (way.tile == nullptr) return cudaErrorInvalidConfiguration;
  const SameBitsTime& tile = *way.tile;
  const SameBitsKernel kernel = kernel_of(tile);
  share_same_bits(p, way, device);
  p.slot = wgmma_weight_bytes(tile.strips, p.chunk_bytes);

  CUtensorMap weights, tokens;
  if (!map_weight(weights, call.weight, p.strips, p.k_chunks, p.chunk_bytes, tile.strips) ||
      !map_rows(tokens, call.x, call.bf16, call.m, call.k, call.ldx, tile.tokens))
    return cudaErrorInvalidValue;
  static std::atomic<uint64_t> done[2][2][static_cast<int>(HopperTile::kLast) + 1];
  std::atomic<uint64_t>& mine = done[call.bf16][call.groups == 1][tile.tile];
  if (const cudaError_t status = set_limits(kernel.function, mine, device.smem, device); status != cudaSuccess) return status;
  const int smem = p.stages * slot_bytes(tile) + kernel.total_bytes;
  return launch_kernel(kernel.function, {dim3(p.clusters), 32 * kernel.warps, smem, stream}, device, weights, tokens, p);
}

}  // namespace gptq
