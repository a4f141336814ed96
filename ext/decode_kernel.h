// The decode kernel. Weights are the A operand of mma.m16n8k16 (16 rows of a strip), tokens its 8 columns, so one instruction stream serves
// 1..8 tokens, and a second tile of columns 9..16.
//
//   A block owns consecutive strips, two at a time. One warp brings them in with bulk copies, 12 chunks of both strips to a slot of a ring; 12 warps take one
//   chunk (of both) of every slot, whatever pair of strips it belongs to, so all have the same work. Where a warp's next chunk is of another pair
//   it leaves its sums in an exchange area; one more warp adds the 12 (always in the same order), applies bias, SiLU and residual and stores, while the
//   others go on. No block-wide barrier, no atomics, no workspace. Which warp adds what depends on K, N and the number of multiprocessors,
//   never on M, so a row's bits do not depend on who else is in the batch.
//
//   For long k a cluster of blocks splits it: each stages its part of x only, and sums meet through distributed shared memory.
//
//   Programmatic dependent launch: the ring is filled before grid_wait(), the next kernel is let in at once, and registers and shared memory are
//   kept at half of a multiprocessor's so that its ring fills while this one drains.
//
//   Measured on an H200, what bounds it beyond memory is instructions: one chain of mma per strip beats two, and 12 warps with strips in pairs beat 16 with
//   single ones.
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
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(addr), "f"(v[0]), "f"(v[1]), "f"(v[2]),
               "f"(v[3]), "r"(bar)
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

// sm_80 .. sm_89 and sm_120: a strip at a time, its chunks dealt to the warps, each lane fetching with cp.async the bytes it will read itself, x straight from
// the caches.
constexpr int kPortableWarps = 8;
constexpr int kPortableDepth = 6;

inline int portable_smem(int nt, int chunk) { return kPortableWarps * (kPortableDepth * chunk + nt * 512); }

template <int NT, int G, bool ZP, bool BF>
__device__ __forceinline__ void decode_portable(const DecodeArgs& a, uint8_t* smem) {
  using C = Chunk<G, ZP>;
  constexpr int kMeta = (C::kBytes - kWeightBytes) / 16;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int nch = (a.K + kChunkK - 1) / kChunkK;
  const uint8_t* ring = smem + warp * kPortableDepth * C::kBytes;
  float4* red = reinterpret_cast<float4*>(smem + kPortableWarps * kPortableDepth * C::kBytes);
  for (int strip = blockIdx.x; strip < a.N / kStripRows; strip += gridDim.x) {
    const auto fetch = [&](int c) {
      if (c < nch) {
        const uint32_t dst = smem_addr(ring) + (c / kPortableWarps % kPortableDepth) * C::kBytes + lane * 16;
        const uint8_t* src = a.w + (static_cast<size_t>(strip) * nch + c) * C::kBytes + lane * 16;
        cp_async16(dst, src);
        cp_async16(dst + kBlockBytes, src + kBlockBytes);
        if (lane < kMeta) cp_async16(dst + kWeightBytes, src + kWeightBytes);
      }
      cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < kPortableDepth - 1; i++) fetch(warp + i * kPortableWarps);
    float acc[kPair][NT][4] = {};
    for (int c = warp; c < nch; c += kPortableWarps) {
      fetch(c + (kPortableDepth - 1) * kPortableWarps);
      cp_async_wait<kPortableDepth - 1>();
      __syncwarp();  // scales and zeros came through other lanes
      const auto load_x = [&](int n, int u, uint32_t (&b)[4]) {
        const uint16_t* x = a.x + static_cast<size_t>(min(n * 8 + g, a.M - 1)) * a.ldx;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int k = c * kChunkK + u * 32 + i * 8 + 2 * t;
          if (a.perm) b[i] = k < a.K ? x[a.perm[k]] | static_cast<uint32_t>(x[a.perm[k + 1]]) << 16 : 0u;
          else b[i] = k < a.K ? *reinterpret_cast<const uint32_t*>(x + k) : 0u;
        }
      };
      chunk_mma<1, NT, G, ZP, BF>(acc, smem_addr(ring) + (c / kPortableWarps % kPortableDepth) * C::kBytes, 0, lane, load_x);
      __syncwarp();
    }
    __syncthreads();  // the sums of the strip before have been read
#pragma unroll
    for (int n = 0; n < NT; n++) red[(warp * NT + n) * 32 + t * 8 + g] = make_float4(acc[0][n][0], acc[0][n][1], acc[0][n][2], acc[0][n][3]);
    __syncthreads();
    if (threadIdx.x < NT * 32) {
      float v[4] = {0.f, 0.f, 0.f, 0.f};
      for (int w = 0; w < kPortableWarps; w++) {
        const float4 f = red[w * NT * 32 + threadIdx.x];
        v[0] += f.x, v[1] += f.y, v[2] += f.z, v[3] += f.w;
      }
      store_sums<BF>(a, v, strip, lane & 7, warp * 8 + (lane >> 3) * 2);
    }
  }
}

