// The kernel. Four warps take the 128 tokens of a step (attention_decode_schedule.cuh), 32 each, keys and values through a ring of the
// warp's own, so that nothing but the ends of a chunk and of an item needs a barrier, and copies run on across items. Scores are keys times
// queries, with tokens as the 16 rows of an mma and the query heads that share a key head as its 8 columns, of one row or of several rows
// of a sequence; the output is values transposed times weights, with dimensions as rows.
//
// At the end of a chunk the warps' results are added in their order, each warp adding a quarter of the dimensions. Chunks are added in
// their order too, by the block that has the item's first one; other blocks leave theirs in the workspace. No sum depends on timing, batch
// or grid.
//
// Where there are many items, a warp takes whole steps alone, tile by tile, and does what the four would have done in the same order, to
// the same bits: no barriers, and what an item costs beside its tokens is paid by a quarter of the warps.
//
// Tokens outside the context (or the window, or in no block) are never read; their keys and values are zeros and their weights exactly 0.
// Where a row sees fewer tokens than the rest of its item, its weights of the others are exactly 0, and values that no weight of 0 makes 0
// are taken out (see mend()): its bits are those it has alone.
#pragma once
#include <type_traits>

#include "attention/attention_decode_load.cuh"
#include "attention/attention_decode_table.cuh"

namespace gptq {

template <class Team, int D, bool BF, bool FP8>
class AttentionBlock {
  using Shape = AttentionShape<D, FP8>;
  static constexpr bool kBF = BF && !FP8;  // type of the mma: e4m3 becomes fp16
  static constexpr int kLanes = D / 16;    // that hold a head, 8 elements of either half each
  static constexpr bool kAlone = Team::kWarps == 1;
  static_assert(Shape::kDepth % 2 == 0);                     // so the entry that keys leave is filled with keys
  static constexpr int kOwn = Shape::kTiles / Team::kWarps;  // m-tiles of the output that a warp adds up
  static constexpr int kPasses = (kPartHeads * kLanes + Team::kWarps * 32 - 1) / (Team::kWarps * 32);  // over the queries
  static constexpr bool kCanBeSick = !FP8 || kE4m3HasNaN;  // values, so that they are not finite
  using New = NewRows<Team, D, BF, FP8>;

  const AttentionDecodeArgs& a;
  const int warp, lane;               // warp: of the team
  const uint32_t ring, sums, maxima;  // shared: copies; results of warps for each other, queries or new rows; [warp][column] (maximum, sum)
  int* const scratch;
  uint32_t q[D / 16][2];

  // What an item reads of qkv, a step before it is needed.
  struct Rows {
    uint4 query[2];
    New fresh;
  };

 public:
  __device__ __forceinline__ AttentionBlock(const AttentionDecodeArgs& args, uint8_t* smem)
      : a(args),
        warp(__shfl_sync(~0u, Team::thread() >> 5, 0)),
        lane(threadIdx.x & 31),
        ring(smem_addr(smem) + (kAlone ? WholeBlock::warp() : warp) * Shape::kDepth * Shape::kEntry),
        sums(smem_addr(smem) + scratch_at(args)),
        maxima(sums + exchange_bytes<D>(args.part_heads)),
        scratch(reinterpret_cast<int*>(
            smem + scratch_at(args) +
            (kAlone ? kPartHeads * Shape::kQueryStride : exchange_bytes<D>(args.part_heads) + kAttentionWarps * kPartHeads * 8))) {}

