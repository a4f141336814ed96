// 4-bit GEMM by mma.sync: how the kernel of mma_kernel.cuh works, and which of its shapes serves what.
//
// A block of eight warps owns tiles of output rows x tokens, and fills rings of slots with cp.async, a slot holding 128 k (a chunk) of a
// tile's strips and tokens. A warp expands the int4 fragments of two strips in registers and multiplies them with tokens that ldmatrix
// brings from the slot, the next step's while this one is with the tensor cores. A ring runs on over the tiles of its block: the next
// tile's first chunks are under way while this one is written.
//
// 128x16, 128x32, 128x64: two teams of four warps take the chunks in turn, each with a ring of its own, and add up their sums at the end
// of a tile; in step, both would expand weights while the tensor cores idle. 256x64 needs less shared memory. In all of these the operand
// is weight minus zero point, an exact integer; sums of a group are scaled in fp32, and only the result is rounded. 256x128 has no
// registers for a second set of sums: there the scale is in the operand, rounded once, and small weights never use it.
//
// Tiles that do not fill whole waves of blocks are cut along k into equal ranges of chunks (schedule.cuh). The block with a tile's first
// chunk owns it, and adds what the others leave in the workspace in the order of k: the same bits every time.
#include "gemm/mma.h"

#include <algorithm>
#include <atomic>

#include "common/launch.cuh"
#include "gemm/mma_call.cuh"

namespace gptq {
namespace {

constexpr int kReserved = 1024;  // shared memory the driver keeps per block

size_t flag_bytes(const Device& device) { return (size_t{4} * 2 * kMmaWarps * device.sms + 127) / 128 * 128; }
// Of the widest tile for each SM; two blocks of 128x16 have less.
size_t partial_bytes(const Device& device) { return size_t{256} * 128 * sizeof(float) * device.sms; }

// A tile. `percent`: its time per chunk, output row and token over that of the widest, on an H200 that ran the code of 8.0. `cut`: chunks
// that cutting tiles along k takes as long as.
struct TileTime {
  MmaTile tile;
  int strips, tokens, percent, cut;
  bool scaled;
};
constexpr TileTime kTiles[] = {{MmaTile::k128x16, 8, 16, 200, 25, false},
                               {MmaTile::k128x32, 8, 32, 150, 8, false},
                               {MmaTile::k128x64, 8, 64, 122, 6, false},
                               {MmaTile::k256x64, 16, 64, 118, 6, false},
                               {MmaTile::k256x128, 16, 128, 100, 6, true}};
// Weights of a matrix from which operands may be rounded: their errors average out over many scales only. For one
// order of sums the inputs alone decide: GPUs that share a model have some of a weight's outputs each.
constexpr int64_t kFewWeights = 1 << 20;
constexpr int kFewInputs = 2048;

int slot_bytes(const TileTime& t, int chunk) { return (t.tokens * kChunkK * 2 + t.strips * chunk + 127) / 128 * 128; }
int teams_of(const TileTime& t) { return 16 / t.strips; }
int exchange_bytes(const TileTime& t) { return teams_of(t) == 2 ? t.tokens * 256 : 0; }
// Slots of each team's ring beside the exchange area.
int depth_in(int smem, const TileTime& t, int chunk) {
  return std::min(kMmaDepth, (smem - exchange_bytes(t)) / (teams_of(t) * slot_bytes(t, chunk)));
}

// For one order of sums, the widest whose rings fit.
const TileTime& one_order_tile(int chunks, int chunk, const Device& device) {
  const TileTime &scaled = kTiles[4], &whole = kTiles[3];
  return depth_in(device.smem, scaled, chunk) < 2 || chunks * kChunkK < kFewInputs ? whole : scaled;
}

// The tile that is done first among those whose rings fit; up to 32 tokens, where memory is the limit, the fewest padded tokens.
const TileTime& choose_tile(int m, int n, int chunks, int chunk, const Device& device) {
  if (m <= 32) return kTiles[m > 16];
  const TileTime* best = &kTiles[1];
  int64_t least = INT64_MAX;
  for (const TileTime& t : kTiles) {
    if (t.tokens < 32 || depth_in(device.smem, t, chunk) < 2 || (t.scaled && int64_t{n} * chunks * kChunkK < kFewWeights)) continue;
    const int rows = t.strips * kStripRows;
    const int64_t tiles = static_cast<int64_t>((m + t.tokens - 1) / t.tokens) * ((n + rows - 1) / rows);
    const int64_t whole = whole_time(tiles, device.sms, chunks), cut = cut_time(tiles, device.sms, chunks, t.cut);
    const int64_t time = std::min(whole, cut) * rows * t.tokens * t.percent;
    if (time < least) least = time, best = &t;
  }
  return *best;
}

}  // namespace

size_t mma_workspace_bytes() {
  Device device;
  if (current_device(device) != cudaSuccess) return 0;
  return flag_bytes(device) + partial_bytes(device);
}

cudaError_t launch_mma(const MmaGemm& call, cudaStream_t stream) {
  if (call.f32 || !mma_accepts(call, static_cast<int>(MmaTile::kLast))) return cudaErrorInvalidValue;
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;

  MmaParams p = {};
  take_call(p, call, flag_bytes(device));
  p.chunks = (call.k + kChunkK - 1) / kChunkK;
  const TileTime& tile = call.tile ? kTiles[call.tile - 1]
                         : call.split == static_cast<int>(GemmSplit::kOneOrder)
                             ? one_order_tile(p.chunks, p.chunk_bytes, device)
                             : choose_tile(call.m, call.n, p.chunks, p.chunk_bytes, device);
  const MmaFormat format = call.groups != 1 ? MmaFormat::kAny : call.zeros ? MmaFormat::kOneGroupZeros : MmaFormat::kOneGroup;
  const MmaKernel kernel = (call.bf16 ? mma_bf16 : mma_fp16)(tile.tile, format);
  p.m_tiles = (p.m + tile.tokens - 1) / tile.tokens;
  p.n_tiles = (p.strips + tile.strips - 1) / tile.strips;

  // Two blocks share an SM where their rings fit beside each other.
  p.slot = slot_bytes(tile, p.chunk_bytes);
  const auto room = [&](int per_sm) { return (device.smem + kReserved) / per_sm - kReserved; };
  const int per_sm = kernel.blocks == 2 && depth_in(room(2), tile, p.chunk_bytes) >= 2 ? 2 : 1;
  p.stages = depth_in(room(per_sm), tile, p.chunk_bytes);
  if (p.stages < 2) return cudaErrorInvalidConfiguration;
  p.exchange = teams_of(tile) * p.stages * p.slot;
  share_tiles(p, device.sms * per_sm, tile.cut, call.split);

  static std::atomic<uint64_t> done[2][3][static_cast<int>(MmaTile::kLast) + 1];
  std::atomic<uint64_t>& mine = done[call.bf16][static_cast<int>(format)][static_cast<int>(tile.tile)];
  if (const cudaError_t status = set_limits(kernel.function, mine, device.smem, device); status != cudaSuccess) return status;
  return launch_kernel(kernel.function, {dim3(p.clusters), kMmaThreads, p.exchange + exchange_bytes(tile), stream, 1, false}, device, p);
}

}  // namespace gptq
