// The shared memory of a block, and the thread that fills it.
#pragma once
#include "common/layout.cuh"
#include "gemm/wgmma_ptx.cuh"
#include "gemm/wgmma_shape.cuh"
#include "gemm/wgmma_walk.cuh"

namespace gptq {
namespace {

// As 32-bit addresses: slots of tokens, slots of weights, room to turn results, a pair of barriers per slot.
template <class S>
struct WgmmaRing {
  uint32_t tokens, weights, turn, full, empty;
  int slot_w_bytes;
  __device__ __forceinline__ WgmmaRing(const void* smem, const WgmmaParams& p)
      : tokens(smem_addr(smem)), slot_w_bytes(wgmma_weight_bytes(S::kStrips, p.chunk_bytes)) {
    weights = tokens + p.stages * S::kTokenBytes;
    turn = weights + p.stages * slot_w_bytes;
    full = turn + S::NWG * S::kPassBytes;
    empty = full + 8 * p.stages;
  }
};

template <class S>
__device__ __forceinline__ void feed_ring(const CUtensorMap* weight_map, const CUtensorMap* token_map, const WgmmaParams& p,
                                          const WgmmaRing<S>& ring, int cluster, int rank) {
  constexpr int TN = S::TN, CL = S::CL;
  tensor_prefetch(weight_map);
  tensor_prefetch(token_map);
  const int tx = S::kTokenBytes + S::kStrips * p.chunk_bytes;
  struct Feed {
    WgmmaWalk<S> walk;
    Segment at;
    int strip, token;
    bool more;
    __device__ __forceinline__ void open(const WgmmaParams& p, int rank) {
      more = walk.next(p, at);
      if (!more) return;
      int m_tile, n_tile;
      tile_position(p, at.tile, m_tile, n_tile);
      strip = (n_tile * CL + rank) * S::kStrips;
      token = m_tile * TN + rank * (TN / CL);
    }
    __device__ __forceinline__ void step(const WgmmaParams& p, int rank) {
      if (++at.first == at.last) open(p, rank);
    }
  };
  auto load_weights = [&](const Feed& feed, int slot) {
    mbar_expect(ring.full + 8 * slot, tx);
    tensor_load_3d(ring.weights + slot * ring.slot_w_bytes, weight_map, 0, feed.at.first, feed.strip, ring.full + 8 * slot);
  };
  auto load_tokens = [&](const Feed& feed, int slot) {
#pragma unroll
    for (int panel = 0; panel < 2; panel++) {
      const uint32_t dst = ring.tokens + slot * S::kTokenBytes + (panel * TN + rank * (TN / CL)) * 128;
      const int k = feed.at.first * kChunkK + 64 * panel;
      if constexpr (CL == 1)
        tensor_load(dst, token_map, k, feed.token, ring.full + 8 * slot);
      else
        tensor_load_multicast(dst, token_map, k, feed.token, ring.full + 8 * slot, (1 << CL) - 1);
    }
  };
  // The first lap over the ring needs no free slot, and its weights need nothing of the kernel before this one.
  Feed ahead{WgmmaWalk<S>(p, cluster)};
  ahead.open(p, rank);
  Feed behind = ahead;
  for (int i = 0; i < p.stages && ahead.more; i++, ahead.step(p, rank)) load_weights(ahead, i);
  grid_launch_dependents();  // where the next kernel's blocks fit beside these, they fetch their weights now
  grid_wait();
  for (int i = 0; i < p.stages && behind.more; i++, behind.step(p, rank)) load_tokens(behind, i);
  int slot = 0;
  uint32_t parity = 0;
  for (; ahead.more; ahead.step(p, rank)) {
    mbar_wait(ring.empty + 8 * slot, parity);
    load_weights(ahead, slot);
    load_tokens(ahead, slot);
    if (++slot == p.stages) slot = 0, parity ^= 1;
  }
}

}  // namespace
}  // namespace gptq
