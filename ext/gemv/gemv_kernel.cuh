// The GEMV kernel. Weights are the A operand of mma.m16n8k16 (16 rows of a strip), tokens its 8 columns, so one instruction stream
// serves 1..8 tokens, and a second tile of columns 9..16.
//
// A block owns consecutive strips, two at a time. One warp brings them in with bulk copies, a chunk of both strips for each of 8 warps to a
// slot of a ring: chunk c of a strip is warp c % 8's. A warp that is through with a segment of k (all of it, unless k is long) leaves its
// sums in an exchange area; one more warp adds the 8 (always in the same order) and the segments, applies bias, SiLU and residual and
// stores, while the others go on. No block-wide barrier, no atomics, no workspace. Which warp adds what depends on K and the format alone,
// so a row's bits do not depend on who else is in the batch.
//
// Where k is so long that x of these tokens does not fit beside a ring, a cluster of blocks splits it: each takes one segment, and their
// sums meet through distributed shared memory. Otherwise, where tokens are several, blocks bring x in together, each a part of it for both.
//
// Programmatic dependent launch: weights are asked for before grid_wait(), the next kernel is let in at once, and up to 8 tokens take no
// more than half of an SM's registers, so that it finds room (of shared memory, see gemv.cu). What a block does before its first copy costs
// as much as a small linear's weights: no division, no loop over barriers.
//
// The sums of x that take out the zero points depend on x alone: at the first pair a warp computes those of its chunks by mma beside the
// weights', and leaves them for itself.
#pragma once
#include <type_traits>

#include "common/cluster.cuh"
#include "gemv/gemv_math.cuh"
#include "gemv/gemv_portable.cuh"

namespace gptq {

#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)  // as takes_portable_kernel()
#define GPTQ_GEMV_BOUNDS(NT) kPortableThreads, 1
#else
#define GPTQ_GEMV_BOUNDS(NT) kGemvThreads, NT == 1 ? kBlocksAtOnce : 1
#endif

template <int NT, int G, bool ZP, bool BF>
__global__ void __launch_bounds__(GPTQ_GEMV_BOUNDS(NT)) gemv_kernel(const __grid_constant__ GemvArgs a) {
  extern __shared__ __align__(128) uint8_t smem[];
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)  // as takes_portable_kernel()
  if constexpr (NT == 1) gemv_portable<G, ZP, BF>(a, smem);
#elif defined(__CUDA_ARCH__)
  constexpr int kChunkBytes = Chunk<G, ZP>::kBytes, kHalfBytes = kMathWarps * kChunkBytes, kSlotBytes = kPair * kHalfBytes;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;  // shfl: so that the compiler knows it for uniform
  const int cluster = a.plan.share_x ? 1 : cluster_size(), rank = cluster > 1 ? cluster_rank() : 0, depth = a.plan.depth,
            buffers = a.plan.buffers;
  const int nch = (a.K + kChunkK - 1) / kChunkK;
  const GemvPlan& at = a.plan;
  const uint32_t base = smem_addr(smem);
  const uint32_t full = base + 8 * kFull, sent = base + 8 * kSent, read = base + 8 * kRead;
  const uint32_t got = base + 8 * kGot, credit = base + 8 * kCredit, x_bar = base + 8 * kX;
  const int tasks = kPair * NT * at.red_lanes, set = tasks * 16;  // float4 of a warp's sums of a pair

  grid_launch_dependents();

  // This cluster's strips, and this block's chunks of each.
  const int id = cluster > 1 ? cluster_id() : blockIdx.x, first = id * at.strips + min(id, at.spare), count = at.strips + (id < at.spare);
  const int chunk0 = rank * at.share, chunks = max(0, min(at.share * at.segments, nch - chunk0));
  const int pairs = (count + 1) / 2;                         // the last one may be a single strip
  const int parts = (chunks + kMathWarps - 1) / kMathWarps;  // of x, and slots of a pair

