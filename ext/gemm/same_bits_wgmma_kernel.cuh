// The kernel of same_bits_wgmma.cu, compiled in same_bits_wgmma_fp16.cu and same_bits_wgmma_bf16.cu so that two cores work side by side.
//
// What gemv_math.cuh does to a group of a chunk is done here to more tokens, by an instruction that gives the same bits.
#pragma once
#include "gemm/same_bits_finish.cuh"
#include "gemm/same_bits_sums.cuh"
#include "gemm/wgmma_ptx.cuh"

namespace gptq {
namespace {

// A kernel: 64 NWG output rows x TN tokens. ONE: one scale group per chunk, or fewer.
template <bool BF_, bool ONE_, int TN_, int NWG_>
struct HopperShape {
  static constexpr bool BF = BF_, ONE = ONE_;
  static constexpr int TN = TN_, NWG = NWG_;
  static constexpr int kStrips = 4 * NWG, kThreads = 128 * (NWG + 1), kSums = TN / 2;  // of a lane
  static constexpr int kTokenBytes = TN * kChunkK * 2;                                  // of a slot
  static constexpr int kPairs = TN / 16;                                                // pairs of column tiles of eight
  static constexpr bool kTotalInShared = TN > 64;
  static constexpr int kKept = TN == 128 ? 12 : 0;  // sums that stay in registers all the same
  static constexpr int kTotalBytes = kTotalInShared ? 128 * NWG * (kSums - kKept) * 4 : 0;
  static constexpr int kMinBlocks = TN <= 32 ? 2 : 1;
  // Registers per thread, of the 64,512 (2 groups), 30,720 (2 groups, twice per SM) or 65,536 (3) at the start.
  static constexpr int kOtherRegisters = NWG == 2 && kMinBlocks == 1 ? 40 : 32;
  static constexpr int kConsumerRegisters = NWG == 3 ? 160 : kMinBlocks == 2 ? 104 : 232;
  static constexpr int kK16PerStep = ONE && NWG == 2 ? 4 : 2, kSteps = 8 / kK16PerStep;
};

constexpr int kSumWarps = 3;  // that compute the sums of x; one more brings everything in

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
  const int tx = S::kTokenBytes + S::kStrips * p.chunk_bytes;
  struct Feed {
    ChunkWalk walk;
    int strip, token;
    __device__ __forceinline__ Feed(const SameBitsParams& p) : walk(p) { place(p); }
    __device__ __forceinline__ void place(const SameBitsParams& p) {
      if (!walk.more) return;
      int m_tile, n_tile;
      tile_position(p, walk.at.tile, m_tile, n_tile);
      strip = n_tile * S::kStrips, token = m_tile * S::TN;
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
// the same. A warp has up to two times 16 tokens at once.
template <class S>
__device__ __forceinline__ void sum_tokens(const SameBitsParams& p, const HopperRing<S>& ring, int warp) {
  const int lane = threadIdx.x & 31;
  const uint32_t minus = minus_of<S::BF>(p.zeros);
  // Of 16 tokens and of 16 k, as ldmatrix wants them: 16-byte pieces are permuted by a token's number modulo 8.
  const uint32_t places = ((lane & 7) + ((lane >> 4) << 3)) * 128 + ((((lane >> 3) & 1) ^ (lane & 7)) << 4);
  int slot = 0;
  uint32_t parity = 0;
  for (ChunkWalk walk(p); walk.more; walk.step(p)) {
    mbar_wait(ring.full + 8 * slot, parity);
    const uint32_t tokens = ring.tokens + slot * S::kTokenBytes + places;
    const uint32_t to = ring.sums + slot * ring.slot_s_bytes + (lane >> 2) * 4;
#pragma unroll 1
    for (int pair = warp; pair < S::kPairs; pair += 2 * kSumWarps) {
      const bool two = pair + kSumWarps < S::kPairs;
      float off[2][4] = {};
#pragma unroll
      for (int k16 = 0; k16 < 8; k16++) {
        const uint32_t at = (tokens ^ k16 % 4 * 32) + k16 / 4 * (S::TN * 128) + pair * 16 * 128;
        const bool ends = S::ONE ? k16 == 7 : k16 % 4 == 3 || (k16 % 2 == 1 && p.groups == 4);
        const int group = S::ONE ? 0 : (k16 / 2 * p.groups) >> 2;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          if (i == 1 && !two) continue;
          uint32_t x[4];
          ldmatrix_x4(x, at + i * kSumWarps * 16 * 128);
          mma_m16n8k16<S::BF>(off[i], {x[0], x[2], x[1], x[3]}, minus, minus);
        }
        if (!ends) continue;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const uint32_t its = to + (group * S::TN + (pair + i * kSumWarps) * 16) * 4;
          if ((lane & 3) == 0 && (i == 0 || two)) sts32(its, off[i][0]), sts32(its + 32, off[i][2]);
          off[i][0] = off[i][1] = off[i][2] = off[i][3] = 0.f;
        }
      }
    }
    if ((lane & 3) == 0) mbar_arrive(ring.summed + 8 * slot);  // each for itself, as in the GEMV
    __syncwarp();
    if (lane == 0) mbar_arrive(ring.empty + 8 * slot);
    if (++slot == p.stages) slot = 0, parity ^= 1;
  }
}

// Reads of registers that the tensor cores wrote must not move above the wait.
template <int COUNT>
__device__ __forceinline__ void hold(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}

template <class S>
__device__ __forceinline__ void consume(const SameBitsParams& p, const HopperRing<S>& ring, const uint8_t* smem, int warp) {
  constexpr int TN = S::TN, kK16PerStep = S::kK16PerStep, kSteps = S::kSteps, kGroups = S::ONE ? 1 : 4;
  const int lane = threadIdx.x & 31;
  float d[S::kSums];
  uint32_t a[2][kK16PerStep][4];
  uint32_t q[8], scale[kGroups], zero[kGroups];  // of the chunk ahead; with two groups each comes twice

  const auto expand_step = [&](uint32_t(&to)[kK16PerStep][4], int step) {
#pragma unroll
    for (int j = 0; j < kK16PerStep; j++) expand<S::BF>(q[step * kK16PerStep + j], to[j]);
  };
  const auto multiply_step = [&](uint32_t(&from)[kK16PerStep][4], uint32_t tokens, int step, int accumulate) {
#pragma unroll
    for (int j = 0; j < kK16PerStep; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) asm volatile("" : "+r"(from[j][i]));  // computed before the fence, not after it
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < kK16PerStep; j++) {
      const int k16 = step * kK16PerStep + j;
      Wgmma<S::BF, TN>::mma(d, from[j], wgmma_desc(tokens + k16 / 4 * (TN * 128 >> 4) + k16 % 4 * 2), j == 0 ? accumulate : 1);
    }
    wgmma_commit();
  };

