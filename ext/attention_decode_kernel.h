// The kernel. Four warps take the 128 tokens of a step (attention_decode_work.h), 32 each, keys and values through a ring of the warp's own, so
// that nothing but the ends of a chunk and of an item needs a barrier, and copies run on across items. Scores are keys times queries, with
// tokens as the 16 rows of an mma and the query heads that share a key head as its 8 columns; the output is values transposed times weights,
// with dimensions as rows.
//
// At the end of a chunk the warps' results are added in their order, each warp adding a quarter of the dimensions. Chunks are added in their
// order too: those from the beginning of an item at once, later ones through the workspace by whichever block comes last, so that no sum
// depends on timing, batch or grid.
//
// Tokens outside the context (or the window, or in no block) are never read; their keys and values are zeros and their weights exactly 0.
#pragma once
#include "attention_decode_load.h"

namespace gptq {

template <int D, bool BF, bool FP8>
class AttentionBlock {
  using Shape = AttentionShape<D, FP8>;
  static constexpr bool kBF = BF && !FP8;  // type of the products: e4m3 becomes fp16
  static constexpr int kLanes = D / 16;    // that hold a head, 8 elements of either half each

  const AttentionDecodeArgs& a;
  const int warp, lane;
  const uint32_t ring, sums, maxima;  // shared: copies; results of warps for each other, or queries; [warp][head] (maximum, sum)
  int* const scratch;
  Cuts cuts;
  uint32_t q[D / 16][2];
  NewRow<D, BF, FP8> fresh;

 public:
  __device__ __forceinline__ AttentionBlock(const AttentionDecodeArgs& args, uint8_t* smem)
      : a(args),
        warp(__shfl_sync(~0u, threadIdx.x >> 5, 0)),
        lane(threadIdx.x & 31),
        ring(smem_addr(smem) + warp * Shape::kDepth * Shape::kEntry),
        sums(smem_addr(smem) + Shape::kRing),
        maxima(sums + exchange_bytes<D>(args.part_heads)),
        scratch(reinterpret_cast<int*>(smem + Shape::kRing + exchange_bytes<D>(args.part_heads) + kAttentionWarps * kPartHeads * 8)) {}

  __device__ __forceinline__ void run() {
    grid_launch_dependents();
    bool waited = !a.prefetch;
    if (waited) grid_wait();
    const Stretch stretch = find_stretch(a, scratch);
    cuts = stretch.cuts;
    Cursor c = stretch.begin;
    TileLoader<D, FP8> loader(a, ring, c, stretch.steps);
#pragma unroll
    for (int i = 0; i < Shape::kDepth; i++) loader.next(i % 2 != 0);

    Partial<Shape::kTiles> chunk;
    Partial<Shape::kOwn> total;
    int entry = 0, first_chunk = 0;
    const auto take = [&] {  // the oldest entry of the ring
      cp_async_wait<Shape::kDepth - 1>();
      __syncwarp();
      const uint32_t tile = ring + entry * Shape::kEntry;
      if (++entry == Shape::kDepth) entry = 0;
      return tile;
    };
#pragma unroll 1
    for (int i = 0; i < stretch.steps; i++, advance(c, a)) {
      const int in_chunk = c.step & ((1 << c.span.chunk_shift) - 1), index = c.step >> c.span.chunk_shift;
      if (i == 0 || c.step == 0) {
        first_chunk = index;
        start_item(c, [&] {
          if (!waited) grid_wait();
          waited = true;
        });
      }
      if (in_chunk == 0) chunk.clear();
      const bool sees = c.sees(warp), writes = fresh.is_in(a, c, warp);
      const uint32_t keys = take();
      uint32_t weights[2][2];
      if (sees) {
        if (writes) fresh.put(a, c, keys, false);
        softmax(chunk, weights, keys, c);
      }
      __syncwarp();
      loader.next(Shape::kDepth % 2 != 0);
      const uint32_t values = take();
      if (sees) {
        if (writes) fresh.put(a, c, values, true);
        weigh<D, FP8, kBF>(chunk.o, values, weights, lane);
      }
      __syncwarp();
      loader.next(Shape::kDepth % 2 == 0);

      const bool item_ends = c.step + 1 == c.span.count, part_ends = item_ends || i + 1 == stretch.steps;
      if (!item_ends && in_chunk + 1 < 1 << c.span.chunk_shift) continue;
      const Partial<Shape::kOwn> sum = add_warps(chunk);
      if (first_chunk) store(sum, blockIdx.x * kSlotsPerBlock + index - first_chunk);
      else if (index) add(total, sum);
      else total = sum;
      if (!part_ends) continue;
      if (!first_chunk && item_ends) {
        write(total, c);
        continue;
      }
      if (!first_chunk) store(total, blockIdx.x * kSlotsPerBlock + kMaxChunks);
      if (is_last(c, index + 1 - first_chunk)) write(add_parts(c), c);
    }
    if (!waited) grid_wait();
    if (stretch.padded) clear_padding();
  }