  // The producer's place: how many chunks of the block's are left, of this pair's and strips in all, and the slot they go to.
  const uint8_t* src = a.w + (static_cast<size_t>(first) * nch + chunk0) * kChunkBytes;
  int left = chunks, strips_left = chunks ? count : 0, fill = 0;
  const auto fetch = [&] {
    if (strips_left <= 0) return;
    const int bytes = min(kMathWarps, left) * kChunkBytes;
    if (elect()) {
      const uint32_t bar = full + 8 * fill, dst = base + at.ring + fill * kSlotBytes;
      mbar_expect(bar, strips_left > 1 ? 2 * bytes : bytes);
      bulk_load(dst, src, bytes, bar);
      if (strips_left > 1) bulk_load(dst + kHalfBytes, src + static_cast<size_t>(nch) * kChunkBytes, bytes, bar);
    }
    left -= kMathWarps, src += bytes;
    if (left <= 0) left = chunks, strips_left -= 2, src += static_cast<size_t>(2 * nch - chunks) * kChunkBytes;
    if (++fill == depth) fill = 0;
  };
  if (warp == kMathWarps) {
    if (elect()) {  // one thread and constant addresses: lanes would take turns
#pragma unroll
      for (int i = 0; i < kMaxDepth; i++) mbar_init(full + 8 * i, 1);
    }
    mbar_init_fence();
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < at.flight; i++) fetch();  // weights never depend on the kernel before
  } else if (warp == kMathWarps + 1) {
    if (elect()) {
#pragma unroll
      for (int i = 0; i < kMaxBuffers; i++) mbar_init(sent + 8 * i, kMathWarps * at.red_lanes), mbar_init(read + 8 * i, 1);
#pragma unroll
      for (int i = 0; i < kTurns; i++) mbar_init(got + 8 * i, 1);
      if (cluster > 1) {
#pragma unroll
        for (int i = 0; i < kTurns * kMaxCluster; i++) mbar_init(credit + 8 * i, 1);
      }
#pragma unroll
      for (int i = 0; i < kMaxParts; i++) mbar_init(x_bar + 8 * i, 1);
    }
    mbar_init_fence();
  }
  if (cluster > 1 || at.share_x) {
    cluster_arrive_relaxed();
    cluster_wait();
  } else {
    __syncthreads();
  }

  if (warp == kMathWarps) {
    // The rest of the ring no faster than it arrives, or x of the kernel before this one would queue behind it.
#pragma unroll 1
    for (int i = at.flight; i < depth && strips_left > 0; i++) {
      mbar_wait(full + 8 * (i - at.flight), 0);
      fetch();
    }
#pragma unroll 1
    while (strips_left > 0) {
      named_sync(kSlotFree + fill, kSlotThreads);
      fetch();
    }
    return;
  }

  if (warp < kMathWarps) {
    grid_wait();

    uint32_t x_lane[NT];
#pragma unroll
    for (int n = 0; n < NT; n++)  // columns beyond M are computed from a copy of the last row and never stored
      x_lane[n] = base + at.x + min(n * 8 + (lane & 7), a.M - 1) * at.x_stride * 2 + (lane >> 3) * 16;
    const uint32_t lane_slot = ((lane & 3) * 8 + (lane >> 2)) * 16;
    const bool has_token = (lane & 3) * 8 < at.red_lanes;
    float acc[kPair][NT][4] = {};
    const uint32_t chunk_first = base + at.ring + warp * kChunkBytes;
    uint32_t phase = 0, round = 1, chunk = chunk_first;
    int c = warp, slot = 0, buffer = 0, refills = pairs * parts - depth;  // slots that are filled again
    const auto next_slot = [&] {
      if (refills-- > 0) named_arrive(kSlotFree + slot, kSlotThreads);
      slot++, chunk += kSlotBytes;
      if (slot == depth) slot = 0, phase ^= 1, chunk = chunk_first;
    };
    using O = Offset<BF, ZP>;
    const uint32_t ones[4] = {O::kRowG, O::kRowG8, O::kRowG, O::kRowG8};
    // This warp's chunks before `end` of a pair, or of a single strip.
    const auto multiply = [&](int end, auto strips_of_pair, auto sums_of_x) {
      constexpr bool kFirst = decltype(sums_of_x)::value != Sums::kFind;
#pragma unroll 1
      for (; c < end; c += kMathWarps) {
        if (kFirst) mbar_wait(x_bar + c / kMathWarps * 8, 0);
        mbar_wait(full + 8 * slot, phase);
        const uint32_t x_at = c * (kChunkK * 2);
        const auto load_x = [&](int n, int u, uint32_t (&b)[4]) { ldmatrix_x4(b, x_lane[n] + x_at + u * 64); };
        const uint32_t sums = base + at.sums + c * (G * NT * 32);
        chunk_mma<decltype(strips_of_pair)::value, NT, G, ZP, BF, decltype(sums_of_x)::value>(acc, chunk, kHalfBytes, sums, lane, load_x,
                                                                                              ones);
        next_slot();
      }
    };
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
#pragma unroll 1
    for (int pair = 0; pair < pairs; pair++) {
      c = warp;
#pragma unroll 1
      for (int segment = 1; segment <= at.segments; segment++) {
        const int end = min(segment * at.share, chunks);
        using Find = std::integral_constant<Sums, Sums::kFind>;  // of the same chunks, which this warp has left
        if (2 * pair + 1 < count)
          pair == 0 ? multiply(end, Two{}, std::integral_constant<Sums, Sums::kLeave>{}) : multiply(end, Two{}, Find{});
        else pair == 0 ? multiply(end, One{}, std::integral_constant<Sums, Sums::kCompute>{}) : multiply(end, One{}, Find{});
        // Leave the sums with the warp that adds them.
        mbar_wait(read + 8 * buffer, round);
        const uint32_t dst = base + at.red + (buffer * kMathWarps + warp) * set + lane_slot;
#pragma unroll
        for (int i = 0; i < kPair * NT; i++)
          if (has_token) sts128(dst + i * at.red_lanes * 16, acc[i / NT][i % NT]);
        if (has_token)
          mbar_arrive(sent + 8 * buffer);  // each for itself: one for all would order the others' stores by nothing that tools can see
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kPair * NT * 4; i++) acc[i / 4 / NT][i / 4 % NT][i % 4] = 0.f;
        if (++buffer == buffers) buffer = 0, round ^= 1;
      }
      if (c < parts * kMathWarps) {  // the pair's last slot holds nothing for this warp
        mbar_wait(full + 8 * slot, phase);
        next_slot();
      }
    }
    return;
  }

  // ---- the warp that adds and stores ----
  grid_wait();
  const int k0 = chunk0 * kChunkK, padded = chunks * kChunkK, length = max(0, min(a.K - k0, padded));
  if (lane < a.M)
    for (int k = length; k < padded; k++) reinterpret_cast<uint16_t*>(smem + at.x)[lane * at.x_stride + k] = 0;
  __syncwarp();
