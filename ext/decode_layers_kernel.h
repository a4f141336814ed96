// All layers of a decode step in one launch: a block on every multiprocessor, in which
//
//   1 warp   streams weights, product after product and layer after layer, as fast as slots of the ring become free: it waits for nobody's
//            results, so memory works while everything else waits;
//   8 warps  take the input of a product (with RMSNorm before qkv and gate_up) and multiply, a chunk of a pair of strips each;
//   1 warp   adds their sums, applies bias, SiLU and residual and stores;
//   4 warps  attend (attention_decode_kernel.h).
//
// Blocks need each other's results five times a layer. There are no barriers over the grid, no flags and no fences: a result is its own flag. A
// layer's results have a place of their own, in which 0xffff, a NaN that no rounding makes, says "not yet"; whoever needs a word reads it until it
// is there. A place is emptied again two layers later, when everybody has gone on, and the last two at the beginning of the next launch.
//
// Every block takes an equal stretch of a product's (pair of strips, chunk) units, so pairs are cut between blocks: whoever has a pair's end
// does that first and leaves its sums to the one who has its beginning, which comes to it last and adds in the order of k. What is cut where depends
// on the shape and the device, never on M: a row's bits do not depend on who else is in the batch.
//
// All blocks have to be resident at a time. Two launches on streams of their own could each hold a part of the device and wait forever.
#pragma once
#include "attention_decode_kernel.h"
#include "decode_layers.h"
#include "decode_parts.h"

namespace gptq {

constexpr int kLayerWarps = 8;   // that multiply
constexpr int kFeedWarp = kLayerWarps, kFinishWarp = kFeedWarp + 1, kAttendWarp = kFeedWarp + 4;  // a warpgroup of its own: two warps leave
constexpr int kLayersThreads = (kAttendWarp + kAttentionWarps) * 32;
constexpr int kMathRegisters = 104, kFewRegisters = 72, kManyRegisters = 232;  // of warps that multiply, feed or finish, attend: 512 in all
constexpr int kLayersMaxDepth = 12, kLayersBuffers = 2;
constexpr int kLayersHead = 128;  // head_dim
constexpr uint32_t kNotYet = 0xffffffffu;
// Barriers, at the start of shared memory; behind them the attention's arguments.
constexpr int kLayersFull = 0, kLayersFree = kLayersFull + kLayersMaxDepth, kLayersSent = kLayersFree + kLayersMaxDepth;
constexpr int kLayersRead = kLayersSent + kLayersBuffers, kLayersGo = kLayersRead + kLayersBuffers, kLayersBarriers = kLayersGo + 1;
constexpr int kLayersArgs = (kLayersBarriers * 8 + 15) / 16 * 16;

// What the warps that attend are to AttentionBlock.
struct LayerTeam {
  static constexpr int kDepth = 2;
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x) - kAttendWarp * 32; }
  static __device__ __forceinline__ void sync() { asm volatile("bar.sync 2, %0;" ::"n"(kAttentionThreads) : "memory"); }
  static __device__ __forceinline__ bool any(bool mine) {
    int found;
    asm volatile("{\n.reg .pred p, q;\nsetp.ne.s32 p, %1, 0;\nbar.red.or.pred q, 2, %2, p;\nselp.s32 %0, 1, 0, q;\n}\n"
                 : "=r"(found)
                 : "r"(static_cast<int>(mine)), "n"(kAttentionThreads)
                 : "memory");
    return found;
  }
  static __device__ __forceinline__ uint4 load(const uint16_t* from);
};
using LayerAttention = AttentionShape<kLayersHead, false, kSmall, LayerTeam::kDepth>;

constexpr int layers_attention_smem(int part_heads) {
  return AttentionShape<kLayersHead, false, false, LayerTeam::kDepth>::kRing + exchange_bytes<kLayersHead>(part_heads) + kAttentionWarps * kPartHeads * 8 + 64;
}