template <int NT, int G, bool ZP, bool BF>
__global__ void __launch_bounds__(kDecodeThreads, NT == 1 ? kBlocksPerSM : 1) decode_kernel(const __grid_constant__ DecodeArgs a) {
  extern __shared__ __align__(128) uint8_t smem[];
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)  // as takes_portable_kernel()
  decode_portable<NT, G, ZP, BF>(a, smem);
#elif defined(__CUDA_ARCH__)
  constexpr int kChunk = Chunk<G, ZP>::kBytes, kHalf = kMathWarps * kChunk, kSlot = kPair * kHalf;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;  // shfl: so that the compiler knows it for uniform
  const int rank = cluster_rank(), cluster = cluster_size(), depth = a.depth, buffers = a.buffers;
  const int nch = (a.K + kChunkK - 1) / kChunkK;
  const DecodeSmem at(a.M, nch, NT, cluster, depth, buffers, kChunk, a.perm != nullptr);
  const uint32_t base = smem_addr(smem);
  const uint32_t full = base, free = full + 8 * kMaxDepth;                     // of the ring
  const uint32_t sent = free + 8 * kMaxDepth, taken = sent + 8 * kMaxBuffers;  // of the exchange area; taken[block][buffer]
  const uint32_t x_bar = taken + 8 * kMaxBuffers * kMaxCluster;
  const int unit = at.red_lanes * 16, set = kMathWarps * kPair * NT * unit;  // bytes of a warp's sums of a column tile; of a block's of a pair

  grid_launch_dependents();

  // This cluster's strips, and this block's chunks of each.
  const int strips = a.N / kStripRows, clusters = gridDim.x / cluster, id = blockIdx.x / cluster;
  const int first = static_cast<int>(static_cast<int64_t>(id) * strips / clusters);
  const int count = static_cast<int>(static_cast<int64_t>(id + 1) * strips / clusters) - first;
  const int share = (nch + cluster - 1) / cluster, chunk0 = rank * share, chunks = max(0, min(share, nch - chunk0));
  const int pairs = (count + 1) / 2, items = pairs * chunks, double_items = count / 2 * chunks;  // the last pair may be a single strip

  // The producer's place: the next chunk, how many of its strip's share are left, and the slot it goes to.
  const uint8_t* src = a.w + (static_cast<size_t>(first) * nch + chunk0) * kChunk;
  int left = chunks, next = 0, fill = 0;
  const auto fetch = [&] {
    if (next >= items) return;
    const uint32_t bar = full + 8 * fill;
    uint32_t dst = base + at.ring + fill * kSlot;
    int rest = min(kMathWarps, items - next);
    if (elect()) mbar_expect(bar, (rest + max(0, min(rest, double_items - next))) * kChunk);
#pragma unroll 1
    while (rest > 0) {
      const int now = min(rest, left);
      if (elect()) {
        bulk_load(dst, src, now * kChunk, bar);
        if (next < double_items) bulk_load(dst + kHalf, src + static_cast<size_t>(nch) * kChunk, now * kChunk, bar);
      }
      next += now;
      dst += now * kChunk, src += static_cast<size_t>(now) * kChunk, rest -= now, left -= now;
      if (left == 0) left = chunks, src += static_cast<size_t>(2 * nch - chunks) * kChunk;
    }
    if (++fill == depth) fill = 0;
  };
  if (warp == kMathWarps) {
    if (lane < kMaxDepth) mbar_init(full + 8 * lane, 1);
    else if (lane < 2 * kMaxDepth) mbar_init(full + 8 * lane, kMathWarps);  // = free
    mbar_init_fence();
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < depth; i++) fetch();  // weights never depend on the kernel before
  } else if (warp == kMathWarps + 1) {
    if (lane < kMaxBuffers) mbar_init(sent + 8 * lane, kMathWarps + 1);  // this block's warps, and the count of what others send
    if (lane < kMaxBuffers * kMaxCluster) mbar_init(taken + 8 * lane, 1);
    if (lane == 31) mbar_init(x_bar, 32);
    mbar_init_fence();
  }
  if (cluster > 1) cluster_sync();
  else __syncthreads();

  if (warp == kMathWarps) {
    int slot = 0;
    uint32_t phase = 0;
#pragma unroll 1
    while (next < items) {
      mbar_wait(free + 8 * slot, phase);
      fetch();
      if (++slot == depth) slot = 0, phase ^= 1;
    }
    return;
  }

  if (warp < kMathWarps) {
    const int k0 = chunk0 * kChunkK, length = max(0, min(a.K - k0, chunks * kChunkK));
    const int2* perm = reinterpret_cast<const int2*>(a.perm + (a.perm ? k0 : 0));
    if (a.perm)  // constant as well: into the cache while x is on its way
      for (int i = threadIdx.x * 16; i < length / 2; i += kMathWarps * 32 * 16) asm volatile("prefetch.global.L1 [%0];" ::"l"(perm + i));
    grid_wait();
    mbar_wait(x_bar, 0);
    if (a.perm) {
      const uint16_t* raw = reinterpret_cast<const uint16_t*>(smem + at.raw);
      uint32_t* sorted = reinterpret_cast<uint32_t*>(smem + at.x);
#pragma unroll 1
      for (int m = 0; m < a.M; m++, raw += at.raw_stride, sorted += at.x_stride / 2)
#pragma unroll 4
        for (int i = threadIdx.x; i < length / 2; i += kMathWarps * 32) {
          const int2 from = perm[i];
          sorted[i] = raw[from.x] | static_cast<uint32_t>(raw[from.y]) << 16;
        }
      asm volatile("bar.sync 1, %0;" ::"n"(kMathWarps * 32) : "memory");
    }

    uint32_t x_lane[NT];
#pragma unroll
    for (int n = 0; n < NT; n++)  // columns beyond M are computed from a copy of the last row and never stored
      x_lane[n] = base + at.x + min(n * 8 + (lane & 7), a.M - 1) * at.x_stride * 2 + (lane >> 3) * 16;
    const uint32_t lane_slot = ((lane & 3) * 8 + (lane >> 2)) * 16;
    const bool has_token = (lane & 3) * 8 < at.red_lanes;
    float acc[kPair][NT][4] = {};
    int pair = 0, now = 0, c = warp, slot = 0, buffer = 0, owner = 0;
    uint32_t phase = 0, round = 1;
    while (c >= chunks && now < pairs) c -= chunks, now++;
#pragma unroll 1
    for (int item = warp;; item += kMathWarps) {
      const int target = item < items ? now : pairs;
#pragma unroll 1
      for (; pair < target; pair++) {  // leave the sums of a finished pair with the block that adds them
        mbar_wait(taken + 8 * (owner * kMaxBuffers + buffer), round);
        const uint32_t dst = base + at.red + (buffer * cluster + rank) * set + warp * kPair * NT * unit + lane_slot, bar = sent + 8 * buffer;
        if (owner == rank) {
#pragma unroll
          for (int i = 0; i < kPair * NT; i++)
            if (has_token) sts128(dst + i * unit, acc[i / NT][i % NT]);
          __syncwarp();
          if (elect()) mbar_arrive(bar);
        } else {
          const uint32_t remote = map_to_rank(dst, owner), remote_bar = map_to_rank(bar, owner);
#pragma unroll
          for (int i = 0; i < kPair * NT; i++)
            if (has_token) remote_store(remote + i * unit, acc[i / NT][i % NT], remote_bar);
        }
#pragma unroll
        for (int i = 0; i < kPair * NT * 4; i++) acc[i / 4 / NT][i / 4 % NT][i % 4] = 0.f;
        if (++owner == cluster) {
          owner = 0;
          if (++buffer == buffers) buffer = 0, round ^= 1;
        }
      }
      if (item >= items) break;
      mbar_wait(full + 8 * slot, phase);
      const uint32_t x_at = c * (kChunkK * 2), chunk = base + at.ring + slot * kSlot + warp * kChunk;
      const auto load_x = [&](int n, int u, uint32_t (&b)[4]) { ldmatrix_x4(b, x_lane[n] + x_at + u * 64); };
      if (item < double_items) chunk_mma<2, NT, G, ZP, BF>(acc, chunk, kHalf, lane, load_x);
      else chunk_mma<1, NT, G, ZP, BF>(acc, chunk, kHalf, lane, load_x);
      __syncwarp();
      if (elect()) mbar_arrive(free + 8 * slot);
      if (++slot == depth) slot = 0, phase ^= 1;
      c += kMathWarps;
      while (c >= chunks) c -= chunks, now++;
    }
    return;
  }

  // ---- the warp that stages x, then adds and stores ----
  grid_wait();
  {
    const int k0 = chunk0 * kChunkK, padded = chunks * kChunkK, length = max(0, min(a.K - k0, padded));
#pragma unroll 1
    for (int m = lane; m < a.M; m += 32)  // k beyond K: the weights are 0 there, x must not be NaN
      for (int k = length; k < padded; k++) reinterpret_cast<uint16_t*>(smem + at.x)[m * at.x_stride + k] = 0;
    // To be sorted, x comes whole; else this block's share of it.
    const int from = a.perm ? 0 : k0, bytes = 2 * (a.perm ? a.K : length), stride = a.perm ? at.raw_stride : at.x_stride;
    mbar_expect(x_bar, (a.M + 31 - lane) / 32 * bytes);
#pragma unroll 1
    for (int m = lane; m < a.M; m += 32)
      if (bytes > 0) bulk_load(base + (a.perm ? at.raw : at.x) + m * stride * 2, a.x + static_cast<size_t>(m) * a.ldx + from, bytes, x_bar);
  }
  int buffer = 0;
  uint32_t phase = 0;