#pragma unroll 1
  for (int part = 0; part < parts; part++) {
    const int from = part * kMathWarps * kChunkK, bytes = 2 * max(0, min(length - from, kMathWarps * kChunkK));
    if (lane == 0) mbar_expect(x_bar + 8 * part, a.M * bytes);
    const uint32_t dst = base + at.x + (lane * at.x_stride + from) * 2;
    const uint16_t* row = a.x + static_cast<size_t>(lane) * a.ldx + k0 + from;
    if (lane >= a.M || bytes <= 0) continue;
    if (!at.share_x) bulk_load(dst, row, bytes, x_bar + 8 * part);
    else if (lane % cluster_size() == cluster_rank()) bulk_load_everywhere(dst, row, bytes, x_bar + 8 * part, (1 << cluster_size()) - 1);
  }
  constexpr int kPasses = kPair * NT;  // task lane + 32 i in pass i
  const auto exists = [&](int i, int pair) {
    return lane + 32 * i < tasks && 2 * pair + (NT > 1 ? i / NT : lane + 32 * i >= at.red_lanes) < count;
  };
  const auto load = [&](Outputs<BF>(&out)[kPasses], int pair) {
#pragma unroll
    for (int i = 0; i < kPasses; i++)
      if (exists(i, pair)) {
        const int task = lane + 32 * i, strip = NT > 1 ? i / NT : task >= at.red_lanes, place = NT > 1 ? lane : task - strip * at.red_lanes;
        out[i].load(a, first + 2 * pair + strip, place & 7, i % NT * 8 + (place >> 3) * 2);
      }
  };
  const auto add_sum = [&](float(&v)[kPasses][4], uint32_t from, int terms) {
#pragma unroll
    for (int i = 0; i < kPasses; i++)
      if (lane + 32 * i < tasks) {
        float sum[4] = {};
#pragma unroll
        for (int w = 0; w < kMathWarps; w++) {
          if (w == terms) break;
          const uint4 f = lds128(from + w * set + (lane + 32 * i) * 16);
          sum[0] += __uint_as_float(f.x), sum[1] += __uint_as_float(f.y), sum[2] += __uint_as_float(f.z), sum[3] += __uint_as_float(f.w);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) v[i][j] += sum[j];
      }
  };
  // Of a cluster's blocks each in turn stores a pair, whose sums meet in it a pair later, so that blocks need not wait for one another.
  int due = -1, due_turn = 0, buffer = 0, owner = 0, turn = 0;
  uint32_t due_phase = 0, phase = 0, turn_phase = 0;
