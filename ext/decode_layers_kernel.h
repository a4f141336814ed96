// All layers of one sequence's decode step in one launch: a block on every multiprocessor, in which
//
//   1 warp   streams weights, product after product and layer after layer, as fast as slots of the ring become free: it waits for nobody's
//            results, so memory works while everything else waits;
//   8 warps  take the input of a product (with RMSNorm before qkv and gate_up) and multiply, a chunk of a pair of strips each;
//   2 warps  add their sums, apply bias, SiLU and residual and store, a pair of strips in turn;
//   4 warps  attend (attention_decode_kernel.h).
//
// Blocks need each other's results five times a layer. There are no barriers over the grid, no flags and no fences: a result is its own flag. A
// layer's results have a place of their own, in which 0xffff, a NaN that no rounding makes, says "not yet"; whoever needs a word reads it until it
// is there. A place is emptied again two layers later, when everybody has gone on, and the last two at the beginning of the next launch.
//
// Every block takes an equal stretch of a product's (pair of strips, chunk) units, so pairs are cut between blocks: whoever has a pair's end
// does that first and leaves its sums to the one who has its beginning, which comes to it last and adds them in the order of k.
//
// All blocks have to be resident at a time. Two launches on streams of their own could each hold a part of the device and wait forever.
#pragma once
#include "attention_decode_kernel.h"
#include "decode_layers.h"
#include "decode_parts.h"

