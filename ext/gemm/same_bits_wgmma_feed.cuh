// What brings a chunk into the ring of same_bits_wgmma_kernel.cuh, and the warps that sum up its x.
#pragma once
#include "gemm/same_bits_finish.cuh"
#include "gemm/same_bits_sums.cuh"
#include "gemm/wgmma_ptx.cuh"

namespace gptq {
namespace {

constexpr int kMultiplyWarps = 8;  // two warpgroups, of 64 output rows each
constexpr int kSumWarps = 3;       // that compute the sums of x; one more brings everything in
constexpr int kThreads = 32 * (kMultiplyWarps + 1 + kSumWarps);

// A kernel: 128 output rows x TN tokens. ONE: one scale group per chunk, or fewer.
template <bool BF_, bool ONE_, int TN_>
struct HopperShape {
  static constexpr bool BF = BF_, ONE = ONE_;
  static constexpr int TN = TN_, kSums = TN / 2;        // of a lane
  static constexpr int kTokenBytes = TN * kChunkK * 2;  // of a slot
  static constexpr int kPairs = TN / 16;                // pairs of column tiles of eight
  static constexpr bool kTotalInShared = TN > 96;
  static constexpr int kKept = kTotalInShared ? 12 : 0;  // sums that stay in registers all the same
  static constexpr int kTotalBytes = kTotalInShared ? 32 * kMultiplyWarps * (kSums - kKept) * 4 : 0;
  static constexpr int kMinBlocks = TN <= 32 ? 2 : 1;
  // Registers per thread, of the 64,512 or, twice per SM, 30,720 at the start.
  static constexpr int kOtherRegisters = kMinBlocks == 1 ? 56 : 32, kMultiplyRegisters = kMinBlocks == 1 ? 224 : 104;
  static constexpr int kSumsAtOnce = kMinBlocks == 2 ? kPairs : TN == 96 ? 3 : 4;  // pairs whose sums of x a warp computes
  static_assert(kPairs % kSumsAtOnce == 0);
  static constexpr int kK16PerStep = ONE ? 4 : 2, kSteps = 8 / kK16PerStep;
  // The warpgroups multiply in turns: one scales its sums while the other's products fill the tensor cores. With 128 tokens the sums of x
  // then find no gap for theirs, and all take longer.
  static constexpr bool kTurns = ONE && TN == 64;
  static constexpr int kArrivals = kTurns ? 32 : 1;  // of a warp, when it lets a slot go
};

// Shared memory as 32-bit addresses: slots of tokens, slots of weights, sums of a segment, sums of x and three barriers per slot.
template <class S>
struct HopperRing {
  uint32_t tokens, weights, totals, sums, full, empty, summed;
  int slot_w_bytes, slot_s_bytes;
  __device__ __forceinline__ HopperRing(const void* smem, const SameBitsParams& p)
      : tokens(smem_addr(smem)), slot_w_bytes(p.slot), slot_s_bytes(p.groups * S::TN * 4) {
    weights = tokens + p.stages * S::kTokenBytes;
    totals = weights + p.stages * slot_w_bytes;
    sums = totals + S::kTotalBytes;
    full = sums + p.stages * slot_s_bytes;
    empty = full + 8 * p.stages;
    summed = empty + 8 * p.stages;
  }
};

template <class S, class BARRIER>
__device__ __forceinline__ void let_go(BARRIER empty) {
  if constexpr (S::kArrivals == 1) {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) mbar_arrive(empty);
  } else {
    mbar_arrive(empty);
  }
}

// Chunks in the order in which they are added up.
struct ChunkWalk {
  Walk walk;
  Segment at;
  int chain, chunk, end;
  bool more;
  __device__ __forceinline__ ChunkWalk(const SameBitsParams& p) : walk(p, blockIdx.x) { open(p); }
  __device__ __forceinline__ void start(const SameBitsParams& p) {
    const Chain its(p, chain);
    chunk = its.first, end = its.end;
  }
  __device__ __forceinline__ void open(const SameBitsParams& p) {
    more = walk.next(p, at);
    if (!more) return;
    chain = at.first;
    start(p);
  }
  // True: a tile begins, or nothing.
  __device__ __forceinline__ bool step(const SameBitsParams& p) {
    chunk += kChains;
    if (chunk < end) return false;
    if (++chain < at.last) {
      start(p);
      return false;
    }
    open(p);
    return true;
  }
};

template <class S>
__device__ __forceinline__ void feed_ring(const CUtensorMap* weight_map, const CUtensorMap* token_map, const SameBitsParams& p,
                                          const HopperRing<S>& ring) {
  tensor_prefetch(weight_map);
  tensor_prefetch(token_map);
  const int tx = S::kTokenBytes + kMultiplyWarps * p.chunk_bytes;
  struct Feed {
    ChunkWalk walk;
    int strip, token;
    __device__ __forceinline__ Feed(const SameBitsParams& p) : walk(p) { place(p); }
    __device__ __forceinline__ void place(const SameBitsParams& p) {
      if (!walk.more) return;
      int m_tile, n_tile;
      tile_position(p, walk.at.tile, m_tile, n_tile);
      strip = n_tile * kMultiplyWarps, token = m_tile * S::TN;
    }
    __device__ __forceinline__ void step(const SameBitsParams& p) {
      if (walk.step(p)) place(p);
    }
  };
  const auto load_weights = [&](const Feed& feed, int slot) {
    mbar_expect(ring.full + 8 * slot, tx);
    tensor_load_3d(ring.weights + slot * ring.slot_w_bytes, weight_map, 0, feed.walk.chunk, feed.strip, ring.full + 8 * slot);
  };
  const auto load_tokens = [&](const Feed& feed, int slot) {
#pragma unroll
    for (int panel = 0; panel < 2; panel++)
      tensor_load(ring.tokens + slot * S::kTokenBytes + panel * S::TN * 128, token_map, feed.walk.chunk * kChunkK + 64 * panel, feed.token,
                  ring.full + 8 * slot);
  };
  // The first lap over the ring needs no free slot, and its weights need nothing of the kernel before this one.
  Feed ahead(p), behind = ahead;
  for (int i = 0; i < p.stages && ahead.walk.more; i++, ahead.step(p)) load_weights(ahead, i);
  grid_launch_dependents();  // where the next kernel's blocks fit beside these, they fetch their weights now
  grid_wait();
  for (int i = 0; i < p.stages && behind.walk.more; i++, behind.step(p)) load_tokens(behind, i);
  int slot = 0;
  uint32_t parity = 0;
  for (; ahead.walk.more; ahead.step(p)) {
    mbar_wait(ring.empty + 8 * slot, parity);
    load_weights(ahead, slot);
    load_tokens(ahead, slot);
    if (++slot == p.stages) slot = 0, parity ^= 1;
  }
}

// The sums of x of each chunk, by mma.sync beside the others' wgmma: x is the A operand, 16 tokens of it, and each column of the product
// the same. The warps take chunks in turn, since the products of a group depend on one another. Each waits for every chunk and lets it go:
// a barrier tells only two phases apart, and copies may end in another order than they began in.
template <class S>
__device__ __forceinline__ void sum_tokens(const SameBitsParams& p, const HopperRing<S>& ring, int warp) {
  constexpr int kAtOnce = S::kSumsAtOnce;
  const int lane = threadIdx.x & 31;
  const uint32_t minus = minus_of<S::BF>(p.zeros);
  // Of 16 tokens and of 16 k, as the A operand wants them: 16-byte pieces are permuted by a token's number modulo 8.
  const uint32_t places = (lane & 15) * 128 + (((lane >> 4) ^ (lane & 7)) << 4);
  int slot = 0, turn = 0;
  uint32_t parity = 0;
  for (ChunkWalk walk(p); walk.more; walk.step(p)) {
    mbar_wait(ring.full + 8 * slot, parity);
    if (turn == warp) {
      uint32_t tokens = ring.tokens + slot * S::kTokenBytes + places, to = ring.sums + slot * ring.slot_s_bytes + (lane >> 2) * 4;
#pragma unroll 1
      for (int pair = 0; pair < S::kPairs; pair += kAtOnce, tokens += kAtOnce * 16 * 128, to += kAtOnce * 64) {
        float off[kAtOnce][4] = {};
#pragma unroll
        for (int k16 = 0; k16 < 8; k16++) {
          const uint32_t at = (tokens ^ k16 % 4 * 32) + k16 / 4 * (S::TN * 128);
          const bool ends = S::ONE ? k16 == 7 : k16 % 4 == 3 || (k16 % 2 == 1 && p.groups == 4);
          const int group = S::ONE ? 0 : (k16 / 2 * p.groups) >> 2;
          uint32_t x[kAtOnce][4];
#pragma unroll
          for (int i = 0; i < kAtOnce; i++) ldmatrix_x4(x[i], at + i * 16 * 128);
#pragma unroll
          for (int i = 0; i < kAtOnce; i++) mma_m16n8k16<S::BF>(off[i], x[i], minus, minus);
          if (!ends) continue;
#pragma unroll
          for (int i = 0; i < kAtOnce; i++) {
            const uint32_t its = to + group * (S::TN * 4) + i * 64;
            if ((lane & 3) == 0) sts32(its, off[i][0]), sts32(its + 32, off[i][2]);
            off[i][0] = off[i][1] = off[i][2] = off[i][3] = 0.f;
          }
        }
      }
      if ((lane & 3) == 0) mbar_arrive(ring.summed + 8 * slot);  // each for itself, as in the GEMV
    }
    let_go<S>(ring.empty + 8 * slot);
    if (++turn == kSumWarps) turn = 0;
    if (++slot == p.stages) slot = 0, parity ^= 1;
  }
}

}  // namespace
}  // namespace gptq