// `widest`: of the inputs of o and down.
inline LayersPlan plan_layers(int M, int hidden, int widest, int depth, int chunk, int groups, int part_heads, bool ordered) {
  const auto up = [](int bytes) { return (bytes + 127) / 128 * 128; };
  const auto chunks = [](int k) { return (k + kChunkK - 1) / kChunkK; };
  LayersPlan p = {};
  p.depth = depth;
  p.red_lanes = 8 * ((M + 1) / 2), p.tasks = kPair * p.red_lanes;
  p.normed_stride = chunks(hidden) * kChunkK + 8, p.x_stride = chunks(widest) * kChunkK + 8, p.raw_stride = hidden + 8;
  p.ring = up(kLayersArgs + static_cast<int>(sizeof(AttentionDecodeArgs)));
  p.normed = p.ring + depth * kPair * kLayerWarps * chunk;
  p.x = up(p.normed + 2 * M * p.normed_stride);
  p.raw = up(p.x + std::max(2 * M * p.x_stride, layers_attention_smem(part_heads)));  // keys and values come where x of down has been
  p.sums[0] = up(p.raw + (ordered ? 2 * M * p.raw_stride : 0));
  p.sums[1] = p.sums[0] + chunks(hidden) * groups * 32;
  p.red = up(p.sums[1] + chunks(widest) * groups * 32);
  p.norms = p.red + kLayersBuffers * kLayerWarps * p.tasks * 16;
  p.total = p.norms + kLayersMaxM * kLayerWarps * 4;
  return p;
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint4 load_relaxed(const void* from) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
  return v;
}
__device__ __forceinline__ uint16_t load_relaxed16(const uint16_t* from) {
  uint16_t v;
  asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(v) : "l"(from) : "memory");
  return v;
}
__device__ __forceinline__ void store_relaxed(void* to, const uint4& v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_relaxed16(uint16_t* to, uint16_t v) { asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to), "h"(v) : "memory"); }
// Whether one of the two halves of a word is 0xffff.
__device__ __forceinline__ uint32_t missing(uint32_t w) { return (~w - 0x00010001u) & w & 0x80008000u; }
__device__ __forceinline__ bool is_there(const uint4& v) { return (missing(v.x) | missing(v.y) | missing(v.z) | missing(v.w)) == 0; }

__device__ __forceinline__ uint4 LayerTeam::load(const uint16_t* from) {
  uint4 v;
  do v = load_relaxed(from);
  while (!is_there(v));
  return v;
}

// This block's units of a product, as pieces of pairs.
struct Pieces {
  int pair, from, length;  // the piece: chunks from .. from + length - 1 of a pair
  int left;                // units after it

  __device__ __forceinline__ static int cut(const LayerProduct& p, int block) { return block * p.units + min(block, p.spare); }
  __device__ __forceinline__ Pieces(const LayerProduct& p, int block) {
    const int begin = cut(p, block), count = cut(p, block + 1) - begin;
    pair = begin / p.chunks, from = begin - pair * p.chunks;
    length = min(count, p.chunks - from), left = count - length;
  }
  __device__ __forceinline__ int count() const { return length + left; }  // of the first piece
  __device__ __forceinline__ void next(const LayerProduct& p) { pair++, from = 0, length = min(left, p.chunks), left -= length; }
};

template <int G, bool ZP, bool BF>
class LayersBlock {
  using Attention = AttentionBlock<LayerTeam, kLayersHead, BF, false>;
  static constexpr int kChunk = Chunk<G, ZP>::kBytes, kHalf = kLayerWarps * kChunk, kSlot = kPair * kHalf;
  static constexpr int kAtOnce = 8;  // reads of 16 bytes that a thread has under way
  const DecodeLayersArgs& a;
  uint8_t* const smem;
  const uint32_t base, full, free, sent, read, go;
  const int warp, lane;

