// Who computes what, decided on the device from context_lens: nothing of it is known when a graph is captured.
//
// A step is 128 tokens of one (sequence, head group). All steps of a launch stand in one line: sequence by sequence, head by head, token by
// token; every block takes an equal stretch of it, the first block the last one. Consecutive steps of an item form chunks (one step each up
// to 4096 tokens of context); a chunk belongs to the block whose stretch holds its first step. Where chunks begin depends on the row's own
// context and window only, so the result's bits depend neither on the batch nor on the number of blocks.
//
// Consecutive rows of one sequence share an item where the caller says so, since all their chunks begin at the same steps. A step that the
// shorter of them do not see adds nothing to their sums, to the last bit.
#pragma once
#include "attention/attention_decode.h"

namespace gptq {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * 32;
// Of a thread: a warp of this kernel and three of the GEMV's, which have up to 88, are all that a quarter of an SM holds. With more this
// kernel begins only when the GEMV in front of it has ended: 2.4 us a layer of 13B.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)  // GPUs of the portable GEMV
constexpr int kAttentionRegisters = 255;
#else
constexpr int kAttentionRegisters = 248;
#endif
constexpr int kTileTokens = 32;  // tokens of a warp in a step
constexpr int kStepTokens = kTileTokens * kAttentionWarps;
constexpr int kMaxChunks = 32;  // of an item: what a lane each can look up
constexpr int kPartHeads = 8;   // queries served together: the columns of an mma
constexpr int kScratchInts = kAttentionWarps + 4;

// Who attends together to a step: the warps of a block, a tile of its tokens each.
struct WholeBlock {
  static constexpr int kWarps = kAttentionWarps;
  static constexpr bool kShares = false;  // an item has one row
  static __device__ __forceinline__ int thread() { return threadIdx.x; }
  // shfl: so that the compiler knows it for uniform.
  static __device__ __forceinline__ int warp() { return __shfl_sync(~0u, threadIdx.x >> 5, 0); }
  static __device__ __forceinline__ int count() { return gridDim.x; }  // of such teams
  static __device__ __forceinline__ int index() { return blockIdx.x; }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  static __device__ __forceinline__ bool any(bool mine) { return __syncthreads_or(mine); }
};

// The same where rows of a sequence share items. A kernel of its own, since all that it does more would delay single rows.
struct SharingBlock : WholeBlock {
  static constexpr bool kShares = true;
};

// Every warp by itself: nobody waits for anybody, which pays where there are enough items for all of them.
struct OneWarp {
  static constexpr int kWarps = 1;
  static constexpr bool kShares = false;
  static __device__ __forceinline__ int thread() { return threadIdx.x & 31; }
  static __device__ __forceinline__ int count() { return gridDim.x * kAttentionWarps; }
  static __device__ __forceinline__ int index() { return blockIdx.x * kAttentionWarps + WholeBlock::warp(); }
  static __device__ __forceinline__ void sync() { __syncwarp(); }
  static __device__ __forceinline__ bool any(bool mine) {
    const bool found = __any_sync(~0u, mine);
    __syncwarp();
    return found;
  }
};

// The tokens that the rows of an item see, rows .. row + rows - 1 of qkv: the last one up to `length`, each before it one less; the first
// one from `low` on. In steps first .. first + count - 1.
struct Span {
  int length, low, first, count, row;
  uint32_t small;  // three numbers in a register

  __device__ __forceinline__ int chunk_shift() const { return small & 31; }  // log2 of steps per chunk
  __device__ __forceinline__ int rows() const { return small >> 8 & 15; }
  // Tokens at the end that the step itself computes, the rows' own and those before them: they are not in the cache yet.
  __device__ __forceinline__ int fresh() const { return small >> 16; }
  __device__ __forceinline__ void set(int rows, int fresh) { small = chunk_shift() | rows << 8 | fresh << 16; }
  __device__ __forceinline__ int chunks() const { return (count + (1 << chunk_shift()) - 1) >> chunk_shift(); }
  __device__ __forceinline__ int cached() const { return length - fresh(); }
  __device__ __forceinline__ int shortest() const { return length - rows() + 1; }
};

// Of the item that begins with entry s; without steps where none does.
template <class Team>
__device__ __forceinline__ Span span_of(const AttentionDecodeArgs& a, int s) {
  Span span;
  span.length = a.context_lens[s];
  span.row = a.query_start[s];
  const bool one_row = a.query_start[s + 1] - span.row == 1;
  span.low = a.window > 0 ? max(0, span.length - a.window) : 0;
  span.first = span.low / kStepTokens;
  int rows = 1, fresh = a.cos_sin != nullptr;
  if (Team::kShares) {
    rows = a.groups[2 * s];
    if (fresh) fresh = a.groups[2 * s + 1];
    if (span.length > 0) span.length += rows - 1;
  }
  span.count = span.length > 0 && one_row && rows ? (span.length + kStepTokens - 1) / kStepTokens - span.first : 0;
  span.small = 0;
  while (span.chunks() > kMaxChunks) span.small++;
  span.set(rows, fresh);
  return span;
}

__device__ __forceinline__ bool is_padding(const AttentionDecodeArgs& a, int s) {
  return a.context_lens[s] <= 0 && a.query_start[s + 1] - a.query_start[s] == 1;
}

// Where the line is cut: stretch b begins at at(b) = floor(b total / teams), stretch_of is its inverse.
struct Cuts {
  int total, teams;
  __device__ __forceinline__ int at(int b) const {  // by divisions of 32 bits: teams are few
    const uint32_t each = static_cast<uint32_t>(total) / teams, rest = total - each * teams;
    return b * each + b * rest / static_cast<uint32_t>(teams);
  }
  __device__ __forceinline__ int stretch_of(int step) const {
    return static_cast<int>(((static_cast<uint64_t>(step) + 1) * teams - 1) / total);
  }
};

// A place in the line.
struct Cursor {
  Span span;
  int sequence, kv_head, part;  // part: of the query heads that share the key head
  int step;                     // of the item
  int origin;                   // where the item begins in the line