#pragma unroll 1
  for (int pair = 0; pair < pairs || due >= 0; pair++) {
    const bool adds = pair < pairs, owns = cluster > 1 && adds && owner == rank;
    const int whole = cluster == 1 ? pair : owns ? -1 : due;  // what is stored now
    Outputs<BF> out[kPasses];
    if (whole >= 0) load(out, whole);
    float v[kPasses][4] = {};
    if (adds) {
#pragma unroll 1
      for (int segment = 0; segment < at.segments; segment++) {
        mbar_wait(sent + 8 * buffer, phase);
        add_sum(v, base + at.red + buffer * kMathWarps * set, kMathWarps);
        __syncwarp();
        if (lane == 0) mbar_arrive(read + 8 * buffer);
        if (++buffer == buffers) buffer = 0, phase ^= 1;
      }
    }
    if (cluster > 1) {
      if (adds) {
        const uint32_t area = base + at.got + (turn * cluster + rank) * set + lane * 16;
        if (owns) {
#pragma unroll
          for (int i = 0; i < kPasses; i++)
            if (lane + 32 * i < tasks) sts128(area + i * 512, v[i]);
        } else {
          mbar_wait(credit + 8 * (owner * kTurns + turn), turn_phase ^ 1);
          const uint32_t remote = cluster_address(area, owner), bar = cluster_address(got + 8 * turn, owner);
#pragma unroll
          for (int i = 0; i < kPasses; i++)
            if (lane + 32 * i < tasks) store_cluster(remote + i * 512, v[i], bar);
        }
      }
      if (whole >= 0) {
        if (lane == 0) mbar_expect(got + 8 * due_turn, (cluster - 1) * set);
        mbar_wait(got + 8 * due_turn, due_phase);
#pragma unroll
        for (int i = 0; i < kPasses * 4; i++) v[i / 4][i % 4] = 0.f;
        add_sum(v, base + at.got + due_turn * cluster * set, cluster);
        __syncwarp();
        if (whole + kTurns * cluster < pairs && lane < cluster && lane != rank)
          mbar_arrive_cluster(cluster_address(credit + 8 * (rank * kTurns + due_turn), lane));
        due = -1;
      }
      if (owns) due = pair, due_turn = turn, due_phase = turn_phase;
      if (++owner == cluster) {
        owner = 0;
        if (++turn == kTurns) turn = 0, turn_phase ^= 1;
      }
    }
    if (whole < 0) continue;
#pragma unroll
    for (int i = 0; i < kPasses; i++)
      if (exists(i, whole)) out[i].store(a, v[i]);
  }
#endif
}

}  // namespace gptq