  // The kernel before this one is waited for before qkv is read, or first of all.
  __device__ __forceinline__ void run() {
    bool waited = !a.prefetch;
    if (waited) grid_wait();
    const Stretch stretch = find_stretch<Team>(a, scratch);
    TileLoader<Team, D, FP8> loader(a, ring, stretch.begin, stretch.steps);

    Cursor c = stretch.begin, next = c;
    Rows rows;
    New fresh;
    Partial<Shape::kTiles> chunk;  // this warp's part of the chunk so far, where four warps share it
    Partial<kOwn> total;
    uint32_t weights[2][2];
    int first_chunk = 0, left = stretch.steps;
    uint32_t entry = 0;
    const auto take = [&] {  // the oldest entry of the ring
      cp_async_wait<Shape::kDepth - 1>();
      __syncwarp();
      const uint32_t tile = ring + entry;
      entry = entry == (Shape::kDepth - 1) * Shape::kEntry ? 0 : entry + Shape::kEntry;
      return tile;
    };
    const auto begin_step = [&] {
      if (left == stretch.steps || c.step == 0) {
        first_chunk = c.step >> c.span.chunk_shift();
        Rotation<D, BF> rotation;
        if (a.cos_sin) {
          rotation.load(a, c.span.row + min(row_of(column(0)), rows_of(c) - 1), dimension());
          if constexpr (Team::kShares) Rotation<D, BF>::prefetch(a, New::row(c), dimension());
        }
        if (left == stretch.steps) {
          if (!waited) grid_wait();
          waited = true;
          load_rows(rows, c);
        }
        start_item(rows, fresh, rotation, c, left);
      }
      next = c;
      if (left > 1) {
        advance<Team>(next, a);
        if (ends_item(c)) load_rows(rows, next);
      }
    };
    // Where warps are alone, `whole` is their step's result.
    const auto end_step = [&](const Partial<kOwn>* whole) {
      const bool item_ends = ends_item(c);
      if (item_ends || place_in_chunk(c) + 1 == 1 << c.span.chunk_shift()) {
        const int index = c.step >> c.span.chunk_shift();
        Partial<kOwn> sum;
        if constexpr (kAlone) sum = *whole;
        else sum = add_warps(chunk, c);
        if (first_chunk) {
          store(sum, stretch.index * kMaxChunks + index - first_chunk, c);
        } else {
          if (index) add(total, sum);
          else total = sum;
          if (item_ends || left == 1) {
            if (!item_ends) add_later(total, c, index + 1, stretch.cuts);
            write(total, c);
          }
        }
      }
      c = next;
      left--;
    };
    if constexpr (kAlone) {
#pragma unroll 1
      for (int i = 0; i < Shape::kDepth; i++) loader.next(i & 1);
#pragma unroll 1
      while (left > 0) {
        begin_step();
        Partial<kOwn> sum;
        whole_step(sum, c, ends_item(c), fresh, take, loader);
        end_step(&sum);
      }
    } else {
      // Each round takes keys or values, and lets the ring be filled at one place: code that an SM runs once has to be short, since all
      // kernels of a layer share the instruction cache.
#pragma unroll 1
      for (int half = -Shape::kDepth; left > 0; half++) {
        const bool of_values = half & 1;
        if (half >= 0) {
          if (!of_values) begin_step();
          const bool sees = c.sees(warp), writes = ends_item(c) && New::is_in(a, c, warp), fetches = New::are_in(a, c);
          if (fetches && !of_values) {
            fresh.leave(c, sums);
            Team::sync();
          }
          const uint32_t tile = take();
          if (!of_values && place_in_chunk(c) == 0) chunk.clear();
          if (sees) {
            if (writes) fresh.put(a, c, tile, of_values);
            if (fetches) New::fetch(c, warp, sums, tile, of_values);
            if (!of_values) {
              softmax(chunk.max, chunk.sum, weights, tile, c, warp, [&](int h, float before) {
                if (place_in_chunk(c) == 0) return;
#pragma unroll
                for (int i = 0; i < Shape::kTiles; i++) chunk.o[i][h] *= before, chunk.o[i][h + 2] *= before;
              });
            } else {
              if (kCanBeSick && rows_of(c) > 1) mend(chunk.sum, tile, c, warp);
#pragma unroll
              for (int i = 0; i < Shape::kTiles; i += 2)
                weigh_two<D, FP8, kBF>(*reinterpret_cast<float (*)[2][4]>(&chunk.o[i]), i, tile, weights, lane);
            }
          }
          __syncwarp();
        }
        loader.next(of_values);
        if (half < 0 || !of_values) continue;
        if (New::are_in(a, c)) Team::sync();
        end_step(nullptr);
      }
    }
    if (!waited) grid_wait();
    if (stretch.padded) clear_padding();
  }

