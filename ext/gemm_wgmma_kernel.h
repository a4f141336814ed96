// The kernel of gemm_wgmma.cu, compiled in gemm_wgmma_fp16.cu and gemm_wgmma_bf16.cu so that two cores work side by side.
#pragma once
#include "gemm_wgmma_parts.h"
#include "wgmma_sm90.h"

namespace gptq {
namespace {

// A kernel: TN tokens and 64*FR rows for each of NWG consumer warpgroups, CL blocks per cluster. ONE: one scale group per chunk, or fewer.
template <bool BF_, bool ONE_, int TN_, int FR_, int CL_, int NWG_>
struct Shape {
  static constexpr bool BF = BF_, ONE = ONE_;
  static constexpr int TN = TN_, FR = FR_, CL = CL_, NWG = NWG_;
  static constexpr int kStrips = 4 * FR * NWG, kRows = 16 * kStrips, kThreads = 128 * (NWG + 1);
  static constexpr int kTokenBytes = TN * kChunkK * 2;                    // of one slot
  static constexpr int kPass = TN == 256 && !ONE ? 16 : TN < 32 ? TN : 32;  // tokens the epilogue turns at a time
  static constexpr int kPassBytes = kPass * 128;                          // per warpgroup
  // k16 steps between two commits: as many as registers allow, since two steps' operands are alive at once.
  static constexpr int kStep = FR == 1 && TN * NWG < 512 && (ONE || TN != 64 || NWG != 2) ? 4 : FR == 1 && TN == 256 ? 4 : 2;
  static constexpr int kMinBlocks = TN * FR <= 64 && NWG == 2 ? 2 : 1;
  // Registers per thread, of the 64,512 (2 groups), 30,720 (2 groups, twice per multiprocessor), 65,536 (3) or 61,440 (4) at the start.
  static constexpr int kProducerRegisters = NWG == 2 && kMinBlocks == 1 ? 40 : 32;
  static constexpr int kConsumerRegisters = NWG == 4 ? 112 : NWG == 3 ? 160 : kMinBlocks == 2 ? 104 : 232;
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks) gemm_wgmma_kernel(const __grid_constant__ CUtensorMap weight_map,
                                                                              const __grid_constant__ CUtensorMap token_map, const WgmmaParams p) {
#ifdef __CUDA_ARCH__
  constexpr int TN = S::TN, FR = S::FR, CL = S::CL, NWG = S::NWG;
  extern __shared__ __align__(1024) uint8_t smem[];
  uint8_t* const slots_x = smem;
  uint8_t* const slots_w = smem + p.stages * S::kTokenBytes;
  const int slot_w_bytes = wgmma_weight_bytes(S::kStrips, p.chunk_bytes);
  uint8_t* const turn = slots_w + p.stages * slot_w_bytes;
  const uint32_t full = smem_addr(turn + NWG * S::kPassBytes), empty = full + 8 * p.stages;

  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const uint32_t rank = CL == 1 ? 0 : cluster_rank();
  const int cluster = blockIdx.x / CL;

  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; i++) {
      mbar_init(full + 8 * i, 1);
      mbar_init(empty + 8 * i, 4 * NWG * CL);
    }
    mbar_init_fence();
  }
  if constexpr (CL == 1)
    __syncthreads();
  else
    cluster_sync();

