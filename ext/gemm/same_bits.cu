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
#include "common/layout.cuh"
#include "gemm/same_bits_table.cuh"
#include "gemv/gemv.h"

namespace gptq {
namespace {

constexpr int kReserved = 1024;  // shared memory the driver keeps per block

size_t flag_bytes(const Device& device) { return (size_t{4} * 2 * kMmaWarps * device.sms + 127) / 128 * 128; }
// Of the widest tile for each SM, or of two of half its size.
size_t partial_bytes(const Device& device) { return size_t{256} * 64 * sizeof(float) * kPieceSlots * device.sms; }

// A tile. `percent`: its time per chunk, output row and token over that of the largest. `cut`: chunks that cutting tiles along k takes as
// long as.
struct TileTime {
  SameBitsTile tile;
  int strips, tokens, percent, cut;
};
constexpr TileTime kTiles[] = {{SameBitsTile::k128x16, 8, 16, 170, 12},
                               {SameBitsTile::k128x32, 8, 32, 125, 8},
                               {SameBitsTile::k128x64, 8, 64, 103, 8},
                               {SameBitsTile::k256x64, 16, 64, 100, 8}};
constexpr int kAlone = 130;  // percent of its time beside no other that a block takes where two would share an SM, each taking 200

int slot_bytes(const TileTime& t, int chunk) { return (t.tokens * kChunkK * 2 + t.strips * chunk + 127) / 128 * 128; }
int sums_bytes(const TileTime& t, int groups) { return t.tokens * groups * static_cast<int>(sizeof(float)); }
// Slots of the ring beside the sums of x.
int depth_in(int smem, const TileTime& t, int chunk, int groups) {
  return std::min(kSameBitsDepth, (smem - sums_bytes(t, groups)) / slot_bytes(t, chunk));
}

// How a tile serves a product.
struct Way {
  const TileTime* tile;
  int per_sm;  // blocks
  bool cut;
  int64_t time;
};

Way way_of(const TileTime& t, const SameBitsParams& p, int blocks, const Device& device, int split) {
  const auto room = [&](int per_sm) { return (device.smem + kReserved) / per_sm - kReserved; };
  Way way = {&t, blocks, false, INT64_MAX};
  while (way.per_sm > 0 && depth_in(room(way.per_sm), t, p.chunk_bytes, p.groups) < 2) way.per_sm--;
  if (way.per_sm == 0) return way;
  const int64_t tiles = static_cast<int64_t>((p.m + t.tokens - 1) / t.tokens) * ((p.strips + t.strips - 1) / t.strips);
  const int clusters = device.sms * way.per_sm, over = static_cast<int>(tiles % clusters);
  const int longest = (over * p.chunks + clusters - 1) / clusters;  // chains
  // In chunks of a block that shares its SM.
  const int64_t waves = tiles / clusters * p.k_chunks;
  const int percent = way.per_sm * 100, last_percent = over <= device.sms ? std::min(percent, kAlone) : percent;
  const int64_t whole = waves * percent + (over > 0 ? int64_t{p.k_chunks} * last_percent : 0);
  const int64_t cut = (waves + t.cut + static_cast<int64_t>(longest) * p.k_chunks / p.chunks) * percent;
  way.cut = split == 0 ? cut < whole : split == static_cast<int>(GemmSplit::kAlongK);
  way.cut = way.cut && over > 0 && longest <= kLongestCut;
  way.time = (way.cut ? cut : whole) * t.strips * t.tokens * t.percent;
  return way;
}

}  // namespace

size_t same_bits_workspace_bytes() {
  Device device;
  if (current_device(device) != cudaSuccess) return 0;
  return flag_bytes(device) + partial_bytes(device);
}

cudaError_t launch_same_bits(const SameBitsGemm& call, cudaStream_t stream) {
  const auto aligned = [](const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; };
  if (call.m <= 0 || call.n <= 0 || call.k <= 0 || call.n % 16 || call.k % 8 || call.ldx % 8 || call.ldy % 2 || call.ldr % 2)
    return cudaErrorInvalidValue;
  if (!aligned(call.weight, 16) || !aligned(call.x, 16) || !aligned(call.y, 4) || !aligned(call.residual, 4) ||
      !aligned(call.workspace, 16))
    return cudaErrorInvalidValue;
  if ((call.groups != 1 && call.groups != 2 && call.groups != 4) || call.paired < 0 || call.paired > 2 || call.tile < 0 ||
      call.tile > static_cast<int>(SameBitsTile::kLast) || call.split < 0 || call.split > static_cast<int>(GemmSplit::kWhole))
    return cudaErrorInvalidValue;
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;

  SameBitsParams p = {};
  p.weight = static_cast<const uint8_t*>(call.weight);
  p.x = static_cast<const uint16_t*>(call.x);
  p.y = static_cast<uint16_t*>(call.y);
  p.bias = static_cast<const uint16_t*>(call.bias);
  p.residual = static_cast<const uint16_t*>(call.residual);
  p.flags = static_cast<int*>(call.workspace);
  p.partials = reinterpret_cast<float*>(static_cast<uint8_t*>(call.workspace) + flag_bytes(device));
  p.m = call.m, p.n = call.n, p.k = call.k;
  p.strips = call.n / kStripRows;
  p.ldx = call.ldx, p.ldy = call.ldy, p.ldr = call.ldr;
  p.groups = call.groups, p.zeros = call.zeros, p.paired = call.paired;
  p.chunk_bytes = chunk_bytes(call.groups, call.zeros);
  p.k_chunks = (call.k + kChunkK - 1) / kChunkK;
  if (const cudaError_t status = gemv_segment(p.segment, call.k, call.groups, call.zeros); status != cudaSuccess) return status;
  const int before = (p.k_chunks - 1) / p.segment;  // the last segment
  p.chunks = before * kChains + std::min(kChains, p.k_chunks - before * p.segment);

  const auto kernel_of = [&](const TileTime& t) { return (call.bf16 ? same_bits_bf16 : same_bits_fp16)(t.tile, call.groups == 1); };
  // Up to 32 tokens, where memory is the limit, the fewest padded ones; otherwise the tile that is done first.
  Way way = {nullptr, 0, false, INT64_MAX};
  const auto consider = [&](const TileTime& t) {
    const Way other = way_of(t, p, kernel_of(t).blocks, device, call.split);
    if (other.time < way.time) way = other;
  };
  if (call.tile || call.m <= 32) consider(kTiles[call.tile ? call.tile - 1 : call.m > 16]);
  else
    for (const TileTime& t : kTiles)
      if (t.tokens >= 32) consider(t);
  if (way.tile == nullptr) return cudaErrorInvalidConfiguration;
  const TileTime& tile = *way.tile;
  const SameBitsKernel kernel = kernel_of(tile);

  p.m_tiles = (p.m + tile.tokens - 1) / tile.tokens;
  p.n_tiles = (p.strips + tile.strips - 1) / tile.strips;
  p.tiles = p.m_tiles * p.n_tiles;
  p.clusters = device.sms * way.per_sm;
  p.split_tiles = way.cut ? p.tiles % p.clusters : 0;
  p.clusters = std::min(p.clusters, way.cut ? p.tiles * p.chunks : p.tiles);
  p.share = p.split_tiles * p.chunks / p.clusters, p.spare = p.split_tiles * p.chunks % p.clusters;
  p.slot = slot_bytes(tile, p.chunk_bytes);
  p.stages = depth_in((device.smem + kReserved) / way.per_sm - kReserved, tile, p.chunk_bytes, p.groups);
  p.sums = p.stages * p.slot;

  static std::atomic<uint64_t> done[2][2][static_cast<int>(SameBitsTile::kLast) + 1];
  std::atomic<uint64_t>& mine = done[call.bf16][call.groups == 1][static_cast<int>(tile.tile)];
  if (const cudaError_t status = set_limits(kernel.function, mine, device.smem, device); status != cudaSuccess) return status;
  return launch_kernel(kernel.function, {dim3(p.clusters), 32 * kernel.warps, p.sums + sums_bytes(tile, p.groups), stream}, device, p);
}

}  // namespace gptq
