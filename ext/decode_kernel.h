// The decode kernel. Weights are the A operand of mma.m16n8k16 (16 rows of a strip), tokens its 8 columns, so one instruction stream
// serves 1..8 tokens, and a second tile of columns 9..16.
//
// A block owns consecutive strips, two at a time. One warp brings them in with bulk copies, 12 chunks of both strips to a slot of a
// ring; 12 warps take one chunk (of both) of every slot, whatever pair of strips it belongs to, so all have the same work. Where a
// warp's next chunk is of another pair it leaves its sums in an exchange area; one more warp adds the 12 (always in the same order),
// applies bias, SiLU and residual and stores, while the others go on. No block-wide barrier, no atomics, no workspace. Which warp adds
// what depends on K, N and the number of multiprocessors, never on M, so a row's bits do not depend on who else is in the batch.
//
// For long k a cluster of blocks splits it: each stages its part of x only, and sums meet through distributed shared memory.
//
// Programmatic dependent launch: the ring is filled before grid_wait(), the next kernel is let in at once, and registers and shared
// memory are kept at half of a multiprocessor's so that its ring fills while this one drains.
//
// Measured on an H200, what bounds it beyond memory is instructions: one chain of mma per strip beats two, and 12 warps with strips in
// pairs beat 16 with single ones.
#pragma once
#include "decode_parts.h"
#include "decode_portable.h"

namespace gptq {

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
