// What the launchers of both kernels in the GEMV's order have in common: parameters, and which tile serves a product, cut or whole.
#pragma once
#include <algorithm>

#include "common/device.cuh"
#include "gemm/mma_call.cuh"
#include "gemm/same_bits.h"
#include "gemm/same_bits_table.cuh"
#include "gemv/gemv.h"

namespace gptq {
namespace {

constexpr int kReserved = 1024;  // shared memory the driver keeps per block
constexpr int kAlone = 180;      // percent of its time beside no other that a block takes where two would share an SM, each taking 200

// A tile, by its number. `percent`: its time per chunk, output row and token over that of the largest. `cut`: chunks that cutting tiles
// along k takes as long as.
struct SameBitsTime {
  int tile, strips, tokens, percent, cut;
};

// How a tile serves a product: blocks per SM, slots of a ring.
struct SameBitsWay {
  const SameBitsTime* tile = nullptr;
  int per_sm = 0, stages = 0;
  bool cut = false;
  int64_t time = INT64_MAX;
};

inline size_t same_bits_flag_bytes(const Device& device) { return (size_t{4} * 2 * kSameBitsWarps * device.sms + 127) / 128 * 128; }

// All of the parameters that do not depend on the tile.
inline cudaError_t same_bits_params(SameBitsParams& p, const SameBitsGemm& call, const Device& device) {
  p = {};
  take_call(p, call, same_bits_flag_bytes(device));
  p.k_chunks = (call.k + kChunkK - 1) / kChunkK;
  if (const cudaError_t status = gemv_segment(p.segment, call.k, call.groups, call.zeros); status != cudaSuccess) return status;
  const int before = (p.k_chunks - 1) / p.segment;  // the last segment
  p.chunks = before * kChains + std::min(kChains, p.k_chunks - before * p.segment);
  return cudaSuccess;
}

// `blocks`: per SM at most. depth(bytes): slots of its ring for a block with so much shared memory. `split`: 0, or a GemmSplit.
template <typename Depth>
SameBitsWay same_bits_way(const SameBitsTime& t, const SameBitsParams& p, int blocks, const Device& device, int split, const Depth& depth) {
  SameBitsWay way;
  way.tile = &t;
  for (way.per_sm = blocks; way.per_sm > 0 && way.stages < 2; way.per_sm--)
    way.stages = depth((device.smem + kReserved) / way.per_sm - kReserved);
  way.per_sm++;
  if (way.stages < 2) return way;
  const int64_t tiles = static_cast<int64_t>((p.m + t.tokens - 1) / t.tokens) * ((p.strips + t.strips - 1) / t.strips);
  const int clusters = device.sms * way.per_sm, over = static_cast<int>(tiles % clusters);
  const int longest = (over * p.chunks + clusters - 1) / clusters;  // chains
  // In chunks of a block that has its SM for itself, percent.
  const int64_t waves = tiles / clusters * p.k_chunks;
  const int percent = way.per_sm * 100, last_percent = over <= device.sms ? std::min(percent, kAlone) : percent;
  const int64_t whole = waves * percent + (over > 0 ? int64_t{p.k_chunks} * last_percent : 0);
  const int64_t cut = (waves + t.cut + static_cast<int64_t>(longest) * p.k_chunks / p.chunks) * percent;
  way.cut = over > 0 && longest <= kLongestCut && (split == 0 ? cut < whole : split == static_cast<int>(GemmSplit::kAlongK));
  way.time = (way.cut ? cut : whole) * t.strips * t.tokens * t.percent;
  return way;
}

// The rest of the parameters, but for the slots.
inline void share_same_bits(SameBitsParams& p, const SameBitsWay& way, const Device& device) {
  p.m_tiles = (p.m + way.tile->tokens - 1) / way.tile->tokens;
  p.n_tiles = (p.strips + way.tile->strips - 1) / way.tile->strips;
  p.tiles = p.m_tiles * p.n_tiles;
  const int clusters = device.sms * way.per_sm;
  p.split_tiles = way.cut ? p.tiles % clusters : 0;
  p.clusters = std::min(clusters, way.cut ? p.tiles * p.chunks : p.tiles);
  p.share = p.split_tiles * p.chunks / p.clusters, p.spare = p.split_tiles * p.chunks % p.clusters;
  p.stages = way.stages;
}

}  // namespace
}  // namespace gptq