  __device__ __forceinline__ int first_token(int warp) const { return (span.first + step) * kStepTokens + warp * kTileTokens; }
  __device__ __forceinline__ bool sees(int warp) const {
    const int token = first_token(warp);
    return token < span.length && token + kTileTokens > span.low;
  }
};

template <class Team>
__device__ __forceinline__ void advance(Cursor& c, const AttentionDecodeArgs& a) {
  if (++c.step < c.span.count) return;
  c.step = 0;
  c.origin += c.span.count;
  if (++c.part < a.parts) return;
  c.part = 0;
  if (++c.kv_head < a.kv_heads) return;
  c.kv_head = 0;
  do {
    c.sequence += Team::kShares ? max(c.span.rows(), 1) : 1;
    if (c.sequence >= a.sequences) return;
    c.span = span_of<Team>(a, c.sequence);
  } while (c.span.count == 0);
}

struct Stretch {
  Cuts cuts;
  Cursor begin;
  int index, steps;
  bool padded;  // some sequence has a row and no context: a row that fills up a batch
};

// Both ends of this team's stretch, by a sum over all sequences. `scratch`: shared, kScratchInts.
template <class Team>
__device__ __forceinline__ Stretch find_stretch(const AttentionDecodeArgs& a, int* scratch) {
  const int warp = Team::thread() >> 5, lane = Team::thread() & 31, heads = a.kv_heads * a.parts;
  const int each = (a.sequences + Team::kWarps * 32 - 1) / (Team::kWarps * 32), from = Team::thread() * each,
            to = min(from + each, a.sequences);
  Stretch stretch;
  int mine = 0, before = 0, begin = 0, end = 0;
  int* found = scratch + kAttentionWarps;  // sequence and first step of the items of begin and of end
  // Once to add up, once to look for the ends: one copy of the code.
#pragma unroll 1
  for (int round = 0; round < 2; round++) {
    const bool looks = round && ((before <= begin && begin < before + mine) || (before <= end && end < before + mine));
    if (!round || looks) {
      bool padded = false;
      int at = before;
#pragma unroll 1
      for (int s = from; s < to; s++) {
        const int weight = span_of<Team>(a, s).count * heads;
        if (at <= begin && begin < at + weight && looks) found[0] = s, found[1] = at;
        if (at <= end && end < at + weight && looks) found[2] = s, found[3] = at;
        at += weight;
        padded |= is_padding(a, s);
      }
      if (!round) mine = at, stretch.padded = padded;
    }
    if (round) break;
    int sum = mine;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      const int other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    if (lane == 31) scratch[warp] = sum;
    stretch.padded = Team::any(stretch.padded);
    int total = 0;
    before = sum - mine;
#pragma unroll
    for (int w = 0; w < Team::kWarps; w++) {
      if (w < warp) before += scratch[w];
      total += scratch[w];
    }
    stretch.steps = 0;
    stretch.cuts.total = total;
    stretch.cuts.teams = min(Team::count(), total);
    if (Team::index() >= stretch.cuts.teams) return stretch;
    // Backwards: the team that begins an item waits for those that go on with it, and they have started before it.
    stretch.index = stretch.cuts.teams - 1 - Team::index();
    begin = stretch.cuts.at(stretch.index), end = stretch.cuts.at(stretch.index + 1);
  }
  Team::sync();
  // Both ends: the steps of a chunk that another block began are that block's.
  Cursor& c = stretch.begin;
  int stop = end;
#pragma unroll 1
  for (int last = 0; last < 2; last++) {
    if (last && end == stretch.cuts.total) break;
    const int sequence = found[2 * last], inside = (last ? end : begin) - found[2 * last + 1];
    const Span span = span_of<Team>(a, sequence);
    const int item = inside / span.count, step = inside - item * span.count, per_chunk = 1 << span.chunk_shift();
    const int from_chunk = min(span.count, (step + per_chunk - 1) & ~(per_chunk - 1));
    if (last) {
      stop = end - step + from_chunk;
      break;
    }
    c.sequence = sequence, c.span = span;
    c.kv_head = item / a.parts, c.part = item - c.kv_head * a.parts;
    c.origin = begin - step, c.step = from_chunk;
  }
  stretch.steps = stop - (c.origin + c.step);
  if (c.step == c.span.count && stretch.steps > 0) {
    c.step--;
    advance<Team>(c, a);
  }
  return stretch;
}

}  // namespace gptq