 private:
  __device__ __forceinline__ int slot_lane() const { return (lane & 3) * 8 + (lane >> 2); }
  __device__ __forceinline__ bool has_head() const { return 2 * (lane & 3) < a.part_heads; }
  __device__ __forceinline__ int first_head(const Cursor& c) const {
    return c.head / a.parts * (a.heads / a.kv_heads) + c.head % a.parts * a.part_heads;
  }
  __device__ __forceinline__ int head_count(const Cursor& c) const {
    return min(a.part_heads, (c.head / a.parts + 1) * (a.heads / a.kv_heads) - first_head(c));
  }

  // Queries of an item into fragments, and the new key and value. `wait` is called before anything is read that an earlier kernel may write.
  template <typename Wait>
  __device__ __forceinline__ void start_item(const Cursor& c, Wait wait) {
    const int of_head = threadIdx.x / kLanes, d = threadIdx.x % kLanes * 8;
    const bool mine = of_head < head_count(c);
    Rotation<D, BF> rotation;
    if (a.cos_sin) rotation.load(a, c.span.row, d);
    wait();
    const uint16_t* row = a.qkv + static_cast<size_t>(c.span.row) * a.ldqkv + d;
    uint4 low = {}, high = {};
    if (mine) {
      const uint16_t* from = row + (first_head(c) + of_head) * D;
      low = *reinterpret_cast<const uint4*>(from), high = *reinterpret_cast<const uint4*>(from + D / 2);
    }
    fresh.load(a, c, row, warp);
    if (a.cos_sin || (FP8 && BF)) {
      float x[8], y[8];
      unpack8<BF>(x, low);
      unpack8<BF>(y, high);
      if (a.cos_sin) {
        rotation.apply(x, y, a.q_norm, a.eps, d);
        low = pack8<BF>(x), high = pack8<BF>(y);
        fresh.prepare(a, rotation, d);
      }
      if constexpr (FP8 && BF) {
        unpack8<BF>(x, low);
        unpack8<BF>(y, high);
        low = pack8_saturated(x), high = pack8_saturated(y);
      }
    }
    if (mine) {
      const uint32_t to = sums + of_head * Shape::kQueryStride + d * 2;
      sts128(to, low);
      sts128(to + D, high);
    }
    __syncthreads();
    const uint32_t from = sums + (lane >> 2) * Shape::kQueryStride;
#pragma unroll
    for (int j = 0; j < D / 16; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) q[j][i] = lds32(from + query_dimension<FP8>(j, i, lane) * 2);
    __syncthreads();
  }