 private:
  // Where results or queries begin in shared memory: behind the rings, the block's or this warp's own.
  __device__ __forceinline__ static int scratch_at(const AttentionDecodeArgs& args) {
    return Shape::kRing + (kAlone ? WholeBlock::warp() * (scratch_bytes<Team, D>(args.part_heads) / kAttentionWarps) : 0);
  }
  __device__ __forceinline__ int slot_lane() const { return (lane & 3) * 8 + (lane >> 2); }
  __device__ __forceinline__ static bool ends_item(const Cursor& c) { return c.step + 1 == c.span.count; }
  __device__ __forceinline__ static int place_in_chunk(const Cursor& c) { return c.step & ((1 << c.span.chunk_shift()) - 1); }
  __device__ __forceinline__ static int rows_of(const Cursor& c) { return Team::kShares ? c.span.rows() : 1; }
  // An item's queries: column n of the mma is that of head head_of(n) of its part, in its row row_of(n).
  __device__ __forceinline__ int row_of(int n) const { return Team::kShares ? n * a.inverse >> 6 : 0; }
  __device__ __forceinline__ int head_of(int n) const { return n - row_of(n) * a.part_heads; }
  __device__ __forceinline__ bool is_query(const Cursor& c, int n) const { return row_of(n) < rows_of(c) && head_of(n) < head_count(c); }
  __device__ __forceinline__ int columns(const Cursor& c) const { return rows_of(c) * a.part_heads; }
  __device__ __forceinline__ bool has_column(const Cursor& c) const { return 2 * (lane & 3) < columns(c); }
  __device__ __forceinline__ int first_head(const Cursor& c) const { return c.kv_head * (a.heads / a.kv_heads) + c.part * a.part_heads; }
  __device__ __forceinline__ int head_count(const Cursor& c) const {
    return min(a.part_heads, a.heads / a.kv_heads - c.part * a.part_heads);
  }
  // Of a head, D / 16 threads each have eight elements from here on and the eight they are rotated with.
  __device__ __forceinline__ int dimension() const { return Team::thread() % kLanes * 8; }

  __device__ __forceinline__ void load_rows(Rows& rows, const Cursor& c) const {
    load_query(rows.query, c, 0);
    rows.fresh.load(a, c);
  }
  // Of this thread's column, at its dimension; zeros where there is none in this pass.
  __device__ __forceinline__ void load_query(uint4 (&query)[2], const Cursor& c, int pass) const {
    query[0] = query[1] = uint4{};
    const int n = column(pass);
    if (!is_query(c, n)) return;
    const uint16_t* from =
        a.qkv + static_cast<size_t>(c.span.row + row_of(n)) * a.ldqkv + (first_head(c) + head_of(n)) * D + dimension();
    query[0] = *reinterpret_cast<const uint4*>(from), query[1] = *reinterpret_cast<const uint4*>(from + D / 2);
  }
  __device__ __forceinline__ static int column(int pass) { return Team::thread() / kLanes + pass * (Team::kWarps * 32 / kLanes); }

