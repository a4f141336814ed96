// The head's product by wgmma: tiles of 128 rows of the weight x 8 to 256 tokens. Two warpgroups have 64 rows each, and both operands come
// from shared memory, which one thread fills by tensor maps, a slot for 64 k. The weights are A and tokens B, whatever the tile: head.h.
//
// Of many tokens two blocks are a cluster: each has rows of its own, and brings half of the tokens in for both, without which the L2 could
// not keep up.
//
// Programmatic dependent launch: weights of the first lap over the ring are asked for before grid_wait(), x after it.
#pragma once
#include "gemm/wgmma_ptx.cuh"
#include "head/head_table.cuh"

namespace gptq {
namespace {

constexpr int kHeadGroups = 2;                          // warpgroups that multiply, and one warp more
constexpr int kWgmmaThreads = kHeadGroups * 128 + 32;

template <bool BF_, int TN_, int CL_>
struct WgmmaHead {
  static constexpr bool BF = BF_;
  static constexpr int TN = TN_, CL = CL_;
  static constexpr int kWeightBytes = kHeadRows * kHeadRowBytes, kTokenBytes = TN * kHeadRowBytes, kSlot = head_slot_bytes(TN);
  static constexpr int kBarrierBytes = 16;  // of a slot
};

// As 32-bit addresses: the slots' weights, their tokens, a pair of barriers for each.
template <class S>
struct HeadRing {
  uint32_t weights, tokens, full, empty;
  __device__ __forceinline__ HeadRing(const void* smem, int stages)
      : weights(smem_addr(smem)), tokens(weights + stages * S::kWeightBytes), full(tokens + stages * S::kTokenBytes),
        empty(full + 8 * stages) {}
};

template <class S>
__device__ __forceinline__ void feed_head(const CUtensorMap* weight_map, const CUtensorMap* token_map, const HeadParams& p,
                                          const HeadRing<S>& ring, int cluster, int rank) {
  tensor_prefetch(weight_map);
  tensor_prefetch(token_map);
  struct Feed {
    int tile, chunk, row, token;
    __device__ __forceinline__ void open(const HeadParams& p, int rank) {
      const int n_tile = tile / p.m_tiles;
      chunk = 0, row = (n_tile * S::CL + rank) * kHeadRows, token = (tile - n_tile * p.m_tiles) * S::TN + rank * (S::TN / S::CL);
    }
    __device__ __forceinline__ void step(const HeadParams& p, int rank) {
      if (++chunk == p.chunks) tile += gridDim.x / S::CL, open(p, rank);
    }
  };
  const auto load_weights = [&](const Feed& feed, int slot) {
    mbar_expect(ring.full + 8 * slot, S::kSlot);
    tensor_load(ring.weights + slot * S::kWeightBytes, weight_map, feed.chunk * kHeadK, feed.row, ring.full + 8 * slot);
  };
  const auto load_tokens = [&](const Feed& feed, int slot) {
    const uint32_t to = ring.tokens + slot * S::kTokenBytes + rank * (S::kTokenBytes / S::CL);
    if constexpr (S::CL == 1) tensor_load(to, token_map, feed.chunk * kHeadK, feed.token, ring.full + 8 * slot);
    else tensor_load_multicast(to, token_map, feed.chunk * kHeadK, feed.token, ring.full + 8 * slot, (1 << S::CL) - 1);
  };
  Feed ahead{cluster};
  ahead.open(p, rank);
  Feed behind = ahead;
#pragma unroll 1
  for (int i = 0; i < p.stages && ahead.tile < p.tiles; i++, ahead.step(p, rank)) load_weights(ahead, i);
  grid_launch_dependents();
  grid_wait();
#pragma unroll 1
  for (int i = 0; i < p.stages && behind.tile < p.tiles; i++, behind.step(p, rank)) load_tokens(behind, i);
  int slot = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (; ahead.tile < p.tiles; ahead.step(p, rank)) {
    mbar_wait(ring.empty + 8 * slot, parity);
    load_weights(ahead, slot);
    load_tokens(ahead, slot);
    if (++slot == p.stages) slot = 0, parity ^= 1;
  }
}

template <class S>
__device__ __forceinline__ void multiply_tiles(const HeadParams& p, const HeadRing<S>& ring, int cluster, int rank) {
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), group = warp >> 2;
  const uint32_t empty_there = S::CL == 1 ? ring.empty : cluster_address(ring.empty, lane & (S::CL - 1));
  const auto release = [&](int slot) {
    if (lane >= S::CL) return;
    if constexpr (S::CL == 1) mbar_arrive(ring.empty + 8 * slot);
    else mbar_arrive_cluster(empty_there + 8 * slot);
  };
  grid_wait();
  const uint32_t first_weights = (ring.weights + group * (S::kWeightBytes / kHeadGroups)) >> 4, first_tokens = ring.tokens >> 4;
  int slot = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (int tile = cluster; tile < p.tiles; tile += gridDim.x / S::CL) {
    float d[S::TN / 2];
    int previous = 0;
#pragma unroll 1
    for (int c = 0; c < p.chunks; c++) {
      // The same in all lanes, and so in uniform registers.
      const uint32_t weights = __reduce_max_sync(~0u, first_weights + slot * (S::kWeightBytes >> 4));
      const uint32_t tokens = __reduce_max_sync(~0u, first_tokens + slot * (S::kTokenBytes >> 4));
      mbar_wait(ring.full + 8 * slot, parity);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < kHeadK / 16; j++)
        WgmmaShared<S::BF, S::TN>::mma(d, wgmma_desc(weights + 2 * j), wgmma_desc(tokens + 2 * j), j == 0 ? c > 0 : 1);
      wgmma_commit();
      if (c > 0) {
        wgmma_wait<1>();
        release(previous);
      }
      previous = slot;
      if (++slot == p.stages) slot = 0, parity ^= 1;
    }
    wgmma_wait<0>();
    release(previous);
#pragma unroll
    for (int i = 0; i < S::TN / 2; i++) asm volatile("" : "+f"(d[i])::"memory");  // read after the wait, not before it
    const int n_tile = tile / p.m_tiles, m_tile = tile - n_tile * p.m_tiles;
    const int row = (n_tile * S::CL + rank) * kHeadRows + warp * 16 + (lane >> 2), token = m_tile * S::TN + (lane & 3) * 2;
    float* to_token = p.logits + token * p.ldl + row;
#pragma unroll
    for (int n = 0; n < S::TN / 8; n++, to_token += 8 * p.ldl)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        if (token + n * 8 + j >= p.m) continue;
        if (row < p.n) to_token[j * p.ldl] = d[n * 4 + j];
        if (row + 8 < p.n) to_token[j * p.ldl + 8] = d[n * 4 + 2 + j];
      }
  }
}

template <class S>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    head_wgmma_kernel(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap token_map,
                      const __grid_constant__ HeadParams p) {
#ifdef __CUDA_ARCH__
  extern __shared__ __align__(1024) uint8_t smem[];
  const HeadRing<S> ring(smem, p.stages);
  const int rank = S::CL == 1 ? 0 : static_cast<int>(cluster_rank()), cluster = blockIdx.x / S::CL;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; i++) {
      mbar_init(ring.full + 8 * i, 1);
      mbar_init(ring.empty + 8 * i, 4 * kHeadGroups * S::CL);
    }
    mbar_init_fence();
  }
  if constexpr (S::CL == 1) __syncthreads();
  else cluster_sync();
  if (threadIdx.x >= 128 * kHeadGroups) {
    if (threadIdx.x == 128 * kHeadGroups) feed_head<S>(&weight_map, &token_map, p, ring, cluster, rank);
  } else {
    multiply_tiles<S>(p, ring, cluster, rank);
  }
  if constexpr (S::CL > 1) {
    __syncwarp();    // of the feeding warp one thread comes from a branch of its own, and .aligned wants all in one instruction
    cluster_sync();  // a neighbour may still signal this block's barriers
  }
#endif
}

}  // namespace
}  // namespace gptq