namespace gptq {

constexpr int kLayerWarps = 8;   // that multiply: a unit of a slot of the ring each
constexpr int kMathThreads = kLayerWarps * 32;
constexpr int kFeedWarp = kLayerWarps, kFinishWarp = kFeedWarp + 1, kAttendWarp = kFeedWarp + 4;  // a warpgroup of its own: one warp leaves
constexpr int kLayersThreads = (kAttendWarp + kAttentionWarps) * 32;
constexpr int kMathRegisters = 96, kFewRegisters = 72, kManyRegisters = 248;  // of warps that multiply, feed or finish, attend: 512 of two warpgroups, one, one
constexpr int kLayersMaxDepth = 12, kLayersBuffers = 2;
constexpr int kLayersHead = 128;  // head_dim
constexpr int kPairRows = kPair * kStripRows;
constexpr uint32_t kNotYet = 0xffffffffu;
// Barriers, at the start of shared memory; behind them the attention's arguments.
constexpr int kLayersFull = 0, kLayersFree = kLayersFull + kLayersMaxDepth, kLayersSent = kLayersFree + kLayersMaxDepth;
constexpr int kLayersRead = kLayersSent + kLayersBuffers, kLayersGo = kLayersRead + kLayersBuffers, kLayersBarriers = kLayersGo + 1;
constexpr int kLayersArgs = (kLayersBarriers * 8 + 15) / 16 * 16;

// What the warps that attend are to AttentionBlock.
struct LayerTeam {
  static constexpr int kWarps = kAttentionWarps, kDepth = 2;
  static __device__ __forceinline__ int count() { return gridDim.x; }
  static __device__ __forceinline__ int index() { return blockIdx.x; }
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
  template <int U>
  static __device__ __forceinline__ void load(uint4 (&v)[U], const uint16_t* const (&from)[U]);
};

inline LayersPlan plan_layers(const LayerProduct (&product)[4], int depth, int chunk, int groups, int part_heads, bool ordered) {
  const int hidden = product[0].K, attended = product[1].K, widest = std::max(attended, product[3].K);
  const auto up = [](int bytes) { return (bytes + 127) / 128 * 128; };
  const auto chunks = [](int k) { return (k + kChunkK - 1) / kChunkK; };
  LayersPlan p = {};
  p.depth = depth;
  p.norms = (kLayersArgs + static_cast<int>(sizeof(AttentionDecodeArgs)) + 15) / 16 * 16;  // in front, where rounding leaves room
  p.ring = up(p.norms + kLayerWarps * 4);
  p.normed = p.ring + depth * kPair * kLayerWarps * chunk;
  p.x = up(p.normed + chunks(hidden) * kChunkK * 2);
  // Keys and values come where x of down has been; in between, behind x, an order and what is sorted, but for what an idle block's attention may still write to.
  const int of_attention = attention_smem<LayerTeam, kLayersHead, false>(part_heads, false), of_order = ordered ? 2 * hidden : 0, of_raw = ordered ? 2 * std::max(hidden, attended) : 0;
  const int behind = chunks(widest) * kChunkK * 2, largest = std::max(behind, of_attention);
  p.order = p.x + (behind + of_order + of_raw <= of_attention - kScratchInts * 4 ? behind : up(largest));
  p.raw = p.order + of_order;
  p.weight = up(std::max(p.x + largest, p.raw + of_raw));
  p.o_order = p.weight;  // between two norms
  p.sums[0] = up(p.weight + 2 * std::max(hidden, ordered ? attended : 0));
  p.sums[1] = p.sums[0] + chunks(hidden) * groups * 4;
  p.red = up(p.sums[1] + chunks(widest) * groups * 4);
  p.total = p.red + kLayersBuffers * kLayerWarps * kPairRows * 4;
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
__device__ __forceinline__ uint32_t load_relaxed32(const uint32_t* from) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}
__device__ __forceinline__ void store_relaxed32(uint32_t* to, uint32_t v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory"); }
__device__ __forceinline__ void store_relaxed(void* to, const uint4& v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_relaxed16(uint16_t* to, uint16_t v) { asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to), "h"(v) : "memory"); }
// Whether one of the two halves of a word is 0xffff.
__device__ __forceinline__ uint32_t missing(uint32_t w) { return (~w - 0x00010001u) & w & 0x80008000u; }
__device__ __forceinline__ bool is_there(const uint4& v, uint32_t relevant) {
  return ((missing(v.x) | missing(v.y) | missing(v.z) | missing(v.w)) & relevant) == 0;
}

// Asks for all that is missing at once, and again, until the warp has everything; zeros from null. `relevant`: bits of a word that may say "not yet"; 0 where
// all is complete. The whole warp calls, and stays together: shuffles of lanes that have gone different ways take a hundred times as long.
template <int U>
__device__ __forceinline__ void take(uint4 (&v)[U], const uint16_t* const (&from)[U], uint32_t relevant = ~0u) {
  uint32_t waits = 0;
#pragma unroll
  for (int i = 0; i < U; i++) {
    v[i] = uint4{};
    waits |= (from[i] != nullptr) << i;
  }
  while (__any_sync(~0u, waits != 0)) {
#pragma unroll
    for (int i = 0; i < U; i++)
      if (waits >> i & 1) v[i] = load_relaxed(from[i]);
#pragma unroll
    for (int i = 0; i < U; i++)
      if (is_there(v[i], relevant)) waits &= ~(1u << i);
  }
}

template <int U>
__device__ __forceinline__ void LayerTeam::load(uint4 (&v)[U], const uint16_t* const (&from)[U]) {
  take(v, from);
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
      else if (warp <= kFinishWarp + 1) finish_all(warp - kFinishWarp);
    } else {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kManyRegisters));
      attend();
    }
  }

 private:
  __device__ __forceinline__ uint16_t* place(int layer, int element) const {
    return a.exchange + static_cast<size_t>(layer) * a.exchange_row + element;
  }

  // ---- weights -------------------------------------------------------------------------------------------------------------------
  // This block's weights in the order in which they are needed, a slot of the ring at a time.
  struct Stream {
    const DecodeLayersArgs& a;
    const uint8_t* src = nullptr;
    size_t apart = 0;  // from a pair's first strip to its second
    int product = -1, last, rest = 0, in_piece = 0, whole = 0;

    __device__ __forceinline__ explicit Stream(const DecodeLayersArgs& args) : a(args), last(4 * args.layers - 1) {}

    // (source, offset in the slot, bytes) of up to kLayerWarps units of the first strips; false at the end.
    template <typename Begin, typename Part>
    __device__ __forceinline__ bool next(const Begin& begin, const Part& part) {
      if (rest == 0) {
        if (product == last) return false;
        product++;
        const LayerProduct& p = a.product[product & 3];
        const Pieces piece(p, blockIdx.x);
        src = a.weights[product] + (static_cast<size_t>(2 * piece.pair) * p.chunks + piece.from) * kChunk;
        whole = p.chunks, apart = static_cast<size_t>(whole) * kChunk;
        in_piece = piece.length, rest = piece.count();
      }
      int now = min(kLayerWarps, rest), offset = 0;
      rest -= now;
      begin(now);
      while (now > 0) {
        const int units = min(now, in_piece), bytes = units * kChunk;
        part(src, offset, bytes);
        now -= units, in_piece -= units, offset += bytes, src += bytes;
        if (in_piece == 0) in_piece = whole, src += apart;  // behind this pair's second strip
      }
      return true;
    }
  };

  __device__ __forceinline__ void feed() {
    Stream load(a);
    int slot = 0;
    uint32_t phase = 1;  // the ring is free
    bool more;
    do {
      const uint32_t bar = full + 8 * slot, dst = base + a.plan.ring + slot * kSlot;
      mbar_wait(free + 8 * slot, phase);
      more = load.next([&](int units) { if (elect()) mbar_expect(bar, kPair * units * kChunk); },
                       [&](const uint8_t* src, int offset, int bytes) {
                         if (elect()) bulk_load(dst + offset, src, bytes, bar), bulk_load(dst + kHalf + offset, src + load.apart, bytes, bar);
                       });
      if (++slot == a.plan.depth) slot = 0, phase ^= 1;
    } while (more);
  }

  // ---- products ------------------------------------------------------------------------------------------------------------------
  __device__ __forceinline__ static void math_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kMathThreads) : "memory"); }

  // The sums of x that go with the zero points, minus and in the scale of expand(): from those of eight neighbours, of vectors kMathThreads apart.
  template <int V>
  __device__ __forceinline__ void leave_sums(float (&sum)[V], uint32_t sums, int first, int total) {
    constexpr float kScale = BF ? (ZP ? -1.f : -136.f) : (ZP ? -1.f / 16777216.f : -8.f / 16777216.f);
    constexpr int kLanes = kChunkK / 8 / G;
#pragma unroll
    for (int step = 1; step < kLanes; step <<= 1)
#pragma unroll
      for (int i = 0; i < V; i++)
        if (first + i * kMathThreads < total) sum[i] += __shfl_xor_sync(~0u, sum[i], step);
#pragma unroll
    for (int i = 0; i < V; i++) {
      const int vector = first + i * kMathThreads + lane;
      if (lane % kLanes == 0 && vector < total) sts32(sums + vector / kLanes * 4, sum[i] * kScale);
    }
  }
  __device__ __forceinline__ static float sum_of(const float (&v)[8]) {
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
  }

  // The weights of the norm that comes next, and the order of its outputs, into shared memory.
  __device__ __forceinline__ void fetch_norm(int layer, int which) {
    const int K = a.product[0].K;
    const size_t at = (static_cast<size_t>(layer) * 2 + which) * K;
    for (int k = threadIdx.x * 8; k < K; k += kMathThreads * 8) {
      cp_async16(base + a.plan.weight + k * 2, a.norms + at + k);
      if (a.orders) cp_async16(base + a.plan.order + k * 2, a.orders + at + k);
    }
    cp_async_commit();
  }

  // The order of o's inputs, where the norm's weights are no longer needed.
  __device__ __forceinline__ void fetch_o_order(int layer) {
    const int K = a.product[1].K;
#pragma unroll 1  // or its addresses are kept from layer to layer
    for (int k = threadIdx.x * 8; k < K; k += kMathThreads * 8) cp_async16(base + a.plan.o_order + k * 2, a.o_orders + static_cast<size_t>(layer) * K + k);
    cp_async_commit();
  }

  // v: what is at `raw`, in order: element i is the one at order[i]. All of it has to be there.
  template <int V>
  __device__ __forceinline__ void sort(uint4 (&v)[V], int vectors, int first, uint32_t raw, uint32_t order) {
#pragma unroll
    for (int i = 0; i < V; i++) {
      const int vector = first + i * kMathThreads + lane;
      if (first + i * kMathThreads >= vectors) break;
      const uint4 at = vector < vectors ? lds128(order + vector * 16) : uint4{};
      const auto two = [&](uint32_t j) { return __byte_perm(lds16(raw + (j & 0xffff) * 2), lds16(raw + (j >> 16) * 2), 0x5410); };
      const uint4 sorted = make_uint4(two(at.x), two(at.y), two(at.z), two(at.w));
      v[i] = vector < vectors ? sorted : uint4{};
    }
  }

  // The input of a product into shared memory, in the order at `order` (0: as it comes), RMSNorm applied where kNormed (rounded to the activations' type;
  // what fetch_norm() has fetched belongs to it), and the sums that go with zero points; V vectors at a time. `relevant`: see take(). `attended`: comes of the
  // attention, whose memory x is in.
  template <int V, bool kNormed>
  __device__ __forceinline__ void stage(const uint16_t* src, uint32_t relevant, const LayerProduct& p, bool attended, uint32_t order, uint32_t x, uint32_t sums) {
    const int vectors = p.K / 8, total = p.chunks * (kChunkK / 8);  // K may end inside a chunk: zeros
    const uint32_t raw = base + a.plan.raw;
    int first = warp * 32;
#pragma unroll 1
    do {  // once, where something depends on all of it
      const uint16_t* from[V];
      uint4 v[V];
      float sum[V];
      const auto vector = [&](int i) { return first + i * kMathThreads + lane; };
      const auto leave_raw = [&] {
#pragma unroll
        for (int i = 0; i < V; i++)
          if (from[i]) sts128(raw + vector(i) * 16, v[i]);
      };
#pragma unroll
      for (int i = 0; i < V; i++) from[i] = vector(i) < vectors ? src + vector(i) * 8 : nullptr;
      take(v, from, relevant);
      if constexpr (kNormed) {
        if (order) leave_raw();
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < V; i++) {
          float e[8];
          unpack8<BF>(e, v[i]);
#pragma unroll
          for (int j = 0; j < 8; j++) e[j] *= e[j];
          squares += sum_of(e);
        }
#pragma unroll
        for (int step = 16; step; step >>= 1) squares += __shfl_xor_sync(~0u, squares, step);
        if (lane == 0) sts32(base + a.plan.norms + warp * 4, squares);
        cp_async_wait<0>();
        math_sync();
        squares = 0.f;
#pragma unroll
        for (int w = 0; w < kLayerWarps; w += 4) {
          const uint4 of = lds128(base + a.plan.norms + w * 4);
          squares += (__uint_as_float(of.x) + __uint_as_float(of.y)) + (__uint_as_float(of.z) + __uint_as_float(of.w));
        }
        const float scale = rsqrtf(squares / static_cast<float>(p.K) + a.eps);
        if (order) sort(v, vectors, first, raw, order);
#pragma unroll
        for (int i = 0; i < V; i++) {
          if (first + i * kMathThreads >= total) break;
          float e[8], w[8];
          unpack8<BF>(e, v[i]);
          unpack8<BF>(w, from[i] ? lds128(base + a.plan.weight + vector(i) * 16) : uint4{});
#pragma unroll
          for (int j = 0; j < 8; j++) e[j] = e[j] * scale * w[j];
          v[i] = pack8<BF>(e);
        }
      } else if (attended) {
        if (order) cp_async_wait<0>();
        math_sync();  // every head is through, this block's own, too
        if (order) {
          leave_raw();
          math_sync();
          sort(v, vectors, first, raw, order);
        }
      }
#pragma unroll
      for (int i = 0; i < V; i++) {
        if (first + i * kMathThreads >= total) break;
        float e[8];
        unpack8<BF>(e, v[i]);
        sum[i] = sum_of(e);
        if (vector(i) < total) sts128(x + vector(i) * 16, v[i]);
      }
      leave_sums(sum, sums, first, total);
      first += kMathThreads * V;
    } while (!kNormed && first < total);
    math_sync();
  }

  // acc += scale * (sum v x - z sum x) of a chunk of both strips, group by group, rows g and g+8. All eight columns of the product are x; lanes 0, 4, ... keep
  // the first one.
  __device__ __forceinline__ void pair_mma(float (&acc)[kPair][2], uint32_t chunk, uint32_t sums, uint32_t x) const {
    using C = Chunk<G, ZP>;
    using O = Offset<BF, ZP>;
    constexpr int kUnits = 4 / G;  // of 32 k, in a group
    uint4 q[kPair][2];
    uint32_t b[4][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int s = 0; s < kPair; s++) q[s][i] = lds128(chunk + s * kHalf + i * kBlockBytes + lane * 16);
      ldmatrix_x4(b[2 * i], x + i * 128);
      ldmatrix_x4(b[2 * i + 1], x + i * 128 + 64);
    }