  // Queries into fragments, the new keys and values into the cache's type. `left`: steps of this block.
  __device__ __forceinline__ void start_item(const Rows& rows, New& fresh, Rotation<D, BF>& rotation, const Cursor& c, int left) {
#pragma unroll
    for (int pass = 0; pass < kPasses; pass++) {
      if (pass && pass * (Team::kWarps * 32 / kLanes) >= head_count(c)) break;
      uint4 query[2] = {rows.query[0], rows.query[1]};
      if (pass) load_query(query, c, pass);
      uint4 &low = query[0], &high = query[1];
      if (a.cos_sin) {
        float x[8], y[8];
        unpack8<BF>(x, low);
        unpack8<BF>(y, high);
        rotation.apply(x, y, a.q_norm, a.eps, dimension());
        low = pack8<BF>(x), high = pack8<BF>(y);
      }
      if constexpr (FP8 && BF) {
        float x[8], y[8];
        unpack8<BF>(x, low);
        unpack8<BF>(y, high);
        low = pack8_saturated(x), high = pack8_saturated(y);
      }
      if (is_query(c, column(pass))) {
        const uint32_t to = sums + column(pass) * Shape::kQueryStride + dimension() * 2;
        sts128(to, low);
        sts128(to + D, high);
      }
    }
    if (!kAlone && a.out_index && warp == 0 && lane < head_count(c) * (D / 32)) prefetch_line(a.out_index + first_head(c) * D + lane * 32);
    fresh = rows.fresh;
    if (New::any(a, c)) {
      if constexpr (Team::kShares) rotation.load(a, New::row(c), dimension());
      fresh.prepare(a, c, rotation, c.span.count - c.step <= left);
    }
    Team::sync();
    const uint32_t from = sums + (lane >> 2) * Shape::kQueryStride;
#pragma unroll
    for (int j = 0; j < D / 16; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) q[j][i] = lds32(from + query_dimension<FP8>(j, i, lane) * 2);
    Team::sync();
  }

  // All tiles of a step by one warp: what add_warps() would have found. A loop, to stay in the instruction cache.
  template <typename Take, typename Loader>
  __device__ __forceinline__ void whole_step(Partial<kOwn>& sum, const Cursor& c, bool item_ends, const New& fresh, const Take& take,
                                             Loader& loader) {
    sum.clear();
#pragma unroll 1
    for (int tile = 0; tile < kAttentionWarps; tile++) {
      const bool sees = c.sees(tile), writes = sees && item_ends && New::is_in(a, c, tile);
      uint32_t weights[2][2];
      float of_sum[2], of_tile[2];
      const uint32_t keys = take();
      if (sees) {
        if (writes) fresh.put(a, c, keys, false);
        float max[2] = {-INFINITY, -INFINITY}, tile_sum[2] = {};
        softmax(max, tile_sum, weights, keys, c, tile, [](int, float) {});
#pragma unroll
        for (int h = 0; h < 2; h++) add_sums(sum.max[h], sum.sum[h], max[h], over_tokens(tile_sum[h]), of_sum[h], of_tile[h]);
      }
      __syncwarp();
      loader.next(false);
      const uint32_t values = take();
      if (sees) {
        if (writes) fresh.put(a, c, values, true);
#pragma unroll
        for (int i = 0; i < kOwn; i += 2) {
          float o[2][4] = {};
          weigh_two<D, FP8, kBF>(o, i, values, weights, lane);
#pragma unroll
          for (int k = 0; k < 8; k++) add_values(sum.o[i + k / 4][k % 4], o[k / 4][k % 4], of_sum[k & 1], of_tile[k & 1]);
        }
      }
      __syncwarp();
      loader.next(true);
    }
  }

  __device__ __forceinline__ static float over_tokens(float sum) {
#pragma unroll
    for (int step = 4; step < 32; step <<= 1) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
  }