#pragma unroll 1
  for (int pair = rank; pair < pairs; pair += cluster) {
    if (lane == 0) mbar_expect(sent + 8 * buffer, (cluster - 1) * set);
    mbar_wait(sent + 8 * buffer, phase);
    const uint32_t red = base + at.red + buffer * cluster * set + lane * 16;
    if (lane < at.red_lanes) {
#pragma unroll
      for (int i = 0; i < kPair * NT; i++) {
        const int strip = 2 * pair + i / NT;
        if (strip >= count) break;
        float v[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 6
        for (int w = 0; w < kMathWarps * cluster; w++) {
          const uint4 f = lds128(red + (w * kPair * NT + i) * unit);
          v[0] += __uint_as_float(f.x), v[1] += __uint_as_float(f.y), v[2] += __uint_as_float(f.z), v[3] += __uint_as_float(f.w);
        }
        store_sums<BF>(a, v, first + strip, lane & 7, i % NT * 8 + (lane >> 3) * 2);
      }
    }
    __syncwarp();
    if (pair + buffers * cluster < pairs && lane < cluster) {
      const uint32_t bar = taken + 8 * (rank * kMaxBuffers + buffer);
      if (lane == rank) mbar_arrive(bar);
      else remote_arrive(map_to_rank(bar, lane));
    }
    if (++buffer == buffers) buffer = 0, phase ^= 1;
  }
#endif
}

}  // namespace gptq