#pragma unroll
    for (int group = 0; group < G; group++) {
      float part[kPair][2][4] = {};
      const float minus = __uint_as_float(lds32(sums + group * 4));
#pragma unroll
      for (int u = group * kUnits; u < (group + 1) * kUnits; u++)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
          for (int s = 0; s < kPair; s++) {
            const uint4& word = q[s][u / 2];
            uint32_t a16[4];
            expand<BF>(u % 2 ? (j ? word.w : word.z) : (j ? word.y : word.x), a16);
            mma_m16n8k16<BF>(part[s][j], a16, b[u][2 * j], b[u][2 * j + 1]);
          }
#pragma unroll
      for (int s = 0; s < kPair; s++) {
        const uint32_t meta = chunk + s * kHalf;
        const float2 scale = scale_pair(lds32(meta + C::kScaleOffset + group * 32 + (lane >> 2) * 4));
        float z0 = 1.f, z1 = 1.f;
        if constexpr (ZP) {
          const uint32_t pair = lds16(meta + C::kZeroOffset + group * 16 + (lane >> 2) * 2);
          z0 = O::kZeroBase + static_cast<float>(pair & 255u), z1 = O::kZeroBase + static_cast<float>(pair >> 8);
        }
        acc[s][0] = fmaf(scale.x, fmaf(z0, minus, part[s][0][0] + part[s][1][0]), acc[s][0]);
        acc[s][1] = fmaf(scale.y, fmaf(z1, minus * O::kG8, part[s][0][2] + part[s][1][2]), acc[s][1]);
      }
    }
  }

  __device__ __forceinline__ void multiply_all() {
    fetch_norm(0, 0);
    grid_wait();
    const uint32_t chunk_first = base + a.plan.ring + warp * kChunk;
    uint32_t phase = 0, round = 1, chunk = chunk_first;
    int slot = 0, buffer = 0;
    const auto give_back = [&] {
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
        const int source = k == 0 ? a.product[3].out : k == 1 ? a.attended : a.product[k - 1].out;
        const bool given = layer == 0 && k == 0;
        const uint32_t order = normed ? (a.orders ? base + a.plan.order : 0) : k == 1 && a.o_orders ? base + a.plan.o_order : 0;
        const uint16_t* from = given ? a.x : place(k ? layer : layer - 1, source);
        if (normed) stage<kLayersMaxHidden / (8 * kMathThreads), true>(from, given ? 0 : ~0u, p, false, order, x, sums);
        else stage<kLayersMaxHeads / (8 * kMathThreads), false>(from, ~0u, p, k == 1, order, x, sums);
        if (k == 0 && a.o_orders) fetch_o_order(layer);
        if (!normed && (k == 1 || layer + 1 < a.layers)) fetch_norm(k == 1 ? layer : layer + 1, k == 1);
        if (k == 0 && threadIdx.x == 0) mbar_arrive(go);  // all have done with x of the layer before

        const uint32_t x_lane = x + (lane >> 3) * 16;
        float acc[kPair][2] = {};
        Pieces piece(p, blockIdx.x);
        const int in_last = piece.count() % kLayerWarps;
        int at = warp;
#pragma unroll 1
        for (; piece.length > 0; piece.next(p)) {
#pragma unroll 1
          for (; at < piece.length; at += kLayerWarps) {
            const int c = piece.from + at;
            mbar_wait(full + 8 * slot, phase);
            pair_mma(acc, chunk, sums + c * (G * 4), x_lane + c * (kChunkK * 2));
            give_back();
          }
          at -= piece.length;
          mbar_wait(read + 8 * buffer, round);
          const uint32_t red = base + a.plan.red + (buffer * kLayerWarps + warp) * (kPairRows * 4) + lane;  // lane 4g: row g
#pragma unroll
          for (int i = 0; i < kPairRows / 8; i++)
            if (lane % 4 == 0) sts32(red + i * 32, acc[i / 2][i % 2]);
          __syncwarp();
          if (lane == 0) mbar_arrive(sent + 8 * buffer);
#pragma unroll
          for (int i = 0; i < kPairRows / 8; i++) acc[i / 2][i % 2] = 0.f;
          if (++buffer == kLayersBuffers) buffer = 0, round ^= 1;
        }
        if (in_last && warp >= in_last) {  // nothing for this warp in the last slot
          mbar_wait(full + 8 * slot, phase);
          give_back();
        }
      }
  }

  // ---- sums, and what becomes of them -------------------------------------------------------------------------------------------------
  // One warp's share of this block's of a layer's places.
  __device__ __forceinline__ void empty(int layer, int mine) {
    const uint4 nothing = make_uint4(kNotYet, kNotYet, kNotYet, kNotYet);
    for (int i = (2 * blockIdx.x + mine) * 32 + lane; i < a.exchange_row / 8; i += gridDim.x * 64) store_relaxed(place(layer, i * 8), nothing);
  }
  __device__ __forceinline__ uint32_t* partial(int layer, int k, int block) const {
    return a.partials + (static_cast<size_t>((layer & 1) * 4 + k) * gridDim.x + block) * kPairRows + lane;
  }

  // A lane for every row of a pair of strips. `mine`: the exchange buffer, of two, and every second pair.
  __device__ __forceinline__ void finish_all(int mine) {
    using O = Offset<BF, false>;
    grid_wait();
    for (int layer = max(0, a.layers - 2); layer < a.layers; layer++) empty(layer, mine);
    __threadfence();
    asm volatile("bar.sync 3, 64;" ::: "memory");  // before either stores something
    const int strip = lane / kStripRows, row = lane % kStripRows;
    const float unscale = row < 8 ? O::kUnscaleG : O::kUnscaleG8;
    int turn = 0;
    uint32_t phase = 0;
#pragma unroll 1
    for (int layer = 0; layer < a.layers; layer++)
#pragma unroll 1
      for (int k = 0; k < 4; k++) {
        const LayerProduct& p = a.product[k];
        const bool paired = k == 2;
        uint16_t* y = layer == a.layers - 1 && k == 3 ? a.x : place(layer, p.out);
        const uint16_t* add = k == 1 ? (layer ? place(layer - 1, a.product[3].out) : a.x) : k == 3 ? place(layer, a.product[1].out) : nullptr;
        const uint16_t* bias = a.bias ? a.bias + static_cast<size_t>(layer) * (a.product[3].bias + a.product[3].N) + p.bias : nullptr;
#pragma unroll 1
        for (Pieces piece(p, blockIdx.x); piece.length > 0; piece.next(p), turn ^= 1) {
          if (turn != mine) continue;
          const int out = paired ? (2 * piece.pair + strip) * 8 + (row & 7) : piece.pair * kPairRows + lane;
          const bool owner = piece.from == 0;
          uint16_t residual = 0;
          float of_bias = 0.f;
          if (owner && add) residual = load_relaxed16(add + out);
          if (owner && bias) of_bias = from_16bit<BF>(bias[paired && row >= 8 ? p.N / 2 + out : out]);
          // The rest of a pair comes from the blocks that follow, which began with it and are waited for before this block has done its part.
          const int end = owner ? (piece.pair + 1) * p.chunks : 0;
          float rest = 0.f;
#pragma unroll 1
          for (int block = blockIdx.x + 1; Pieces::cut(p, block) < end; block++) {
            uint32_t* from = partial(layer, k, block);
            uint32_t word;
            do word = load_relaxed32(from);
            while (__any_sync(~0u, word == kNotYet));
            store_relaxed32(from, kNotYet);
            rest += __uint_as_float(word);
          }
          mbar_wait(sent + 8 * mine, phase);
          phase ^= 1;
          float v = 0.f;
#pragma unroll
          for (int w = 0; w < kLayerWarps; w++) v += __uint_as_float(lds32(base + a.plan.red + ((mine * kLayerWarps + w) * kPairRows + lane) * 4));
          __syncwarp();
          if (lane == 0) mbar_arrive(read + 8 * mine);
          if (!owner) {
            const uint32_t word = __float_as_uint(v);
            store_relaxed32(partial(layer, k, blockIdx.x), word == kNotYet ? 0x7fffffffu : word);
            continue;
          }
          v = (v + rest) * unscale + of_bias;
          if (paired) {
            const float other = __shfl_down_sync(~0u, v, 8);
            if (row < 8) store_relaxed16(y + out, to_16bit<BF>(__fdividef(v, 1.f + __expf(-v)) * other));
          } else {
            // Asked for before it was there, perhaps; it is now, since the product's input came of it.
            if (add && residual == static_cast<uint16_t>(kNotYet)) residual = load_relaxed16(add + out);
            store_relaxed16(y + out, to_16bit<BF>(v + from_16bit<BF>(residual)));
          }
        }
        // A pair of qkv or o is through: this block has seen all of the layer before, and nobody reads the one before that any more.
        if (k == 1 && layer >= 2) empty(layer - 2, mine);
      }
  }

  // ---- attention -------------------------------------------------------------------------------------------------------------------
  __device__ __forceinline__ void attend() {
    grid_wait();
    const bool attends = a.attention.context_lens[0] > 0 && a.attention.query_start[1] - a.attention.query_start[0] == 1;
    AttentionDecodeArgs& shared = *reinterpret_cast<AttentionDecodeArgs*>(smem + kLayersArgs);
#pragma unroll 1
    for (int layer = 0; layer < a.layers; layer++) {
      LayerTeam::sync();
      if (LayerTeam::thread() == 0) {
        if (layer == 0) shared = a.attention;
        shared.qkv = place(layer, a.product[0].out), shared.ldqkv = a.product[0].N;
        shared.out = place(layer, a.attended), shared.ldo = a.product[1].K;
        shared.cache = const_cast<uint8_t*>(a.caches[layer]);
        if (a.head_norms) {
          shared.q_norm = a.head_norms + static_cast<size_t>(layer) * 2 * kLayersHead;
          shared.k_norm = shared.q_norm + kLayersHead;
        }
        shared.window = a.windows[layer];
        shared.workspace = static_cast<uint8_t*>(a.attention.workspace) + (layer & 1 ? a.workspace_half : 0);
      }
      LayerTeam::sync();
      if (blockIdx.x == 0 && !attends) {  // padding, of no sequence: asked for all the same
        for (int k = LayerTeam::thread() * 8; k < a.product[1].K; k += kAttentionThreads * 8) store_relaxed(shared.out + k, uint4{});
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