  if (warp >= 4 * NWG) {
    // ---- producer -------------------------------------------------------------------------------------------------------------------
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(S::kProducerRegisters));
    if (threadIdx.x == 128 * NWG) {
      tensor_prefetch(&weight_map);
      tensor_prefetch(&token_map);
      const int tx = S::kTokenBytes + S::kStrips * p.chunk_bytes;
      struct Feed {
        Walk walk;
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
        mbar_expect(full + 8 * slot, tx);
        tensor_load_3d(smem_addr(slots_w) + slot * slot_w_bytes, &weight_map, 0, feed.at.first, feed.strip, full + 8 * slot);
      };
      auto load_tokens = [&](const Feed& feed, int slot) {
#pragma unroll
        for (int panel = 0; panel < 2; panel++) {
          const uint32_t dst = smem_addr(slots_x) + slot * S::kTokenBytes + (panel * TN + rank * (TN / CL)) * 128;
          const int k = feed.at.first * kChunkK + 64 * panel;
          if constexpr (CL == 1)
            tensor_load(dst, &token_map, k, feed.token, full + 8 * slot);
          else
            tensor_load_multicast(dst, &token_map, k, feed.token, full + 8 * slot, (1 << CL) - 1);
        }
      };
      // The first lap over the ring needs no free slot, and its weights need nothing of the kernel before this one.
      Feed ahead{Walk(p, cluster)};
      ahead.open(p, rank);
      Feed behind = ahead;
      for (int i = 0; i < p.stages && ahead.more; i++, ahead.step(p, rank)) load_weights(ahead, i);
      grid_wait();
      for (int i = 0; i < p.stages && behind.more; i++, behind.step(p, rank)) load_tokens(behind, i);
      int slot = 0;
      uint32_t parity = 0;
      for (; ahead.more; ahead.step(p, rank)) {
        mbar_wait(empty + 8 * slot, parity);
        load_weights(ahead, slot);
        load_tokens(ahead, slot);
        if (++slot == p.stages) slot = 0, parity ^= 1;
      }
      grid_launch_dependents();
    }
  } else {
    // ---- consumers ------------------------------------------------------------------------------------------------------------------
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::kConsumerRegisters));
    const int group = warp >> 2, quarter = warp & 3, g = lane >> 2, thread = threadIdx.x & 127;
    constexpr int kStep = S::kStep, kSteps = 8 / kStep;
    float d[FR][TN / 2];
    uint32_t a[2][FR][kStep][4];
    Packed<S::ONE ? 1 : 4> packed[FR];

    auto dequantise = [&](uint32_t(&to)[FR][kStep][4], int step) {
#pragma unroll
      for (int f = 0; f < FR; f++) {
#pragma unroll
        for (int j = 0; j < kStep; j++) {
          const int k16 = step * kStep + j, i = S::ONE ? 0 : k16 / 2;
          RowPair<S::BF>(packed[f].scale[i], packed[f].zero[i]).weights(packed[f].q[k16], to[f][j]);
        }
      }
    };
    auto multiply = [&](uint32_t(&from)[FR][kStep][4], uint32_t tokens, int step, int accumulate) {
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < kStep; j++)
#pragma unroll
        for (int f = 0; f < FR; f++) {
          const int k16 = step * kStep + j;
          Wgmma<S::BF, TN>::mma(d[f], from[f][j], wgmma_desc(tokens + k16 / 4 * (TN * 128 >> 4) + k16 % 4 * 2), j == 0 ? accumulate : 1);
        }
      wgmma_commit();
    };
    const uint32_t empty_there = CL == 1 ? empty : cluster_address(empty, lane & (CL - 1));
    auto release = [&](int slot) {
      if (lane < CL) {
        if constexpr (CL == 1)
          mbar_arrive(empty + 8 * slot);
        else
          mbar_arrive_cluster(empty_there + 8 * slot);
      }
    };

    grid_wait();
    Walk walk(p, cluster);
    Segment s;
    int slot = 0;
    uint32_t parity = 0;
    const uint8_t* const my_chunk = slots_w + (group * FR * 4 + quarter) * p.chunk_bytes;
    const uint8_t* chunk = my_chunk;                       // of this warp in the current slot
    const uint32_t tokens0 = smem_addr(slots_x) >> 4;
    uint32_t tokens = tokens0;                             // of the current slot, as in a descriptor
    auto fetch = [&] {
      mbar_wait(full + 8 * slot, parity);
#pragma unroll
      for (int f = 0; f < FR; f++) packed[f].fetch(chunk + f * 4 * p.chunk_bytes, p.groups, p.zeros, lane);
    };
    while (walk.next(p, s)) {
      fetch();
      dequantise(a[0], 0);
      int previous = 0;
      for (int c = s.first; c < s.last; c++) {
        const uint32_t here = __reduce_max_sync(0xffffffffu, tokens);  // the same in all lanes, and now in a uniform register
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          multiply(a[step & 1], here, step, step == 0 ? c > s.first : 1);
          if (step + 1 < kSteps) {
            wgmma_wait<1>();
            if (step == 0 && c > s.first) release(previous);
            dequantise(a[(step + 1) & 1], step + 1);
          }
        }
        previous = slot++;
        chunk += slot_w_bytes;
        tokens += S::kTokenBytes >> 4;
        if (slot == p.stages) slot = 0, parity ^= 1, chunk = my_chunk, tokens = tokens0;
        if (c + 1 < s.last) {
          fetch();
          wgmma_wait<1>();
          dequantise(a[0], 0);
        }
      }
      wgmma_wait<0>();
      release(previous);
