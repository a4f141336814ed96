// 4-bit GEMM for M >= 9 on sm_90a: how the kernel of wgmma_kernel.cuh works, and which of its shapes serves what.
//
// A block owns tiles of 128 or 192 output rows x 16 to 256 tokens. Its first warpgroups own 64 rows each: a warp reads the int4 fragments
// of its strip from shared memory, dequantizes them in registers while the tensor cores work on the step before, and issues wgmma with them
// as A; the tokens are B, read from shared memory. Scales go to the sums of a group, in fp32, where registers allow a second set of
// accumulators, and into the operand for wide tiles. One more warp feeds a ring of slots (128 k each): one tensor-map load for the weights,
// two for the tokens, halved and multicast where two blocks of a cluster work on neighbouring rows and the same tokens.
//
// Tiles that do not fill whole waves of blocks are cut along k ("stream-k") into equal ranges of chunks, unless idle blocks cost less than
// adding up. The block that holds a tile's first chunk owns the tile; the others leave fp32 partial sums in the workspace, and the owner
// adds them in order of k, so results are the same bits every time. An owner waits only for blocks with lower indices, which start first:
// two such kernels sharing a GPU cannot wait for each other in a circle.
#include "gemm/wgmma.h"

#include <algorithm>
#include <atomic>

#include "common/launch.cuh"
#include "common/layout.cuh"
#include "gemm/weight_map.cuh"
#include "gemm/wgmma_table.cuh"

namespace gptq {
namespace {

constexpr int kMaxBlocks = 264;  // of one launch: two for each of 132 SMs
constexpr size_t kFlagBytes = 8192;
constexpr size_t kPartialBytes = size_t{kMaxBlocks} * 128 * 128 * sizeof(float);  // or half as many blocks with tiles twice that size

struct Choice {
  WgmmaTile tile;
  WgmmaSharing sharing;
};

// A tile for more than 32 tokens. `percent`: its time per chunk over what the tensor cores need, measured on an H200 on LLaMA 7B and 13B
// linears.
struct TileTime {
  WgmmaTile tile;
  int rows, tokens, cluster, percent;
  bool scaled;
};
constexpr TileTime kTileTimes[] = {
    {WgmmaTile::k128x64, 128, 64, 1, 150, false},  {WgmmaTile::k192x64, 192, 64, 1, 140, false},
    {WgmmaTile::k192x96, 192, 96, 1, 109, false},  {WgmmaTile::k128x128, 128, 128, 1, 116, false},
    {WgmmaTile::k192x128, 192, 128, 1, 103, true}, {WgmmaTile::k128x192, 128, 192, 2, 96, true},
    {WgmmaTile::k128x256, 128, 256, 2, 97, true},
};
constexpr int kCutCost = 8;              // chunks that cutting tiles along k takes as long as
constexpr int64_t kSmallWeight = 16000;  // chunks of all strips
constexpr int kNarrowWeight = 5600;      // output rows
// Weights of a matrix from which operands may be rounded: their errors average out over many scales only, and for fewer the exact tiles
// cost nothing. For one order of sums the inputs alone decide: GPUs that share a model have some of a weight's outputs each.
constexpr int64_t kFewWeights = 1 << 20;
constexpr int kFewInputs = 2048;

// Up to 32 tokens memory and issue slots are the limit, and two blocks per SM hide most; small weights have no work for so many.
// Above, the tile that is done first: fewer padded tokens, fuller waves, less to add up. For one order of sums, of those that scale sums or
// of those that scale operands.
Choice choose_tile(int m, int n, int chunks, int sms, bool one_order) {
  const int64_t units = static_cast<int64_t>(n / kStripRows) * chunks;
  const bool few = one_order ? chunks * kChunkK < kFewInputs : units * kStripRows * kChunkK < kFewWeights;
  if (m <= 32 && !one_order)
    return {m <= 16 ? WgmmaTile::k128x16 : WgmmaTile::k128x32,
            units > kSmallWeight || n > kNarrowWeight ? WgmmaSharing::kTwo : WgmmaSharing::kOne};
  Choice best = {};
  int64_t least = INT64_MAX;
  for (const TileTime& c : kTileTimes) {
    if (one_order ? c.scaled == few : c.scaled && few) continue;
    const int rows = c.rows * c.cluster, clusters = sms / c.cluster;
    const int64_t tiles = static_cast<int64_t>((m + c.tokens - 1) / c.tokens) * ((n + rows - 1) / rows);
    const int64_t whole = whole_time(tiles, clusters, chunks), cut = cut_time(tiles, clusters, chunks, kCutCost);
    const bool cuts = !one_order || (c.scaled && tiles > clusters);
    const int64_t time = (cuts ? std::min(whole, cut) : whole) * c.rows * c.tokens * c.percent;
    if (time < least) least = time, best = {c.tile, WgmmaSharing::kOne};
  }
  return best;
}

}  // namespace

size_t wgmma_workspace_bytes() { return kFlagBytes + kPartialBytes; }

cudaError_t launch_wgmma(const WgmmaGemm& call, cudaStream_t stream) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  if (call.m <= 0 || call.n <= 0 || call.k <= 0 || call.n % 16 || call.k % 8 || call.ldx % 8 || call.ldy % 8 || call.ldr % 8)
    return cudaErrorInvalidValue;
  if (!aligned(call.weight) || !aligned(call.x) || !aligned(call.y) || !aligned(call.residual) || !aligned(call.workspace))
    return cudaErrorInvalidValue;
  if ((call.groups != 0 && call.groups != 1 && call.groups != 2 && call.groups != 4) || call.paired < kApart ||
      call.paired > kPlanesGate || (call.paired == kGated && call.residual != nullptr) ||
      (call.paired == kPlanesGate && call.residual == nullptr) || call.tile < 0 || call.tile > static_cast<int>(WgmmaTile::kLast) ||
      call.sharing < 0 || call.sharing > static_cast<int>(WgmmaSharing::kTwo) || call.split < 0 ||
      call.split > static_cast<int>(GemmSplit::kLast))
    return cudaErrorInvalidValue;
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  if (device.capability != 90) return cudaErrorNoKernelImageForDevice;