  grid_wait();
  int slot = 0;
  uint32_t parity = 0;
  const uint8_t* const my_chunk = smem + p.stages * S::kTokenBytes + warp * p.chunk_bytes;
  const uint8_t* chunk = my_chunk;  // of this warp in the current slot
  const uint32_t tokens0 = ring.tokens >> 4;
  uint32_t tokens = tokens0;  // of the current slot, as in a descriptor
  const auto fetch = [&] {
    mbar_wait(ring.full + 8 * slot, parity);
#pragma unroll
    for (int b = 0; b < 2; b++) *reinterpret_cast<uint4*>(q + 4 * b) = *reinterpret_cast<const uint4*>(chunk + b * kBlockBytes + lane * 16);
#pragma unroll
    for (int i = 0; i < kGroups; i++) {
      const int group = S::ONE ? 0 : (i * p.groups) >> 2;
      scale[i] = *reinterpret_cast<const uint32_t*>(chunk + kWeightBytes + 32 * group + (lane & 28));
      zero[i] = 0;
      if (p.zeros) zero[i] = *reinterpret_cast<const uint16_t*>(chunk + kWeightBytes + 32 * p.groups + 16 * group + (lane & 28) / 2);
    }
    expand_step(a[0], 0);
  };
  const auto advance = [&] {
    slot++;
    chunk += ring.slot_w_bytes;
    tokens += S::kTokenBytes >> 4;
    if (slot == p.stages) slot = 0, parity ^= 1, chunk = my_chunk, tokens = tokens0;
  };
  const auto multiply = [&](const Segment& s, int chain, float(&acc)[S::kSums]) {
    const Chain at(p, chain);
    if (chain == s.first) fetch();
#pragma unroll 1
    for (int c = at.first; c < at.end; c += kChains) {
      const bool more = c + kChains < at.end || chain + 1 < s.last;  // of this tile
      const uint32_t here = __reduce_max_sync(0xffffffffu, tokens);  // the same in all lanes, and now in a uniform register
      const int now = slot;
      const uint32_t now_parity = parity;
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        constexpr int kGroupSteps = kSteps / kGroups;  // ONE: all; otherwise one step is 32 k
        const bool starts = S::ONE ? step == 0 : step % 2 == 0 || p.groups == 4;
        const bool ends = S::ONE ? step == kSteps - 1 : step % 2 == 1 || p.groups == 4;
        multiply_step(a[step & 1], here, step, starts ? 0 : 1);
        const float2 its_scale = scale_pair(scale[step / kGroupSteps]);
        const float2 its_zero = zero_pair<S::BF>(p.zeros, zero[step / kGroupSteps]);
        if (step + 1 < kSteps) {
          expand_step(a[(step + 1) & 1], step + 1);
        } else {
          advance();
          if (more) fetch();
        }
        wgmma_wait<0>();
        hold(d);
        if (step == 0) mbar_wait(ring.summed + 8 * now, now_parity);
        if (ends) {
          const int group = S::ONE ? 0 : (step * p.groups) >> 2;
          const uint32_t sums = ring.sums + now * ring.slot_s_bytes + (group * TN + (lane & 3) * 2) * 4;
#pragma unroll
          for (int j = 0; j < TN / 8; j++) finish_group(acc + 4 * j, d + 4 * j, its_scale, its_zero, lds64(sums + j * 32));
        }
      }
      __syncwarp();
      if (lane == 0) mbar_arrive(ring.empty + 8 * now);
    }
  };
  const auto store = [&](int tile, const float(&sums)[S::kSums]) {
    int m_tile, n_tile;
    tile_position(p, tile, m_tile, n_tile);
    store_strip<S::BF, TN>(p, sums, n_tile * S::kStrips + warp, m_tile * TN);
  };
  if constexpr (S::kTotalInShared) {
    InShared<S::kSums, S::kKept> total(ring.totals + threadIdx.x * 16, 128 * S::NWG * 16);
    add_up<S::kSums>(p, 4 * S::NWG, warp, total, multiply, store);
  } else {
    InRegisters<S::kSums> total;
    add_up<S::kSums>(p, 4 * S::NWG, warp, total, multiply, store);
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks)
    same_bits_wgmma_kernel(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap token_map,
                           const __grid_constant__ SameBitsParams p) {
#ifdef __CUDA_ARCH__
  extern __shared__ __align__(1024) uint8_t smem[];
  const HopperRing<S> ring(smem, p);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; i++) {
      mbar_init(ring.full + 8 * i, 1);
      mbar_init(ring.empty + 8 * i, 4 * S::NWG + kSumWarps);
      mbar_init(ring.summed + 8 * i, 8 * kSumWarps);
    }
    mbar_init_fence();
  }
  __syncthreads();
  if (warp >= 4 * S::NWG) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(S::kOtherRegisters));
    if (threadIdx.x == 128 * S::NWG) feed_ring<S>(&weight_map, &token_map, p, ring);
    if (warp > 4 * S::NWG) sum_tokens<S>(p, ring, warp - 4 * S::NWG - 1);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::kConsumerRegisters));
    consume<S>(p, ring, smem, warp);
  }
#endif
}

template <class S>
SameBitsKernel info() {
  return {reinterpret_cast<const void*>(same_bits_wgmma_kernel<S>), 4 * (S::NWG + 1), S::kMinBlocks, S::kTotalBytes};
}

template <bool BF, bool ONE>
SameBitsKernel find_kernel(HopperTile tile) {
  switch (tile) {
    case HopperTile::k128x16: return info<HopperShape<BF, ONE, 16, 2>>();
    case HopperTile::k128x32: return info<HopperShape<BF, ONE, 32, 2>>();
    case HopperTile::k128x64: return info<HopperShape<BF, ONE, 64, 2>>();
    case HopperTile::k192x96: return info<HopperShape<BF, ONE, 96, 3>>();
    case HopperTile::k128x128: return info<HopperShape<BF, ONE, 128, 2>>();
  }
  return {};
}

template <bool BF>
SameBitsKernel find_kernel(HopperTile tile, bool one_group) {
  return one_group ? find_kernel<BF, true>(tile) : find_kernel<BF, false>(tile);
}

}  // namespace
}  // namespace gptq