  // Scores of the tile into weights, as B fragments; maximum, sum and values of the chunk so far brought to the new maximum.
  __device__ __forceinline__ void softmax(Partial<Shape::kTiles>& chunk, uint32_t (&weights)[2][2], uint32_t keys, const Cursor& c) {
    float s[2][4] = {};
    scores<D, FP8, kBF>(s, keys, q, lane);
    const float scale = a.scale * 1.44269504f;
    const int token = c.first_token(warp) + (lane >> 2);
    float max[2] = {chunk.max[0], chunk.max[1]};
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int at = token + 16 * m + 8 * (k >> 1);
        s[m][k] = at >= c.span.low && at < c.span.length ? s[m][k] * scale : -INFINITY;
        max[k & 1] = fmaxf(max[k & 1], s[m][k]);
      }
    float base[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
      for (int step = 4; step < 32; step <<= 1) max[h] = fmaxf(max[h], __shfl_xor_sync(~0u, max[h], step));
      base[h] = finite_or_zero(max[h]);
      const float before = exp2_fast(chunk.max[h] - base[h]);
      chunk.max[h] = max[h];
      chunk.sum[h] *= before;
#pragma unroll
      for (int i = 0; i < Shape::kTiles; i++) chunk.o[i][h] *= before, chunk.o[i][h + 2] *= before;
    }
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
      for (int k = 0; k < 4; k++) {
        s[m][k] = exp2_fast(s[m][k] - base[k & 1]);
        chunk.sum[k & 1] += s[m][k];
      }
      weights[m][0] = transpose8x8(pack2<kBF>(s[m][0], s[m][1]));
      weights[m][1] = transpose8x8(pack2<kBF>(s[m][2], s[m][3]));
    }
  }

  // The four warps' results; every warp has its quarter of the dimensions.
  __device__ __forceinline__ Partial<Shape::kOwn> add_warps(Partial<Shape::kTiles>& mine) {
    const int unit = head_lanes(a.part_heads) * 16;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int step = 4; step < 32; step <<= 1) mine.sum[h] += __shfl_xor_sync(~0u, mine.sum[h], step);
    if (lane < 4) sts128(maxima + (warp * kPartHeads + 2 * lane) * 8, {mine.max[0], mine.sum[0], mine.max[1], mine.sum[1]});
    if (has_head())
#pragma unroll
      for (int i = 0; i < Shape::kTiles; i++) sts128(sums + (warp * Shape::kTiles + i) * unit + slot_lane() * 16, mine.o[i]);
    __syncthreads();
    Partial<Shape::kOwn> sum;
    float of[kAttentionWarps][2];
    sum.clear();
#pragma unroll
    for (int w = 0; w < kAttentionWarps; w++) {
      const uint4 raw = lds128(maxima + (w * kPartHeads + 2 * (lane & 3)) * 8);
      of[w][0] = __uint_as_float(raw.x), of[w][1] = __uint_as_float(raw.z);
      sum.max[0] = fmaxf(sum.max[0], of[w][0]), sum.max[1] = fmaxf(sum.max[1], of[w][1]);
    }