 public:
  __device__ __forceinline__ LayersBlock(const DecodeLayersArgs& args, uint8_t* shared)
      : a(args),
        smem(shared),
        base(smem_addr(shared)),
        full(base + 8 * kLayersFull),
        free(base + 8 * kLayersFree),
        sent(base + 8 * kLayersSent),
        read(base + 8 * kLayersRead),
        go(base + 8 * kLayersGo),
        warp(__shfl_sync(~0u, threadIdx.x >> 5, 0)),
        lane(threadIdx.x & 31) {}

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < a.plan.depth; i++) mbar_init(full + 8 * i, 1), mbar_init(free + 8 * i, kLayerWarps);
      for (int i = 0; i < kLayersBuffers; i++) mbar_init(sent + 8 * i, kLayerWarps), mbar_init(read + 8 * i, 1);
      mbar_init(go, 1);
      mbar_init_fence();
    }
    __syncthreads();
    if (warp < kLayerWarps) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kMathRegisters));
      multiply_all();
    } else if (warp < kAttendWarp) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kFewRegisters));
      if (warp == kFeedWarp) feed();
      else if (warp == kFinishWarp) finish_all();
    } else {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kManyRegisters));
      attend();
    }
  }

 private:
  __device__ __forceinline__ uint16_t* place(int layer, int element) const {
    return a.exchange + static_cast<size_t>(layer) * a.exchange_row * kLayersMaxM + static_cast<size_t>(element) * a.M;
  }

  // ---- weights -------------------------------------------------------------------------------------------------------------------
  __device__ __forceinline__ void feed() {
    int slot = 0;
    uint32_t phase = 1;  // the ring is free
#pragma unroll 1
    for (int layer = 0; layer < a.layers; layer++)
#pragma unroll 1
      for (int k = 0; k < 4; k++) {
        const LayerProduct& p = a.product[k];
        const Pieces piece(p, blockIdx.x);
        const uint8_t* src = a.weights[layer * 4 + k] + (static_cast<size_t>(2 * piece.pair) * p.chunks + piece.from) * kChunk;
        const size_t apart = static_cast<size_t>(p.chunks) * kChunk;
        int in_piece = piece.length, rest = piece.count();
        while (rest > 0) {
          mbar_wait(free + 8 * slot, phase);
          int now = min(kLayerWarps, rest);
          rest -= now;
          const uint32_t bar = full + 8 * slot;
          uint32_t dst = base + a.plan.ring + slot * kSlot;
          if (elect()) mbar_expect(bar, kPair * now * kChunk);
          while (now > 0) {
            const int part = min(now, in_piece);
            if (elect()) {
              bulk_load(dst, src, part * kChunk, bar);
              bulk_load(dst + kHalf, src + apart, part * kChunk, bar);
            }
            now -= part, in_piece -= part, dst += part * kChunk, src += part * kChunk;
            if (in_piece == 0) in_piece = p.chunks, src += apart;  // behind this pair's second strip
          }
          if (++slot == a.plan.depth) slot = 0, phase ^= 1;
        }
      }
  }

  // ---- products ------------------------------------------------------------------------------------------------------------------
  __device__ __forceinline__ static void math_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kLayerWarps * 32) : "memory"); }

  // Minus the sum of x that goes with the zero points, in the scale of expand(), from the sum of eight neighbours in every lane.
  __device__ __forceinline__ void leave_sum(float sum, uint32_t sums, int vector, int m, bool valid) {
    constexpr float kScale = BF ? (ZP ? -1.f : -136.f) : (ZP ? -1.f / 16777216.f : -8.f / 16777216.f);
    constexpr int kLanes = kChunkK / 8 / G;
#pragma unroll
    for (int step = 1; step < kLanes; step <<= 1) sum += __shfl_xor_sync(~0u, sum, step);
    if (valid && lane % kLanes == 0) sts32(sums + (vector / kLanes * 8 + m) * 4, sum * kScale);
  }
  __device__ __forceinline__ static float sum_of(const float (&v)[8]) {
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
  }

  // The first vector of a warp is asked for until it is there, so that waiting costs little of the L2; then everybody for his own.
  template <int U>
  __device__ __forceinline__ void take(uint4 (&v)[U], const uint16_t* (&from)[U], bool check) {
#pragma unroll
    for (int i = 0; i < U; i++) v[i] = from[i] ? load_relaxed(from[i]) : uint4{};
    if (!check) return;
#pragma unroll
    for (int i = 0; i < U; i++)
      if (from[i])
        while (!is_there(v[i])) v[i] = load_relaxed(from[i]);
  }
  __device__ __forceinline__ void await(const uint16_t* from) {
    if (lane == 0)
      while (!is_there(load_relaxed(from))) {}
    __syncwarp();
  }

  __device__ __forceinline__ void stage_plain(const uint16_t* src, int K, int chunks, uint32_t x, int stride, uint32_t sums) {
    const int per_row = chunks * (kChunkK / 8), total = a.M * per_row;
    await(src + min(static_cast<int>(threadIdx.x), K / 8 - 1) * 8);
#pragma unroll 1
    for (int first = threadIdx.x; first - lane < total; first += kLayerWarps * 32 * kAtOnce) {
      uint4 v[kAtOnce];
      const uint16_t* from[kAtOnce];
      int column[kAtOnce], row[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        column[i] = first + i * kLayerWarps * 32, row[i] = 0;
        const bool valid = column[i] < total;
#pragma unroll
        for (int m = 1; m < kLayersMaxM; m++)
          if (valid && column[i] >= per_row) column[i] -= per_row, row[i]++;
        from[i] = valid && column[i] * 8 < K ? src + row[i] * K + column[i] * 8 : nullptr;
      }
      take(v, from, true);
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        const int at = first + i * kLayerWarps * 32;
        if (at - lane >= total) break;
        const bool valid = at < total;
        float e[8];
        unpack8<BF>(e, v[i]);
        if (valid) sts128(x + (row[i] * stride + column[i] * 8) * 2, v[i]);
        leave_sum(sum_of(e), sums, column[i], row[i], valid);
      }
    }
  }

  // RMSNorm(src) * weight in the order of `order`, rounded to the activations' type.
  __device__ __forceinline__ void stage_normed(const uint16_t* src, int ld, bool check, int layer, int which, uint32_t x, uint32_t sums) {
    constexpr int kVectors = kLayersMaxHidden / 8 / (kLayerWarps * 32);
    const int K = a.product[0].K, padded = a.product[0].chunks * kChunkK, stride = a.plan.normed_stride;
    const size_t at = (static_cast<size_t>(layer) * 2 + which) * K;
    uint4 weight[kVectors], order[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; j++) {
      const int k = (threadIdx.x + j * kLayerWarps * 32) * 8;
      weight[j] = k < K ? *reinterpret_cast<const uint4*>(a.norms + at + k) : uint4{};
      order[j] = a.orders && k < K ? *reinterpret_cast<const uint4*>(a.orders + at + k) : uint4{};
    }
    const uint32_t raw = base + (a.orders ? a.plan.raw : a.plan.normed), norms = base + a.plan.norms;
    const int raw_stride = a.orders ? a.plan.raw_stride : stride;
    if (check) await(src + min(static_cast<int>(threadIdx.x), K / 8 - 1) * 8);
#pragma unroll 1
    for (int m = 0; m < a.M; m++) {
      uint4 v[kVectors];
      const uint16_t* from[kVectors];
#pragma unroll
      for (int j = 0; j < kVectors; j++) {
        const int k = (threadIdx.x + j * kLayerWarps * 32) * 8;
        from[j] = k < K ? src + static_cast<size_t>(m) * ld + k : nullptr;
      }
      take(v, from, check);
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kVectors; j++) {
        const int k = (threadIdx.x + j * kLayerWarps * 32) * 8;
        float e[8];
        unpack8<BF>(e, v[j]);
#pragma unroll
        for (int i = 0; i < 8; i++) sum = __fmaf_rn(e[i], e[i], sum);
        if (k < K) sts128(raw + (m * raw_stride + k) * 2, v[j]);
      }
#pragma unroll
      for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane == 0) sts32(norms + (m * kLayerWarps + warp) * 4, sum);
    }
    math_sync();
