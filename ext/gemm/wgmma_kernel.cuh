// The kernel of wgmma.cu, compiled in wgmma_fp16.cu and wgmma_bf16.cu so that two cores work side by side.
#pragma once
#include "gemm/operands.cuh"
#include "gemm/wgmma_feed.cuh"
#include "gemm/wgmma_finish.cuh"

namespace gptq {
namespace {

// Reads of registers that the tensor cores wrote must not move above the wait.
template <int FR, int COUNT>
__device__ __forceinline__ void hold(float (&d)[FR][COUNT]) {
#pragma unroll
  for (int f = 0; f < FR; f++)
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[f][i])::"memory");
}

// total += scale * d, for the rows g and g+8 of a lane.
template <int COUNT>
__device__ __forceinline__ void add_group(float (&total)[COUNT], const float (&d)[COUNT], uint32_t scale_word) {
  const float2 scale = scale_pair(scale_word);
#pragma unroll
  for (int i = 0; i < COUNT; i++) total[i] = fmaf(i & 2 ? scale.y : scale.x, d[i], total[i]);
}

template <class S>
__device__ __forceinline__ void consume(const WgmmaParams& p, const WgmmaRing<S>& ring, const uint8_t* smem, const Place& place) {
  constexpr int TN = S::TN, FR = S::FR, CL = S::CL, kK16PerStep = S::kK16PerStep, kSteps = S::kSteps;
  constexpr int kGroupSteps = kSteps / S::kGroups;  // steps between two groups' ends
  const int lane = place.thread & 31;
  float d[FR][TN / 2];
  uint32_t a[2][FR][kK16PerStep][4];
  Packed<S::kGroups> packed[FR];

  auto expand_step = [&](uint32_t(&to)[FR][kK16PerStep][4], int step) {
#pragma unroll
    for (int f = 0; f < FR; f++) {
#pragma unroll
      for (int j = 0; j < kK16PerStep; j++) {
        const int k16 = step * kK16PerStep + j, i = S::ONE ? 0 : k16 / 2;
        if constexpr (S::SCALED)
          RowPair<S::BF>(p.one_group ? 0x3c003c00u : packed[f].scale[i], packed[f].zero[i]).weights(packed[f].q[k16], to[f][j]);
        else
          dequant<S::BF>(packed[f].q[k16], to[f][j], load_zeros<S::BF>(packed[f].zero[i]));
      }
    }
  };
  auto multiply = [&](uint32_t(&from)[FR][kK16PerStep][4], uint32_t tokens, int step, int accumulate) {
#pragma unroll
    for (int f = 0; f < FR; f++)
#pragma unroll
      for (int j = 0; j < kK16PerStep; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+r"(from[f][j][i]));  // computed before the fence, not after it
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < kK16PerStep; j++)
#pragma unroll
      for (int f = 0; f < FR; f++) {
        const int k16 = step * kK16PerStep + j;
        Wgmma<S::BF, TN>::mma(d[f], from[f][j], wgmma_desc(tokens + k16 / 4 * (TN * 128 >> 4) + k16 % 4 * 2), j == 0 ? accumulate : 1);
      }
    wgmma_commit();
  };
  const uint32_t empty_there = CL == 1 ? ring.empty : cluster_address(ring.empty, lane & (CL - 1));
  auto release = [&](int slot) {
    if (lane < CL) {
      if constexpr (CL == 1)
        mbar_arrive(ring.empty + 8 * slot);
      else
        mbar_arrive_cluster(empty_there + 8 * slot);
    }
  };

  grid_wait();
  WgmmaWalk<S> walk(p, place.cluster);
  Segment s;
  int slot = 0;
  uint32_t parity = 0;
  const uint8_t* const my_chunk = smem + p.stages * S::kTokenBytes + (place.group * FR * 4 + (place.thread >> 5)) * p.chunk_bytes;
  const uint8_t* chunk = my_chunk;  // of this warp in the current slot
  const uint32_t tokens0 = ring.tokens >> 4;
  uint32_t tokens = tokens0;  // of the current slot, as in a descriptor
  auto fetch = [&] {
    mbar_wait(ring.full + 8 * slot, parity);
#pragma unroll
    for (int f = 0; f < FR; f++) packed[f].fetch(chunk + f * 4 * p.chunk_bytes, p.groups, p.zeros, lane);
  };
  auto advance = [&] {
    slot++;
    chunk += ring.slot_w_bytes;
    tokens += S::kTokenBytes >> 4;
    if (slot == p.stages) slot = 0, parity ^= 1, chunk = my_chunk, tokens = tokens0;
  };
  while (walk.next(p, s)) {
    fetch();
    expand_step(a[0], 0);
    if constexpr (S::SCALED) {
      int previous = -1, first = s.first;
      if (p.resumed && s.first > 0) {  // A chunk by itself: inside the loop, sums from elsewhere would serialise all of it.
        take_up<S>(p, place, d);
        hold(d);
        const uint32_t here = __reduce_max_sync(0xffffffffu, tokens);
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          multiply(a[step & 1], here, step, 1);
          if (step + 1 < kSteps) expand_step(a[(step + 1) & 1], step + 1);
          wgmma_wait<0>();
          hold(d);
        }
        release(slot);
        advance();
        if (++first < s.last) {
          fetch();
          expand_step(a[0], 0);
        }
      }
      for (int c = first; c < s.last; c++) {
        const uint32_t here = __reduce_max_sync(0xffffffffu, tokens);  // the same in all lanes, and now in a uniform register
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          multiply(a[step & 1], here, step, step == 0 ? c > s.first : 1);
          if (step + 1 < kSteps) {
            wgmma_wait<1>();
            if (step == 0 && c > first) release(previous);
            expand_step(a[(step + 1) & 1], step + 1);
          }
        }
        previous = slot;
        advance();
        if (c + 1 < s.last) {
          fetch();
          wgmma_wait<1>();
          expand_step(a[0], 0);
        }
      }
      wgmma_wait<0>();
      if (previous >= 0) release(previous);
      hold(d);
      if (p.one_group && !(p.resumed && s.last < p.chunks)) {
#pragma unroll
        for (int f = 0; f < FR; f++) {
          const float2 scale = scale_pair(packed[f].scale[0]);
#pragma unroll
          for (int i = 0; i < TN / 2; i++) d[f][i] *= i & 2 ? scale.y : scale.x;
        }
      }
    } else {
      float total[FR][TN / 2] = {};
      for (int c = s.first; c < s.last; c++) {
        const uint32_t here = __reduce_max_sync(0xffffffffu, tokens);
        const int now = slot;
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          multiply(a[step & 1], here, step, step % kGroupSteps != 0);
          uint32_t scale[FR];
#pragma unroll
          for (int f = 0; f < FR; f++) scale[f] = packed[f].scale[step / kGroupSteps];
          if (step + 1 < kSteps) {
            expand_step(a[(step + 1) & 1], step + 1);
          } else {
            advance();
            if (c + 1 < s.last) {
              fetch();
              expand_step(a[0], 0);
            }
          }
          wgmma_wait<0>();
          hold(d);
          if (step % kGroupSteps == kGroupSteps - 1) {
#pragma unroll
            for (int f = 0; f < FR; f++) add_group(total[f], d[f], scale[f]);
          }
        }
        release(now);
      }