  // Scores of a tile into weights, as B fragments; maximum and sum so far brought to the new maximum, and through `rescale` the values of a
  // head (of two).
  template <typename Rescale>
  __device__ __forceinline__ void softmax(float (&max_so_far)[2], float (&sum)[2], uint32_t (&weights)[2][2], uint32_t keys,
                                          const Cursor& c, int tile, const Rescale& rescale) {
    float s[2][4] = {};
    scores<D, FP8, kBF>(s, keys, q, lane);
    const int token = c.first_token(tile);
    // By how many tokens the rows' windows and contexts are apart.
    const int apart = rows_of(c) - 1;
    if (token < c.span.low + apart || token + kTileTokens > c.span.length - apart) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        int low = c.span.low, length = c.span.length;
        if constexpr (Team::kShares) length = length_of(c, h), low = low_of(length);
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
          for (int k = h; k < 4; k += 2) {
            const int at = token + (lane >> 2) + 16 * m + 8 * (k >> 1);
            s[m][k] = at >= low && at < length ? s[m][k] : -INFINITY;
          }
      }
    }
    const float scale = a.scale * 1.44269504f;
    float base[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float max = fmaxf(fmaxf(s[0][h], s[0][h + 2]), fmaxf(s[1][h], s[1][h + 2]));
#pragma unroll
      for (int step = 4; step < 32; step <<= 1) max = fmaxf(max, __shfl_xor_sync(~0u, max, step));
      max = fmaxf(max * scale, max_so_far[h]);
      base[h] = finite_or_zero(max);
      const float before = exp2_approx(max_so_far[h] - base[h]);
      sum[h] = __fmul_rn(sum[h], before);  // never one operation with what follows; of nothing: 0 times 0
      rescale(h, before);
      max_so_far[h] = max;
    }
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
      for (int k = 0; k < 4; k++) {
        s[m][k] = exp2_approx(__fmaf_rn(s[m][k], scale, -base[k & 1]));
        sum[k & 1] = __fadd_rn(sum[k & 1], s[m][k]);
      }
      weights[m][0] = transpose8x8(pack2<kBF>(s[m][0], s[m][1]));
      weights[m][1] = transpose8x8(pack2<kBF>(s[m][2], s[m][3]));
    }
  }

  // Of the row that column h of this lane's two belongs to.
  __device__ __forceinline__ int length_of(const Cursor& c, int h) const { return c.span.shortest() + row_of(2 * (lane & 3) + h); }
  __device__ __forceinline__ int low_of(int length) const { return a.window > 0 ? max(0, length - a.window) : 0; }

  // 0 times infinity is no number. Of the tokens that not every row sees, values that are not finite (a wrong draft's, for example) become
  // 0, and the rows that see them get a sum that is no number instead: they would have had no numbers either.
  __device__ __forceinline__ void mend(float (&sum)[2], uint32_t values, const Cursor& c, int tile) const {
    constexpr int kAtOnce = 32 / Shape::kPieces;
    const int first = c.first_token(tile), last = first + kTileTokens;
#pragma unroll 1
    for (int side = 0; side < 2; side++) {  // before the last row's window, behind the first row's context
      const int begin = max(first, side ? max(c.span.shortest(), c.span.low) : c.span.low);
      const int end = min(last, side ? c.span.length : low_of(c.span.length));
#pragma unroll 1
      for (int token = begin; token < end; token += kAtOnce) {
        const int mine = token + lane / Shape::kPieces;
        const uint32_t at = values + ((mine - first) * Shape::kPieces + lane % Shape::kPieces) * 16;
        uint32_t sick = __ballot_sync(~0u, mine < end && not_finite<BF, FP8>(lds128(at)));
        if (!sick) continue;
        if (sick >> (lane & ~(Shape::kPieces - 1)) & (Shape::kPieces == 32 ? ~0u : (1u << Shape::kPieces) - 1)) sts128(at, uint4{});
        for (; sick; sick &= sick - 1) {
          const int which = token + (__ffs(sick) - 1) / Shape::kPieces;
#pragma unroll
          for (int h = 0; h < 2; h++)
            if (which < length_of(c, h) && which >= low_of(length_of(c, h))) sum[h] = __int_as_float(0x7fffffff);
        }
      }
    }
    __syncwarp();
  }

  // The four warps' results; every warp has its quarter of the dimensions. As many columns cross at once as a row by itself has.
  __device__ __forceinline__ Partial<kOwn> add_warps(Partial<Shape::kTiles>& mine, const Cursor& c) {
    const int lanes = head_lanes(a.part_heads), unit = lanes * 16;
#pragma unroll
    for (int h = 0; h < 2; h++) mine.sum[h] = over_tokens(mine.sum[h]);
    if (lane < 4) sts128(maxima + (warp * kPartHeads + 2 * lane) * 8, {mine.max[0], mine.sum[0], mine.max[1], mine.sum[1]});
    Partial<kOwn> sum;
    sum.clear();
#pragma unroll 1
    for (int begin = 0; begin == 0 || (Team::kShares && begin < head_lanes(columns(c))); begin += lanes) {
      const bool crosses = slot_lane() >= begin && slot_lane() < begin + lanes;
      const uint32_t at = sums + (slot_lane() - begin) * 16;
      if (crosses)
#pragma unroll
        for (int i = 0; i < Shape::kTiles; i++) sts128(at + (warp * Shape::kTiles + i) * unit, mine.o[i]);
      Team::sync();
      if (crosses)
#pragma unroll
        for (int w = 0; w < kAttentionWarps; w++) {
          const uint4 raw = lds128(maxima + (w * kPartHeads + 2 * (lane & 3)) * 8);
          float of_sum[2], of_warp[2];
          add_sums(sum.max[0], sum.sum[0], __uint_as_float(raw.x), __uint_as_float(raw.y), of_sum[0], of_warp[0]);
          add_sums(sum.max[1], sum.sum[1], __uint_as_float(raw.z), __uint_as_float(raw.w), of_sum[1], of_warp[1]);
#pragma unroll
          for (int i = 0; i < kOwn; i++) {
            const uint4 v = lds128(at + (w * Shape::kTiles + warp * kOwn + i) * unit);
            const float o[4] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
#pragma unroll
            for (int k = 0; k < 4; k++) add_values(sum.o[i][k], o[k], of_sum[k & 1], of_warp[k & 1]);
          }
        }
      Team::sync();
    }
    return sum;
  }

  // ---- chunks in the workspace: every thread reads back what its like has written ----
  __device__ __forceinline__ float4* slot(int index) const {
    return static_cast<float4*>(a.workspace) + static_cast<size_t>(index) * (slot_floats(D, most_columns()) / 4);
  }
  __device__ __forceinline__ int most_columns() const { return (Team::kShares ? a.group_rows : 1) * a.part_heads; }
  __device__ __forceinline__ int place(int i) const { return (warp * kOwn + i) * head_lanes(most_columns()) + slot_lane(); }
  __device__ __forceinline__ int top_place() const { return Shape::kTiles * head_lanes(most_columns()) + warp * 4 + (lane & 3); }

  __device__ __forceinline__ void store(const Partial<kOwn>& sum, int index, const Cursor& c) {
    const auto put = [&](float4* to, float x, float y, float z, float w) {
      const auto real = [](float v) { return __float_as_uint(v) == kEmpty ? __uint_as_float(0x7fffffffu) : v; };
      store_exchanged(to, make_float4(real(x), real(y), real(z), real(w)));
    };
    if (!has_column(c)) return;
#pragma unroll
    for (int i = 0; i < kOwn; i++) put(slot(index) + place(i), sum.o[i][0], sum.o[i][1], sum.o[i][2], sum.o[i][3]);
    if (lane < 4) put(slot(index) + top_place(), sum.max[0], sum.sum[0], sum.max[1], sum.sum[1]);
  }

  // total += the item's chunks from `begin` on, which other blocks leave in the workspace; it is empty again afterwards.
  __device__ __forceinline__ void add_later(Partial<kOwn>& total, const Cursor& c, int begin, const Cuts& cuts) {
    const int chunks = c.span.chunks(), shift = c.span.chunk_shift();
    const int stretch = cuts.stretch_of(c.origin + (min(lane, chunks - 1) << shift));
    const int its_first = (cuts.at(stretch) - c.origin + (1 << shift) - 1) >> shift, index = stretch * kMaxChunks + lane - its_first;
    constexpr int kAtOnce = kAlone ? 1 : 4;
#pragma unroll 1
    for (int chunk = begin; chunk < chunks; chunk += kAtOnce) {
      float4* from[kAtOnce];
      float4 top[kAtOnce], o[kAtOnce][kOwn];
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) from[k] = slot(__shfl_sync(~0u, index, min(chunk + k, chunks - 1)));
      bool there;
      do {
        there = true;
        if (has_column(c)) {
#pragma unroll
          for (int k = 0; k < kAtOnce; k++) {
            top[k] = load_exchanged(from[k] + top_place());
#pragma unroll
            for (int i = 0; i < kOwn; i++) o[k][i] = load_exchanged(from[k] + place(i));
          }
#pragma unroll
          for (int k = 0; k < kAtOnce; k++) {
            there &= is_there(top[k]);
#pragma unroll
            for (int i = 0; i < kOwn; i++) there &= is_there(o[k][i]);
          }
        }
      } while (!__all_sync(~0u, there));
      const float4 empty = make_float4(__uint_as_float(kEmpty), __uint_as_float(kEmpty), __uint_as_float(kEmpty), __uint_as_float(kEmpty));
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) {
        if (chunk + k >= chunks || !has_column(c)) continue;
        if (lane < 4) store_exchanged(from[k] + top_place(), empty);
        Partial<kOwn> next;
        next.max[0] = top[k].x, next.sum[0] = top[k].y, next.max[1] = top[k].z, next.sum[1] = top[k].w;
#pragma unroll
        for (int i = 0; i < kOwn; i++) {
          store_exchanged(from[k] + place(i), empty);
          next.o[i][0] = o[k][i].x, next.o[i][1] = o[k][i].y, next.o[i][2] = o[k][i].z, next.o[i][3] = o[k][i].w;
        }
        add(total, next);
      }
    }
  }

  __device__ __forceinline__ void write(const Partial<kOwn>& total, const Cursor& c) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int n = 2 * (lane & 3) + h, at = (first_head(c) + head_of(n)) * D + output_dimension<FP8>(warp * kOwn, 0, lane);
      if (!is_query(c, n)) continue;
      uint16_t* out = a.out + static_cast<size_t>(c.span.row + row_of(n)) * a.ldo;
      const float scale = 1.f / total.sum[h];
      // + 0: whether a sum that is 0 has been -0 depends on the steps that others see.
      const auto put = [&](auto place) {
#pragma unroll
        for (int i = 0; i < kOwn; i++)
#pragma unroll
          for (int k = h; k < 4; k += 2)
            out[place(at + output_dimension<FP8>(i, k, 0))] = to_16bit<BF>(__fmaf_rn(total.o[i][k], scale, 0.f));
      };
      if (!kAlone && a.out_index) put([&](int at) { return a.out_index[at]; });
      else put([](int at) { return at; });
    }
  }

  // Rows that only fill up a batch: what comes after must find numbers.
  __device__ __forceinline__ void clear_padding() {
    for (int s = Team::index(); s < a.sequences; s += Team::count()) {
      if (!is_padding(a, s)) continue;
      uint16_t* out = a.out + static_cast<size_t>(a.query_start[s]) * a.ldo;
      for (int i = Team::thread(); i < a.heads * D; i += Team::kWarps * 32) out[i] = 0;
    }
  }
};

template <class Team, int D, bool BF, bool FP8>
__global__ void __maxnreg__(kAttentionRegisters) attention_decode_kernel(const __grid_constant__ AttentionDecodeArgs a) {
  extern __shared__ __align__(128) uint8_t smem[];
  grid_launch_dependents();
  AttentionBlock<Team, D, BF, FP8>(a, smem).run();
}

template <bool BF>
const void* attention_decode_of(int head_dim, bool fp8, AttendedBy by) {
  const auto of = [](auto kernel) { return reinterpret_cast<const void*>(kernel); };
  const auto pick = [&](auto d) {
    constexpr int D = decltype(d)::value;
    const auto of_team = [&](auto team) {
      using Team = decltype(team);
      return of(fp8 ? attention_decode_kernel<Team, D, BF, true> : attention_decode_kernel<Team, D, BF, false>);
    };
    return by == AttendedBy::kWarp ? of_team(OneWarp{}) : by == AttendedBy::kBlock ? of_team(WholeBlock{}) : of_team(SharingBlock{});
  };
  if (head_dim == 64) return pick(std::integral_constant<int, 64>{});
  return head_dim == 128 ? pick(std::integral_constant<int, 128>{}) : nullptr;
}

}  // namespace gptq