  const int chunks = (call.k + kChunkK - 1) / kChunkK;
  Choice choice = choose_tile(call.m, call.n, chunks, device.sms, call.split == static_cast<int>(GemmSplit::kOneOrder));
  if (call.tile != 0)
    choice = {static_cast<WgmmaTile>(call.tile), call.sharing == 0 ? WgmmaSharing::kOne : static_cast<WgmmaSharing>(call.sharing)};
  const WgmmaKernel kernel = (call.bf16 ? wgmma_bf16 : wgmma_fp16)(choice.tile, call.groups <= 1);

  WgmmaParams p = {};
  p.y = static_cast<uint16_t*>(call.y);
  p.bias = static_cast<const uint16_t*>(call.bias);
  p.residual = static_cast<const uint16_t*>(call.residual);
  p.flags = static_cast<int*>(call.workspace);
  p.partials = reinterpret_cast<float*>(static_cast<uint8_t*>(call.workspace) + kFlagBytes);
  p.m = call.m;
  p.n = call.n;
  p.strips = call.n / kStripRows;
  p.chunks = chunks;
  p.chunk_bytes = chunk_bytes(std::max(call.groups, 1), call.zeros);
  p.ldy = call.ldy;
  p.ldr = call.ldr;
  p.groups = std::max(call.groups, 1);
  p.one_group = call.groups == 0;
  p.zeros = call.zeros;
  p.paired = call.paired;
  p.m_tiles = (p.m + kernel.tokens - 1) / kernel.tokens;
  p.n_tiles = (p.strips + kernel.strips * kernel.cluster - 1) / (kernel.strips * kernel.cluster);

  const size_t partial = sizeof(float) * kernel.strips * kStripRows * kernel.tokens;
  const int wanted = device.sms * (choice.sharing == WgmmaSharing::kTwo ? 2 : 1);
  const int blocks = std::min({wanted, kMaxBlocks, static_cast<int>(kPartialBytes / partial)});
  share_tiles(p, blocks / kernel.cluster, kCutCost, call.split, kernel.resumes);

  const int slot = kernel.tokens * kChunkK * 2 + wgmma_weight_bytes(kernel.strips, p.chunk_bytes), barriers = 16;
  p.stages = ((device.smem + 1024) / (choice.sharing == WgmmaSharing::kOne ? 1 : 2) - 1024 - kernel.turn_bytes) / (slot + barriers);
  if (p.stages < 2) return cudaErrorInvalidConfiguration;

  CUtensorMap weights, tokens;
  if (!map_weight(weights, call.weight, p.strips, p.chunks, p.chunk_bytes, kernel.strips) ||
      !map_rows(tokens, call.x, call.bf16, call.m, call.k, call.ldx, kernel.tokens / kernel.cluster))
    return cudaErrorInvalidValue;

  static std::atomic<uint64_t> done[2][2][static_cast<int>(WgmmaTile::kLast) + 1];
  std::atomic<uint64_t>& mine = done[call.bf16][call.groups <= 1][static_cast<int>(choice.tile)];
  if (const cudaError_t status = set_limits(kernel.function, mine, device.smem, device); status != cudaSuccess) return status;
  const int smem = kernel.turn_bytes + p.stages * (slot + barriers);
  return launch_kernel(kernel.function, {dim3(p.clusters * kernel.cluster), kernel.threads, smem, stream, kernel.cluster}, device, weights,
                       tokens, p);
}

}  // namespace gptq