#pragma unroll 1
    for (int m = 0; m < a.M; m++) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kLayerWarps; w++) sum += __uint_as_float(lds32(norms + (m * kLayerWarps + w) * 4));
      const float scale = rsqrtf(sum / static_cast<float>(K) + a.eps);
#pragma unroll
      for (int j = 0; j < kVectors; j++) {
        const int vector = threadIdx.x + j * kLayerWarps * 32, k = vector * 8;
        if (k - lane * 8 >= padded) break;
        uint4 v = {};
        if (k < K) {
          const uint32_t row = raw + m * raw_stride * 2;
          if (a.orders) {
            const auto two = [&](uint32_t i) { return lds16(row + (i & 0xffff) * 2) | lds16(row + (i >> 16) * 2) << 16; };
            v = make_uint4(two(order[j].x), two(order[j].y), two(order[j].z), two(order[j].w));
          } else {
            v = lds128(row + k * 2);
          }
        }
        float e[8], w[8];
        unpack8<BF>(e, v);
        unpack8<BF>(w, weight[j]);
#pragma unroll
        for (int i = 0; i < 8; i++) e[i] = e[i] * scale * w[i];
        v = pack8<BF>(e);
        unpack8<BF>(e, v);
        if (k < padded) sts128(x + (m * stride + k) * 2, v);
        leave_sum(sum_of(e), sums, vector, m, k < padded);
      }
    }
  }

  __device__ __forceinline__ void multiply_all() {
    grid_wait();
    const uint32_t lane_slot = ((lane & 3) * 8 + (lane >> 2)) * 16;
    const bool has_token = (lane & 3) * 8 < a.plan.red_lanes;
    const int set = a.plan.tasks * 16;
    const uint32_t chunk_first = base + a.plan.ring + warp * kChunk;
    uint32_t phase = 0, round = 1, chunk = chunk_first;
    int slot = 0, buffer = 0;
    const auto next_slot = [&] {
      __syncwarp();
      if (lane == 0) mbar_arrive(free + 8 * slot);
      slot++, chunk += kSlot;
      if (slot == a.plan.depth) slot = 0, phase ^= 1, chunk = chunk_first;
    };
#pragma unroll 1
    for (int layer = 0; layer < a.layers; layer++)
#pragma unroll 1
      for (int k = 0; k < 4; k++) {
        const LayerProduct& p = a.product[k];
        const bool normed = k % 2 == 0;
        const uint32_t x = base + (normed ? a.plan.normed : a.plan.x), sums = base + a.plan.sums[normed ? 0 : 1];
        const int stride = normed ? a.plan.normed_stride : a.plan.x_stride;
        if (k == 0) stage_normed(layer ? place(layer - 1, a.product[3].out) : a.x, layer ? p.K : a.ldx, layer > 0, layer, 0, x, sums);
        else if (k == 2) stage_normed(place(layer, a.product[1].out), p.K, true, layer, 1, x, sums);
        else stage_plain(place(layer, k == 1 ? a.attended : a.product[2].out), p.K, p.chunks, x, stride, sums);
        math_sync();
        if (k == 0 && threadIdx.x == 0) mbar_arrive(go);  // all have done with x of the layer before

        const uint32_t x_lane = x + min(lane & 7, a.M - 1) * stride * 2 + (lane >> 3) * 16;
        float acc[kPair][1][4] = {};
        Pieces piece(p, blockIdx.x);
        const int count = piece.count();
        int at = warp;
#pragma unroll 1
        for (; piece.length > 0; piece.next(p)) {
#pragma unroll 1
          for (; at < piece.length; at += kLayerWarps) {
            const int c = piece.from + at;
            mbar_wait(full + 8 * slot, phase);
            const auto load_x = [&](int, int u, uint32_t(&b)[4]) { ldmatrix_x4(b, x_lane + c * (kChunkK * 2) + u * 64); };
            chunk_mma<kPair, 1, G, ZP, BF, Sums::kFind>(acc, chunk, kHalf, sums + c * (G * 32), lane, load_x);
            next_slot();
          }
          at -= piece.length;
          mbar_wait(read + 8 * buffer, round);
          const uint32_t dst = base + a.plan.red + (buffer * kLayerWarps + warp) * set + lane_slot;
#pragma unroll
          for (int i = 0; i < kPair; i++)
            if (has_token) sts128(dst + i * a.plan.red_lanes * 16, acc[i][0]);
          __syncwarp();
          if (lane == 0) mbar_arrive(sent + 8 * buffer);
#pragma unroll
          for (int i = 0; i < kPair * 4; i++) acc[i / 4][0][i % 4] = 0.f;
          if (++buffer == kLayersBuffers) buffer = 0, round ^= 1;
        }
        if (count % kLayerWarps && warp >= count % kLayerWarps) {  // nothing for this warp in the last slot
          mbar_wait(full + 8 * slot, phase);
          next_slot();
        }
      }
  }

  // ---- sums, and what becomes of them -------------------------------------------------------------------------------------------------
  // This block's share of a layer's places for so many rows.
  __device__ __forceinline__ void empty(int layer, int rows) {
    const int vectors = a.exchange_row * rows / 8;
    const uint4 nothing = make_uint4(kNotYet, kNotYet, kNotYet, kNotYet);
    for (int i = blockIdx.x * 32 + lane; i < vectors; i += gridDim.x * 32) store_relaxed(place(layer, 0) + static_cast<size_t>(i) * 8, nothing);
  }
  __device__ __forceinline__ float4* partial(int layer, int k, int block) const {
    return a.partials + (static_cast<size_t>((layer & 1) * 4 + k) * gridDim.x + block) * (kPair * 8 * kLayersMaxM / 2) + lane;
  }

  __device__ __forceinline__ void finish_all() {
    grid_wait();
    for (int layer = max(0, a.layers - 2); layer < a.layers; layer++) empty(layer, kLayersMaxM);  // the last launch may have had more
    __threadfence();
    const int strip_of_pair = lane >= a.plan.red_lanes, in_strip = lane - strip_of_pair * a.plan.red_lanes;
    const int g = in_strip & 7, token = (in_strip >> 3) * 2, set = a.plan.tasks * 16;
    const bool works = lane < a.plan.tasks;
    int buffer = 0;
    uint32_t phase = 0;
#pragma unroll 1
    for (int layer = 0; layer < a.layers; layer++)
#pragma unroll 1
      for (int k = 0; k < 4; k++) {
        const LayerProduct& p = a.product[k];
        const bool paired = k == 2, last = layer == a.layers - 1 && k == 3;
        uint16_t* y = last ? a.x : place(layer, p.out);
        const uint16_t* add = k == 1 ? (layer ? place(layer - 1, a.product[3].out) : a.x) : k == 3 ? place(layer, a.product[1].out) : nullptr;
        const int ldy = last ? a.ldx : p.width, ld_add = k == 1 && layer == 0 ? a.ldx : p.width;
        const uint16_t* bias = a.bias ? a.bias + static_cast<size_t>(layer) * (a.product[3].bias + a.product[3].N) + p.bias : nullptr;
#pragma unroll 1
        for (Pieces piece(p, blockIdx.x); piece.length > 0; piece.next(p)) {
          const int strip = 2 * piece.pair + strip_of_pair, r0 = paired ? strip * 8 + g : strip * kStripRows + g, r1 = paired ? p.N / 2 + r0 : r0 + 8;
          const bool owner = piece.from == 0;
          uint16_t residual[4] = {};
          float of_bias[2] = {};
          if (owner && works) {
            if (add)
#pragma unroll
              for (int i = 0; i < 4; i++)
                if (token + (i & 1) < a.M) residual[i] = load_relaxed16(add + static_cast<size_t>(token + (i & 1)) * ld_add + (i < 2 ? r0 : r1));
            if (bias) of_bias[0] = from_16bit<BF>(bias[r0]), of_bias[1] = from_16bit<BF>(bias[r1]);
          }
          mbar_wait(sent + 8 * buffer, phase);
          float v[4] = {};
          if (works) {
            const uint32_t from = base + a.plan.red + buffer * kLayerWarps * set + lane * 16;
#pragma unroll
            for (int w = 0; w < kLayerWarps; w++) {
              const uint4 f = lds128(from + w * set);
              v[0] += __uint_as_float(f.x), v[1] += __uint_as_float(f.y), v[2] += __uint_as_float(f.z), v[3] += __uint_as_float(f.w);
            }
          }
          __syncwarp();
          if (lane == 0) mbar_arrive(read + 8 * buffer);
          if (++buffer == kLayersBuffers) buffer = 0, phase ^= 1;
          if (!works) continue;
          if (!owner) {
            const auto real = [](float f) { return __float_as_uint(f) == kEmpty ? __uint_as_float(0x7fffffffu) : f; };
            store_exchanged(partial(layer, k, blockIdx.x), make_float4(real(v[0]), real(v[1]), real(v[2]), real(v[3])));
            continue;
          }
          // The rest of the pair, from the blocks that follow.
          const int end = (piece.pair + 1) * p.chunks;
#pragma unroll 1
          for (int block = blockIdx.x + 1; Pieces::cut(p, block) < end; block++) {
            float4* from = partial(layer, k, block);
            float4 f;
            do f = load_exchanged(from);
            while (!is_there(f));
            const float none = __uint_as_float(kEmpty);
            store_exchanged(from, make_float4(none, none, none, none));
            v[0] += f.x, v[1] += f.y, v[2] += f.z, v[3] += f.w;
          }
          using O = Offset<BF, false>;
#pragma unroll
          for (int i = 0; i < 4; i++) v[i] = v[i] * (i < 2 ? O::kUnscaleG : O::kUnscaleG8) + of_bias[i / 2];
#pragma unroll
          for (int i = 0; i < 2; i++) {
            if (token + i >= a.M) continue;
            uint16_t* to = y + static_cast<size_t>(token + i) * ldy;
            if (paired) {
              store_relaxed16(to + r0, to_16bit<BF>(__fdividef(v[i], 1.f + __expf(-v[i])) * v[2 + i]));
            } else {
              store_relaxed16(to + r0, to_16bit<BF>(v[i] + from_16bit<BF>(residual[i])));
              store_relaxed16(to + r1, to_16bit<BF>(v[2 + i] + from_16bit<BF>(residual[2 + i])));
            }
          }
        }
        // This block has seen all of the layer before: nobody reads the one before that any more.
        if (k == 0 && layer >= 2) empty(layer - 2, a.M);
      }
  }

  // ---- attention -------------------------------------------------------------------------------------------------------------------
  __device__ __forceinline__ void attend() {
    grid_wait();
    AttentionDecodeArgs& shared = *reinterpret_cast<AttentionDecodeArgs*>(smem + kLayersArgs);
#pragma unroll 1
    for (int layer = 0; layer < a.layers; layer++) {
      LayerTeam::sync();
      if (LayerTeam::thread() == 0) {
        if (layer == 0) shared = a.attention;
        shared.qkv = place(layer, a.product[0].out), shared.ldqkv = a.product[0].width;
        shared.out = place(layer, a.attended), shared.ldo = a.product[1].K;
        shared.cache = const_cast<uint8_t*>(a.caches[layer]);
        shared.out_index = a.out_index ? a.out_index + static_cast<size_t>(layer) * a.product[1].K : nullptr;
        if (a.head_norms) {
          shared.q_norm = a.head_norms + static_cast<size_t>(layer) * 2 * kLayersHead;
          shared.k_norm = shared.q_norm + kLayersHead;
        }
        shared.window = a.windows[layer];
        shared.workspace = static_cast<uint8_t*>(a.attention.workspace) + (layer & 1 ? a.workspace_half : 0);
      }
      LayerTeam::sync();
      for (int row = blockIdx.x; row < a.M; row += gridDim.x) {  // of padding: of no sequence, and asked for all the same
        if (a.attention.context_lens[row] > 0 && a.attention.query_start[row + 1] - a.attention.query_start[row] == 1) continue;
        for (int k = LayerTeam::thread() * 8; k < a.product[1].K; k += kAttentionThreads * 8) store_relaxed(shared.out + static_cast<size_t>(row) * shared.ldo + k, uint4{});
      }
      mbar_wait(go, layer & 1);
      Attention(shared, smem + a.plan.x).run();
    }
  }
};
#endif

template <int G, bool ZP, bool BF>
__global__ void __launch_bounds__(kLayersThreads, 1) decode_layers_kernel(const __grid_constant__ DecodeLayersArgs a) {
  extern __shared__ __align__(128) uint8_t smem[];
#if __CUDA_ARCH__ >= 900
  LayersBlock<G, ZP, BF>(a, smem).run();
#endif
}

}  // namespace gptq
