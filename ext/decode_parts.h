// What the decode kernels are made of: the plan of shared memory, clusters, the product of one chunk, and the end of a row.
#pragma once
#include "decode.h"
#include "layout.h"
#include "ptx.h"

namespace gptq {

constexpr int kMathWarps = 12;
constexpr int kPair = 2;      // strips a warp works on at a time: they share x, and what a loop costs
constexpr int kMaxDepth = 8;  // slots of the ring
constexpr int kMaxBuffers = 2;  // of the exchange area
constexpr int kMaxCluster = 8;
constexpr int kDecodeThreads = (kMathWarps + 2) * 32;
constexpr int kBlocksPerSM = 2;  // this kernel's, and the next one's

// Before sm_90 there are no bulk copies; the consumer GPUs since have them, but not the shared memory for this kernel's ring beside x.
inline bool takes_portable_kernel(int capability) { return capability < 90 || capability >= 120; }

// Shared memory, computed alike by host and device.
struct DecodeSmem {
  int ring, x, raw, red, total;
  int x_stride;   // elements between tokens: 16 bytes more than a multiple of 128, so that ldmatrix meets no bank twice
  int raw_stride;  // the same where whole rows are kept unsorted
  int red_lanes;  // float4 slots per column tile and warp: lanes whose columns hold no token send nothing
  __host__ __device__ DecodeSmem(int M, int nch, int nt, int cluster, int depth, int buffers, int chunk, bool gather) {
    x_stride = (nch + cluster - 1) / cluster * kChunkK + 8;
    red_lanes = nt > 1 ? 32 : 8 * (M >= 7 ? 4 : (M + 1) / 2);
    raw_stride = nch * kChunkK + 8;
    ring = 512;  // after the barriers
    x = ring + depth * kPair * kMathWarps * chunk;
    raw = x + M * x_stride * 2;
    red = raw + (gather ? M * raw_stride * 2 : 0);
    total = red + buffers * cluster * kMathWarps * kPair * nt * red_lanes * 16;
  }
};

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ uint32_t map_to_rank(uint32_t addr, uint32_t rank) {
  uint32_t r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(addr), "r"(rank));
  return r;
}
// Arrives at the barrier beside the data: no fence, which would wait for this warp's loads.
__device__ __forceinline__ void remote_store(uint32_t addr, const float (&v)[4], uint32_t bar) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(addr), "f"(v[0]),
               "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(bar)
               : "memory");
}
__device__ __forceinline__ void remote_arrive(uint32_t bar) { asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory"); }
// After mbar_init_fence(): the barriers of all blocks exist.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#endif

// One chunk of S strips, `apart` bytes from each other in shared memory, against NT column tiles: acc += scale * (sum v x - z sum x), group by group.
// load_x(n, u, b): the B fragments of tokens 8n.. for the two k16 steps from k = 32u of the chunk.
template <int S, int NT, int G, bool ZP, bool BF, typename LoadX>
__device__ __forceinline__ void chunk_mma(float (&acc)[kPair][NT][4], uint32_t chunk, int apart, int lane, const LoadX& load_x) {
  using C = Chunk<G, ZP>;
  using O = Offset<BF, ZP>;
  const uint32_t ones[4] = {O::kRowG, O::kRowG8, O::kRowG, O::kRowG8};
  constexpr int kUnits = 4 / G;  // of 32 k, in a group
  uint4 q[S];
#pragma unroll
  for (int group = 0; group < G; group++) {
    float part[S][NT][4] = {}, off[NT][4] = {};
#pragma unroll
    for (int u = group * kUnits; u < (group + 1) * kUnits; u++) {
      if (u % 2 == 0) {
#pragma unroll
        for (int s = 0; s < S; s++) q[s] = lds128(chunk + s * apart + u / 2 * kBlockBytes + lane * 16);
      }
      uint32_t b[NT][4];
#pragma unroll
      for (int n = 0; n < NT; n++) load_x(n, u, b[n]);
#pragma unroll
      for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int n = 0; n < NT; n++) mma_m16n8k16<BF>(off[n], ones, b[n][2 * j], b[n][2 * j + 1]);
#pragma unroll
        for (int s = 0; s < S; s++) {
          uint32_t a[4];
          expand<BF>(u % 2 ? (j ? q[s].w : q[s].z) : (j ? q[s].y : q[s].x), a);
#pragma unroll
          for (int n = 0; n < NT; n++) mma_m16n8k16<BF>(part[s][n], a, b[n][2 * j], b[n][2 * j + 1]);
        }
      }
    }
#pragma unroll
    for (int s = 0; s < S; s++) {
      const uint32_t meta = chunk + s * apart;
      const float2 scale = scale_pair(lds32(meta + C::kScaleOffset + group * 32 + (lane >> 2) * 4));
      float z0 = 0.f, z1 = 0.f;
      if constexpr (ZP) {
        const uint32_t pair = lds16(meta + C::kZeroOffset + group * 16 + (lane >> 2) * 2);
        z0 = O::kZeroBase + static_cast<float>(pair & 255u);
        z1 = O::kZeroBase + static_cast<float>(pair >> 8);
      }
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float whole = ZP ? fmaf(i < 2 ? z0 : z1, off[n][i], part[s][n][i]) : part[s][n][i] + off[n][i];
          acc[s][n][i] = fmaf(i < 2 ? scale.x : scale.y, whole, acc[s][n][i]);
        }
    }
  }
}

// Bias, SiLU(gate)*up, residual, and the store, for one lane's four sums of a strip's column tile.
template <bool BF>
__device__ __forceinline__ void store_sums(const DecodeArgs& a, float (&v)[4], int strip, int g, int token) {
  using O = Offset<BF, false>;
  const int r0 = a.paired ? strip * 8 + g : strip * kStripRows + g;
  const int r1 = a.paired ? a.N / 2 + r0 : r0 + 8;
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] *= i < 2 ? O::kUnscaleG : O::kUnscaleG8;
  if (a.bias) {
    const float b0 = from_16bit<BF>(a.bias[r0]), b1 = from_16bit<BF>(a.bias[r1]);
    v[0] += b0, v[1] += b0, v[2] += b1, v[3] += b1;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (token + i >= a.M) continue;
    uint16_t* y = a.y + static_cast<size_t>(token + i) * a.ldy;
    const uint16_t* res = a.residual ? a.residual + static_cast<size_t>(token + i) * a.ldr : nullptr;
    if (a.paired == 2) {
      float out = __fdividef(v[i], 1.f + __expf(-v[i])) * v[2 + i];
      if (res) out += from_16bit<BF>(res[r0]);
      y[r0] = to_16bit<BF>(out);
    } else {
      float o0 = v[i], o1 = v[2 + i];
      if (res) o0 += from_16bit<BF>(res[r0]), o1 += from_16bit<BF>(res[r1]);
      y[r0] = to_16bit<BF>(o0);
      y[r1] = to_16bit<BF>(o1);
    }
  }
}

}  // namespace gptq