#pragma unroll
      for (int f = 0; f < FR; f++)
#pragma unroll
        for (int i = 0; i < TN / 2; i++) asm volatile("" : "+f"(d[f][i])::"memory");

      // ---- partial sums of a tile that was cut along k ----------------------------------------------------------------------------
      const int mine = p.clusters - 1 - cluster;
      auto partial = [&](int i, int f) {
        return reinterpret_cast<float4*>(p.partials) + (static_cast<int64_t>((i * CL + rank) * NWG + group) * FR + f) * (TN / 8) * 128 + thread;
      };
      if (s.first > 0) {
#pragma unroll
        for (int f = 0; f < FR; f++) {
          float4* to = partial(mine, f);
#pragma unroll
          for (int i = 0; i < TN / 8; i++) __stcg(to + i * 128, make_float4(d[f][4 * i], d[f][4 * i + 1], d[f][4 * i + 2], d[f][4 * i + 3]));
        }
        named_barrier(1 + group, 128);
        if (thread == 0) flag_set(p.flags + (mine * CL + rank) * NWG + group);
        continue;
      }
      if (s.last < p.chunks) {
        int others = 1;
        for (const int tile_end = (s.tile + 1) * p.chunks; split_begin(p, mine + 1 + others) < tile_end;) others++;
        for (int i = thread; i < others; i += 128) {
          int* flag = p.flags + ((mine + 1 + i) * CL + rank) * NWG + group;
          while (!flag_is_set(flag)) __nanosleep(20);
          *flag = 0;  // ready for the next launch on this stream
        }
        named_barrier(1 + group, 128);
        // As many loads in flight as there are registers for; the sums are in order of k all the same.
        constexpr int kBatch = S::kConsumerRegisters >= 128 ? 16 : TN < 64 ? 8 : 4, kQuads = TN / 8;
        constexpr int kAtOnce = kBatch > kQuads ? kBatch / kQuads : 1, kPart = kBatch < kQuads ? kBatch : kQuads;
        for (int i = 1; i <= others; i += kAtOnce) {
#pragma unroll
          for (int f = 0; f < FR; f++) {
#pragma unroll
            for (int part = 0; part < kQuads; part += kPart) {
              float4 v[kAtOnce][kPart];
#pragma unroll
              for (int j = 0; j < kAtOnce; j++)
#pragma unroll
                for (int k = 0; k < kPart; k++)
                  v[j][k] = i + j <= others ? __ldcg(partial(mine + i + j, f) + (part + k) * 128) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
              for (int j = 0; j < kAtOnce; j++)
#pragma unroll
                for (int k = 0; k < kPart; k++) {
                  float* to = d[f] + 4 * (part + k);
                  to[0] += v[j][k].x, to[1] += v[j][k].y, to[2] += v[j][k].z, to[3] += v[j][k].w;
                }
            }
          }
        }
      }

      // ---- epilogue: turn the tile token by token through shared memory, so that rows leave in whole lines ---------------------------
      int m_tile, n_tile;
      tile_position(p, s.tile, m_tile, n_tile);
      uint8_t* const box = turn + group * S::kPassBytes;
      const uint32_t box_addr = smem_addr(box);
