// Sizes of the GEMV kernel: its warps, ring, barriers, and the plan of its shared memory.
#pragma once
#include <algorithm>

#include "common/layout.cuh"
#include "gemv/gemv.h"

namespace gptq {

constexpr int kMathWarps = 8;
constexpr int kPair = 2;        // strips a warp works on at a time: they share x, and what a loop costs
constexpr int kMaxDepth = 8;    // slots of the ring
constexpr int kMaxBuffers = 2;  // of the exchange area
constexpr int kTurns = 2;       // areas for the other blocks' sums: those of so many pairs can arrive before the first is added up
constexpr int kMaxCluster = 8;  // no more than kMathWarps, whose sums and those of other blocks are added by the same lines
constexpr int kMaxParts = 16;   // of x, which arrives kMathWarps chunks at a time
constexpr int kGemvThreads = (kMathWarps + 2) * 32;
constexpr int kInFlight = 2;      // slots asked for before the first has landed: more would delay x of the block beside this one
constexpr int kBlocksAtOnce = 2;  // per SM: one of this launch and one of the next

// Of gemv_portable: strips that a warp multiplies at a time with the same tokens, and bytes between tokens in a slot, so that ldmatrix
// meets no bank twice.
constexpr int kPortableStrips = 4;
constexpr int kTokenBytes = kChunkK * 2 + 16;
constexpr int kPortableDepth = 3;  // slots at most, two at least
constexpr int kSlotAlign = 128;    // bytes: at odd multiples of 16 a 13B layer takes 62.6 us for a token, not 53.9
constexpr int kManyTokens = 7;     // half of a slot: to bring them in for fewer strips costs more than a third slot saves
constexpr int kPortableMaxM = 8;
constexpr int kPortableThreads = kMathWarps * 32;

// Before sm_90 there are no bulk copies; the consumer GPUs since have them, but not the shared memory for this kernel's ring beside x.
inline bool takes_portable_kernel(int code) { return code < 90 || code >= 120; }

// Named barriers: of a slot, that all warps that multiply are through with it. Unlike an mbarrier's, its arrival is that of a whole warp.
constexpr int kSlotFree = 1, kSlotThreads = (kMathWarps + 1) * 32;
// Mbarriers, at the start of shared memory.
constexpr int kFull = 0;                                               // of the ring
constexpr int kSent = kFull + kMaxDepth, kRead = kSent + kMaxBuffers;  // of the warps' sums
constexpr int kGot = kRead + kMaxBuffers, kCredit = kGot + kTurns;     // of other blocks' sums; kCredit[owner][turn]
constexpr int kX = kCredit + kTurns * kMaxCluster, kBarriers = kX + kMaxParts;

// Lanes whose columns hold one of M tokens.
inline int red_lanes_of(int M) { return 8 * (M >= 7 ? 4 : (M + 1) / 2); }

// Where things are in shared memory, in bytes from its start. k is added up in `split` segments, each by a block of a cluster of so many,
// or all by one.
inline GemvPlan plan_gemv(int M, int K, int nt, int split, int cluster, int depth, int buffers, int groups, bool zeros) {
  const int nch = (K + kChunkK - 1) / kChunkK, chunk = chunk_bytes(groups, zeros);
  GemvPlan p = {};
  p.depth = depth, p.flight = std::min(depth, kInFlight), p.buffers = buffers;
  p.share = ((nch + split - 1) / split + kMathWarps - 1) / kMathWarps * kMathWarps;
  p.segments = split / cluster;
  const int most = std::min(nch, p.share * p.segments);  // chunks of a block
  p.x_stride = most * kChunkK + 8;  // ldmatrix then meets no bank twice
  p.red_lanes = nt > 1 ? 32 : red_lanes_of(M);
  p.ring = (kBarriers * 8 + 127) / 128 * 128;
  p.x = p.ring + depth * kPair * kMathWarps * chunk;
  p.sums = p.x + M * p.x_stride * 2;
  p.red = p.sums + most * groups * nt * 32;
  p.got = p.red + buffers * kMathWarps * kPair * nt * p.red_lanes * 16;
  p.total = p.got + (cluster > 1 ? kTurns * cluster * kPair * nt * p.red_lanes * 16 : 0);
  return p;
}

// Rings and exchange area of gemv_portable for a block of up to `strips` strips. As many strips at a time as leave a ring of three slots,
// or else of two: each pass brings the tokens in again. Of many tokens, two slots at once.
inline GemvPlan plan_portable(int M, int strips, int budget, int groups, bool zeros) {
  GemvPlan p = {};
  p.red_lanes = red_lanes_of(M);
  for (const int least : {M < kManyTokens ? 3 : 2, 2})
    for (p.pass = std::min(strips, kPortableStrips); p.pass >= (least == 3 ? std::min(strips, 2) : 1); p.pass--) {
      p.slot = (p.pass * chunk_bytes(groups, zeros) + M * kTokenBytes + kSlotAlign - 1) / kSlotAlign * kSlotAlign;
      const int sums = kMathWarps * p.pass * p.red_lanes * 16;
      p.depth = std::min(kPortableDepth, (budget - sums) / (kMathWarps * p.slot));
      if (p.depth < least) continue;
      p.red = kMathWarps * p.depth * p.slot;
      p.total = p.red + sums;
      return p;
    }
  return p;
}

}  // namespace gptq