#pragma unroll
    for (int w = 0; w < kAttentionWarps; w++) {
      const uint4 raw = lds128(maxima + (w * kPartHeads + 2 * (lane & 3)) * 8);
      const float sums_of_w[2] = {__uint_as_float(raw.y), __uint_as_float(raw.w)};
#pragma unroll
      for (int h = 0; h < 2; h++) {
        of[w][h] = exp2_fast(of[w][h] - finite_or_zero(sum.max[h]));
        sum.sum[h] = __fmaf_rn(sums_of_w[h], of[w][h], sum.sum[h]);
      }
      if (!has_head()) continue;
#pragma unroll
      for (int i = 0; i < Shape::kOwn; i++) {
        const uint4 v = lds128(sums + (w * Shape::kTiles + warp * Shape::kOwn + i) * unit + slot_lane() * 16);
        const float o[4] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
#pragma unroll
        for (int k = 0; k < 4; k++) sum.o[i][k] = __fmaf_rn(o[k], of[w][k & 1], sum.o[i][k]);
      }
    }
    __syncthreads();
    return sum;
  }

  // ---- partial results in the workspace ----
  __device__ __forceinline__ float4* slot(int index) const {
    return reinterpret_cast<float4*>(static_cast<float*>(a.workspace) + static_cast<size_t>(index) * slot_floats(D, a.part_heads));
  }
  __device__ __forceinline__ void store(const Partial<Shape::kOwn>& sum, int index) {
    float4* to = slot(index);
    const int lanes = head_lanes(a.part_heads);
    if (has_head())
#pragma unroll
      for (int i = 0; i < Shape::kOwn; i++)
        to[(warp * Shape::kOwn + i) * lanes + slot_lane()] = make_float4(sum.o[i][0], sum.o[i][1], sum.o[i][2], sum.o[i][3]);
    if (threadIdx.x < 4) to[Shape::kTiles * lanes + lane] = make_float4(sum.max[0], sum.sum[0], sum.max[1], sum.sum[1]);
  }
  __device__ __forceinline__ Partial<Shape::kOwn> fetch(int index) const {
    const float4* from = slot(index);
    const int lanes = head_lanes(a.part_heads);
    Partial<Shape::kOwn> sum;
    const float4 top = __ldcg(from + Shape::kTiles * lanes + (lane & 3));
    sum.max[0] = top.x, sum.sum[0] = top.y, sum.max[1] = top.z, sum.sum[1] = top.w;
#pragma unroll
    for (int i = 0; i < Shape::kOwn; i++) {
      const float4 v = has_head() ? __ldcg(from + (warp * Shape::kOwn + i) * lanes + slot_lane()) : float4{};
      sum.o[i][0] = v.x, sum.o[i][1] = v.y, sum.o[i][2] = v.z, sum.o[i][3] = v.w;
    }
    return sum;
  }

  // Whether this block, with `done` chunks of the item stored, is the last of those that share it.
  __device__ __forceinline__ bool is_last(const Cursor& c, int done) {
    __syncthreads();
    if (threadIdx.x == 0) {
      int* counter = a.counters + c.sequence * a.kv_heads * a.parts + c.head;
      __threadfence();
      const bool last = atomicAdd(counter, done) + done == c.span.chunks();
      if (last) *counter = 0;  // for the next launch
      __threadfence();
      scratch[0] = last;
    }
    __syncthreads();
    return scratch[0];
  }

  __device__ __forceinline__ Partial<Shape::kOwn> add_parts(const Cursor& c) const {
    const int chunks = c.span.chunks(), shift = c.span.chunk_shift, beginner = cuts.block_of(c.origin);
    const int block = cuts.block_of(c.origin + (min(lane, chunks - 1) << shift));
    const int its_first = (cuts.at(block) - c.origin + (1 << shift) - 1) >> shift;
    const int index = block * kSlotsPerBlock + (lane == 0 ? kMaxChunks : lane - its_first);
    const uint32_t later = __ballot_sync(~0u, lane < chunks && block != beginner);
    Partial<Shape::kOwn> total = fetch(__shfl_sync(~0u, index, 0));
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (int chunk = later ? __ffs(later) - 1 : chunks; chunk < chunks; chunk += kAtOnce) {
      Partial<Shape::kOwn> next[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) next[k] = fetch(__shfl_sync(~0u, index, min(chunk + k, chunks - 1)));
#pragma unroll
      for (int k = 0; k < kAtOnce; k++)
        if (chunk + k < chunks) add(total, next[k]);
    }
    return total;
  }

  __device__ __forceinline__ void write(const Partial<Shape::kOwn>& total, const Cursor& c) {
    const int first = first_head(c), count = head_count(c);
    uint16_t* out = a.out + static_cast<size_t>(c.span.row) * a.ldo;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int head = 2 * (lane & 3) + h;
      if (head >= count) continue;
      const float scale = 1.f / total.sum[h];
#pragma unroll
      for (int i = 0; i < Shape::kOwn; i++)
#pragma unroll
        for (int k = h; k < 4; k += 2) {
          const int column = (first + head) * D + output_dimension<FP8>(warp * Shape::kOwn + i, k, lane);
          out[a.out_index ? a.out_index[column] : column] = to_16bit<BF>(total.o[i][k] * scale);
        }
    }
  }

  // Rows that only fill up a batch: what comes after must find numbers.
  __device__ __forceinline__ void clear_padding() {
    for (int s = blockIdx.x; s < a.sequences; s += gridDim.x) {
      if (!is_padding(a, s)) continue;
      uint16_t* out = a.out + static_cast<size_t>(a.query_start[s]) * a.ldo;
      for (int i = threadIdx.x; i < a.heads * D; i += kAttentionThreads) out[i] = 0;
    }
  }
};

template <int D, bool BF, bool FP8>
__global__ void __launch_bounds__(kAttentionThreads, D == 256 ? 1 : 2) attention_decode_kernel(const __grid_constant__ AttentionDecodeArgs a) {
  extern __shared__ __align__(128) uint8_t smem[];
  AttentionBlock<D, BF, FP8>(a, smem).run();
}

}  // namespace gptq