#pragma unroll
      for (int f = 0; f < FR; f++) {
        const int strip0 = (((n_tile * CL + static_cast<int>(rank)) * NWG + group) * FR + f) * 4;
        // Where the 8 rows of one half of a strip stand in the output.
        auto column_of = [&](int strip, int half) { return p.paired != 0 ? half * (p.n / 2) + 8 * strip : 16 * strip + 8 * half; };
        float bias0 = 0.f, bias8 = 0.f;
        if (p.bias != nullptr && strip0 + quarter < p.strips) {
          bias0 = from_16bit<S::BF>(p.bias[column_of(strip0 + quarter, 0) + g]);
          bias8 = from_16bit<S::BF>(p.bias[column_of(strip0 + quarter, 1) + g]);
        }
        // This thread's share of a pass: 16 bytes (8 columns) of every token_step-th token.
        const int unit = p.paired == 2 ? thread & 3 : thread & 7, first_token = p.paired == 2 ? thread >> 2 : thread >> 3;
        const int token_step = p.paired == 2 ? 32 : 16, strip = strip0 + (p.paired == 2 ? unit : unit >> 1);
        const int column = column_of(strip, p.paired == 2 ? 0 : unit & 1);
        const int tokens_here = strip < p.strips ? p.m - m_tile * TN : 0;
        uint16_t* const y = p.y + static_cast<int64_t>(m_tile * TN) * p.ldy + column;
        const uint16_t* const residual = p.residual == nullptr ? nullptr : p.residual + static_cast<int64_t>(m_tile * TN) * p.ldr + column;
#pragma unroll
        for (int pass = 0; pass < TN / S::kPass; pass++) {
          if (m_tile * TN + pass * S::kPass >= p.m) break;
          auto each_unit = [&](auto&& visit) {
#pragma unroll
            for (int i = 0; i < S::kPass * 8 / 128; i++) {
              const int token = first_token + i * token_step;
              if (token < S::kPass && pass * S::kPass + token < tokens_here)
                visit(reinterpret_cast<uint4*>(box + token * 128 + ((unit ^ (token & 7)) << 4)), static_cast<int64_t>(pass * S::kPass + token));
            }
          };
          named_barrier(1 + group, 128);
          if (residual != nullptr) {
            each_unit([&](uint4* at, int64_t token) { *at = *reinterpret_cast<const uint4*>(residual + token * p.ldr); });
            named_barrier(1 + group, 128);
          }
#pragma unroll
          for (int half = 0; half < S::kPass / 16; half++) {
            const float* v = d[f] + (pass * S::kPass / 8 + half * 2) * 4;
            if (p.paired == 2) {
              const int token = half * 16 + (lane & 15);
              uint32_t r[2];
#pragma unroll
              for (int j = 0; j < 2; j++)
                r[j] = pack<S::BF>(silu(v[4 * j] + bias0) * (v[4 * j + 2] + bias8), silu(v[4 * j + 1] + bias0) * (v[4 * j + 3] + bias8));
              stmatrix_x2_trans(box_addr + token * 128 + ((quarter ^ (token & 7)) << 4), r[0], r[1]);
            } else {
              const int token = half * 16 + (lane >> 4) * 8 + (lane & 7), at_unit = quarter * 2 + ((lane >> 3) & 1);
              const uint32_t at = box_addr + token * 128 + ((at_unit ^ (token & 7)) << 4);
              uint32_t r[4];
              if (residual != nullptr) {
                ldmatrix_x4_trans(r, at);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                  const float bias = j % 2 == 0 ? bias0 : bias8;
                  r[j] = pack<S::BF>(v[2 * j] + bias + from_16bit<S::BF>(r[j] & 0xffff), v[2 * j + 1] + bias + from_16bit<S::BF>(r[j] >> 16));
                }
              } else {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                  const float bias = j % 2 == 0 ? bias0 : bias8;
                  r[j] = pack<S::BF>(v[2 * j] + bias, v[2 * j + 1] + bias);
                }
              }
              stmatrix_x4_trans(at, r[0], r[1], r[2], r[3]);
            }
          }
          named_barrier(1 + group, 128);
          each_unit([&](uint4* at, int64_t token) { *reinterpret_cast<uint4*>(y + token * p.ldy) = *at; });
        }
      }
    }
  }
  if constexpr (CL > 1) cluster_sync();  // a neighbour may still signal this block's barriers
#endif
}

template <class S>
WgmmaKernel info() {
  return {reinterpret_cast<const void*>(gemm_wgmma_kernel<S>), S::TN, S::kStrips, S::CL, S::kThreads, S::NWG * S::kPassBytes};
}

template <bool BF, bool ONE>
WgmmaKernel find_kernel(WgmmaTile tile) {
  switch (tile) {
    case WgmmaTile::k128x16: return info<Shape<BF, ONE, 16, 1, 1, 2>>();
    case WgmmaTile::k256x16: return info<Shape<BF, ONE, 16, 1, 1, 4>>();
    case WgmmaTile::k128x32: return info<Shape<BF, ONE, 32, 1, 1, 2>>();
    case WgmmaTile::k256x32: return info<Shape<BF, ONE, 32, 1, 1, 4>>();
    case WgmmaTile::k128x64: return info<Shape<BF, ONE, 64, 1, 1, 2>>();
    case WgmmaTile::k256x64: return info<Shape<BF, ONE, 64, 1, 1, 4>>();
    case WgmmaTile::k192x128: return info<Shape<BF, ONE, 128, 1, 1, 3>>();
    case WgmmaTile::k128x256: return info<Shape<BF, ONE, 256, 1, 2, 2>>();
  }
  return {};
}

}  // namespace
}  // namespace gptq
