// The kernel of same_bits_wgmma.cu, compiled in same_bits_wgmma_fp16.cu and same_bits_wgmma_bf16.cu so that two cores work side by side.
//
// What gemv_math.cuh does to a group of a chunk is done here to more tokens, by an instruction that gives the same bits.
#pragma once
#include "gemm/same_bits_wgmma_feed.cuh"

namespace gptq {
namespace {

// Reads of registers that the tensor cores wrote must not move above the wait.
template <int COUNT>
__device__ __forceinline__ void hold(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}

template <class S>
__device__ __forceinline__ void consume(const SameBitsParams& p, const HopperRing<S>& ring, const uint8_t* smem, int warp) {
  constexpr int TN = S::TN, kK16PerStep = S::kK16PerStep, kSteps = S::kSteps, kGroups = S::ONE ? 1 : 4;
  const int lane = threadIdx.x & 31, group = warp >> 2;
  if (S::kTurns && group == 1) named_arrive(1, 32 * kMultiplyWarps);  // the first turn is group 0's
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
  const auto take = [&] {
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
  };
  const auto advance = [&] {
    slot++;
    chunk += ring.slot_w_bytes;
    tokens += S::kTokenBytes >> 4;
    if (slot == p.stages) slot = 0, parity ^= 1, chunk = my_chunk, tokens = tokens0;
  };
  const auto finish = [&](float(&acc)[S::kSums], float2 its_scale, float2 its_zero, uint32_t sums) {
#pragma unroll
    for (int j = 0; j < TN / 8; j++) finish_group(acc + 4 * j, d + 4 * j, its_scale, its_zero, lds64(sums + j * 32));
  };
  const auto multiply = [&](const Segment& s, int chain, float(&acc)[S::kSums]) {
    const Chain at(p, chain);
    if (chain == s.first) {
      take();
      expand_step(a[0], 0);
    }
#pragma unroll 1
    for (int c = at.first; c < at.end; c += kChains) {
      const bool more = c + kChains < at.end || chain + 1 < s.last;  // of this tile
      const uint32_t here = __reduce_max_sync(0xffffffffu, tokens);  // the same in all lanes, and now in a uniform register
      const uint32_t sums = ring.sums + slot * ring.slot_s_bytes + (lane & 3) * 8;
      const auto summed = ring.summed + 8 * slot, empty = ring.empty + 8 * slot;
      const uint32_t now_parity = parity;
      if constexpr (S::kTurns) {
        named_sync(1 + group, 32 * kMultiplyWarps);
        multiply_step(a[0], here, 0, 0);
        expand_step(a[1], 1);
        multiply_step(a[1], here, 1, 1);
        named_arrive(2 - group, 32 * kMultiplyWarps);
        const float2 its_scale = scale_pair(scale[0]), its_zero = zero_pair<S::BF>(p.zeros, zero[0]);
        advance();
        if (more) {
          take();
          wgmma_wait<1>();
          expand_step(a[0], 0);
        }
        mbar_wait(summed, now_parity);
        wgmma_wait<0>();
        hold(d);
        finish(acc, its_scale, its_zero, sums);
      } else {
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
            if (more) {
              take();
              expand_step(a[0], 0);
            }
          }
          wgmma_wait<0>();
          hold(d);
          if (step == 0) mbar_wait(summed, now_parity);
          if (ends) finish(acc, its_scale, its_zero, sums + (S::ONE ? 0 : (step * p.groups) >> 2) * (TN * 4));
        }
      }
      let_go<S>(empty);
    }
  };
  const auto store = [&](int tile, const float(&sums)[S::kSums]) {
    int m_tile, n_tile;
    tile_position(p, tile, m_tile, n_tile);
    store_strip<S::BF, TN>(p, sums, n_tile * kMultiplyWarps + warp, m_tile * TN);
  };
  if constexpr (S::kTotalInShared) {
    InShared<S::kSums, S::kKept> total(ring.totals + threadIdx.x * 16, 32 * kMultiplyWarps * 16);
    add_up<S::kSums>(p, kMultiplyWarps, warp, total, multiply, store);
  } else {
    InRegisters<S::kSums> total;
    add_up<S::kSums, S::TN == 64>(p, kMultiplyWarps, warp, total, multiply, store);
  }
  if (S::kTurns && group == 0) named_sync(1, 32 * kMultiplyWarps);  // a turn that nobody takes
}

template <class S>
__global__ void __launch_bounds__(kThreads, S::kMinBlocks)
    same_bits_wgmma_kernel(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap token_map,
                           const __grid_constant__ SameBitsParams p) {
#ifdef __CUDA_ARCH__
  extern __shared__ __align__(1024) uint8_t smem[];
  const HopperRing<S> ring(smem, p);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; i++) {
      mbar_init(ring.full + 8 * i, 1);
      mbar_init(ring.empty + 8 * i, (kMultiplyWarps + kSumWarps) * S::kArrivals);
      mbar_init(ring.summed + 8 * i, 8);
    }
    mbar_init_fence();
  }
  __syncthreads();
  if (warp >= kMultiplyWarps) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(S::kOtherRegisters));
    if (threadIdx.x == 32 * kMultiplyWarps) feed_ring<S>(&weight_map, &token_map, p, ring);
    if (warp > kMultiplyWarps) sum_tokens<S>(p, ring, warp - kMultiplyWarps - 1);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::kMultiplyRegisters));
    consume<S>(p, ring, smem, warp);
  }
#endif
}

template <class S>
SameBitsKernel info() {
  return {reinterpret_cast<const void*>(same_bits_wgmma_kernel<S>), kThreads / 32, S::kMinBlocks, S::kTotalBytes};
}

template <bool BF, bool ONE>
SameBitsKernel find_kernel(HopperTile tile) {
  switch (tile) {
    case HopperTile::k128x16: return info<HopperShape<BF, ONE, 16>>();
    case HopperTile::k128x32: return info<HopperShape<BF, ONE, 32>>();
    case HopperTile::k128x64: return info<HopperShape<BF, ONE, 64>>();
    case HopperTile::k128x96: return info<HopperShape<BF, ONE, 96>>();
    case HopperTile::k128x128: return info<HopperShape<BF, ONE, 128>>();
  }
  return {};
}

template <bool BF>
SameBitsKernel find_kernel(HopperTile tile, bool one_group) {
  return one_group ? find_kernel<BF, true>(tile) : find_kernel<BF, false>(tile);
}

}  // namespace
}  // namespace gptq