#pragma unroll
      for (int f = 0; f < FR; f++)
#pragma unroll
        for (int i = 0; i < TN / 2; i++) d[f][i] = total[f][i];
    }
    if (complete<S>(p, s, place, d)) store_tile<S>(p, s, place, ring.turn, d);
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks)
    wgmma_kernel(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap token_map, const WgmmaParams p) {
#ifdef __CUDA_ARCH__
  constexpr int CL = S::CL, NWG = S::NWG;
  extern __shared__ __align__(1024) uint8_t smem[];
  const WgmmaRing<S> ring(smem, p);
  const int warp = threadIdx.x >> 5;
  const int rank = CL == 1 ? 0 : static_cast<int>(cluster_rank()), cluster = blockIdx.x / CL;

  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; i++) {
      mbar_init(ring.full + 8 * i, 1);
      mbar_init(ring.empty + 8 * i, 4 * NWG * CL);
    }
    mbar_init_fence();
  }
  if constexpr (CL == 1)
    __syncthreads();
  else
    cluster_sync();

  if (warp >= 4 * NWG) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(S::kProducerRegisters));
    if (threadIdx.x == 128 * NWG) feed_ring<S>(&weight_map, &token_map, p, ring, cluster, rank);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::kConsumerRegisters));
    consume<S>(p, ring, smem, Place{cluster, rank, warp >> 2, static_cast<int>(threadIdx.x & 127)});
  }
  if constexpr (CL > 1) {
    __syncwarp();    // of the feeding warp one thread comes from a branch of its own, and .aligned wants all in one instruction
    cluster_sync();  // a neighbour may still signal this block's barriers
  }
#endif
}

template <class S>
WgmmaKernel info() {
  return {reinterpret_cast<const void*>(wgmma_kernel<S>), S::TN, S::kStrips, S::CL, S::kThreads, S::NWG * S::kPassBytes, S::SCALED};
}

template <bool BF, bool ONE>
WgmmaKernel find_kernel(WgmmaTile tile) {
  switch (tile) {
    case WgmmaTile::k128x16: return info<WgmmaShape<BF, ONE, false, 16, 1, 1, 2>>();
    case WgmmaTile::k128x32: return info<WgmmaShape<BF, ONE, false, 32, 1, 1, 2>>();
    case WgmmaTile::k128x64: return info<WgmmaShape<BF, ONE, false, 64, 1, 1, 2>>();
    case WgmmaTile::k192x64: return info<WgmmaShape<BF, ONE, false, 64, 1, 1, 3>>();
    case WgmmaTile::k192x96: return info<WgmmaShape<BF, ONE, false, 96, 1, 1, 3>>();
    case WgmmaTile::k128x128: return info<WgmmaShape<BF, ONE, false, 128, 1, 1, 2>>();
    case WgmmaTile::k192x128: return info<WgmmaShape<BF, ONE, true, 128, 1, 1, 3>>();
    case WgmmaTile::k128x192: return info<WgmmaShape<BF, ONE, true, 192, 1, 2, 2>>();
    case WgmmaTile::k128x256: return info<WgmmaShape<BF, ONE, true, 256, 1, 2, 2>>();
  }
  return {};
}

}  // namespace
}  // namespace gptq
