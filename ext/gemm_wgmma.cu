// 4-bit GEMM for M >= 16 on sm_90a.
//
// A block owns tiles of 128 output rows x TN tokens. Warps 0-7 are two warpgroups, 64 rows each: a warp reads the int4 fragments of its
// strip from shared memory, dequantises and scales them in registers while the tensor cores work on the step before, and issues wgmma with
// them as A; the tokens are B, read from shared memory. Warp 8 feeds a ring of slots (128 k each): one bulk copy per strip for the weights,
// two tensor-map loads for the tokens, halved and multicast where two blocks of a cluster work on neighbouring rows and the same tokens.
//
// Work is divided evenly whatever the shape: tiles that do not fill a whole wave of blocks are cut along k ("stream-k") into equal ranges of
// chunks. The block that holds a tile's first chunk owns the tile; the others leave fp32 partial sums in the workspace, and the owner adds
// them in order of k, so results are the same bits every time. An owner waits only for blocks with lower indices, which start first: two
// such kernels sharing a GPU cannot wait for each other in a circle.
#include "gemm_wgmma.h"

#include <algorithm>
#include <mutex>

#include "layout.h"
#include "wgmma_sm90.h"

namespace gptq {
namespace {

constexpr int kMaxGroups = 4;             // consumer warpgroups of a block
constexpr int kMaxBlocks = 512;           // of one launch; bounds the flags in the workspace
constexpr int kMaxSplitBlocks = 264;      // that may leave partial sums
constexpr size_t kFlagBytes = kMaxBlocks * kMaxGroups * sizeof(int);
constexpr size_t kPartialBytes = size_t{132 + 32} * 128 * 256 * sizeof(float);
constexpr int kRaster = 8;                // token tiles that run side by side, so that they share weights in L2

struct Params {
  uint16_t* y;
  const uint16_t* bias;
  const uint16_t* residual;
  float* partials;
  int* flags;
  int m, n, strips, chunks, chunk_bytes;
  int64_t ldy, ldr;
  int m_tiles, n_tiles;          // n_tiles: in units of a cluster
  int tiles, split_tiles;        // the first split_tiles are cut along k over all clusters
  int clusters, stages, groups;
  int paired;
  bool zeros;
};

#ifdef GPTQ_TRACE
}  // namespace
__device__ long long trace_buffer[264 * 8];
namespace {
#define TRACE(i) do { if (threadIdx.x == 0) trace_buffer[blockIdx.x * 8 + (i)] = clock64(); } while (0)
#else
#define TRACE(i) do {} while (0)
#endif

struct Segment {
  int tile, first, last;  // chunks [first, last) of the tile
};

__device__ __forceinline__ int split_begin(const Params& p, int i) {
  return static_cast<int>(static_cast<int64_t>(p.split_tiles) * p.chunks * i / p.clusters);
}

// The segments of one cluster, the same for its producer and its consumers.
struct Walk {
  int unit, end, tile;
  __device__ Walk(const Params& p, int cluster) {
    const int i = p.clusters - 1 - cluster;  // reversed: owners wait for lower cluster indices
    unit = split_begin(p, i);
    end = split_begin(p, i + 1);
    tile = p.split_tiles + cluster;
  }
  __device__ __forceinline__ bool next(const Params& p, Segment& s) {
    if (unit < end) {
      s.tile = unit / p.chunks;
      s.first = unit - s.tile * p.chunks;
      s.last = min(p.chunks, s.first + end - unit);
      unit += s.last - s.first;
      return true;
    }
    if (tile >= p.tiles) return false;
    s = {tile, 0, p.chunks};
    tile += p.clusters;
    return true;
  }
};

__device__ __forceinline__ void tile_position(const Params& p, int tile, int& m_tile, int& n_tile) {
  const int per_band = kRaster * p.n_tiles, band = tile / per_band, in_band = tile - band * per_band;
  const int rows = min(kRaster, p.m_tiles - band * kRaster);
  n_tile = in_band / rows;
  m_tile = band * kRaster + in_band - n_tile * rows;
}

// Scales and zero points of rows g and g+8 for one group.
template <bool BF>
struct RowPair {
  ZeroPair zero;
  uint32_t scale[2], rest[2];  // bf16: the fp16 scale is scale + rest to 16 bits

  __device__ __forceinline__ RowPair(uint32_t s, uint32_t z) : zero(load_zeros<BF>(z)) {
    if constexpr (BF) {
      const float2 f = scale_pair(s);
      const float both[2] = {f.x, f.y};
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t hi = to_16bit<true>(both[i]), lo = to_16bit<true>(both[i] - from_16bit<true>(hi));
        scale[i] = hi * 0x10001u;
        rest[i] = lo * 0x10001u;
      }
    } else {
      scale[0] = __byte_perm(s, s, 0x1010);
      scale[1] = __byte_perm(s, s, 0x3232);
    }
  }
  __device__ __forceinline__ void weights(uint32_t q, uint32_t (&a)[4]) const {
    dequant<BF>(q, a, zero);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (BF) {
        uint32_t low;
        asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(low) : "r"(a[i]), "r"(rest[i & 1]));
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(a[i]) : "r"(a[i]), "r"(scale[i & 1]), "r"(low));
      } else {
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(a[i]) : "r"(a[i]), "r"(scale[i & 1]));
      }
    }
  }
};

// What one warp needs of a chunk of its strip, as it lies in memory.
template <int GROUPS>
struct Packed {
  uint32_t q[8], scale[GROUPS], zero[GROUPS];

  // GROUPS 1: one group per chunk. GROUPS 4: `groups` 2 or 4, entry i is the group of k 32i..32i+31.
  __device__ __forceinline__ void fetch(const uint8_t* chunk, int groups, bool zeros, int lane) {
#pragma unroll
    for (int b = 0; b < 2; b++) *reinterpret_cast<uint4*>(q + 4 * b) = *reinterpret_cast<const uint4*>(chunk + b * kBlockBytes + lane * 16);
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
      const int group = GROUPS == 1 ? 0 : (i * groups) >> 2;
      scale[i] = *reinterpret_cast<const uint32_t*>(chunk + kWeightBytes + 32 * group + (lane & 28));
      zero[i] = 0x0808;
      if (zeros) zero[i] = *reinterpret_cast<const uint16_t*>(chunk + kWeightBytes + 32 * (GROUPS == 1 ? 1 : groups) + 16 * group + (lane & 28) / 2);
    }
  }
};

template <bool BF>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t r;
  if constexpr (BF)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float silu(float v) { return v / (1.f + __expf(-v)); }

// A kernel: TN tokens and 64*FR rows for each of NWG consumer warpgroups, CL blocks per cluster. ONE: one scale group per chunk, or fewer.
template <bool BF_, bool ONE_, int TN_, int FR_, int CL_, int NWG_>
struct Shape {
  static constexpr bool BF = BF_, ONE = ONE_;
  static constexpr int TN = TN_, FR = FR_, CL = CL_, NWG = NWG_;
  static constexpr int kStrips = 4 * FR * NWG, kRows = 16 * kStrips, kThreads = 128 * (NWG + 1);
  static constexpr int kTokenBytes = TN * kChunkK * 2;                    // of one slot
  static constexpr int kPass = TN == 256 && !ONE ? 16 : TN < 32 ? TN : 32;  // tokens the epilogue turns at a time
  static constexpr int kPassBytes = kPass * 128;                          // per warpgroup
  static constexpr int kStep = FR == 1 && TN * NWG < 512 ? 4 : FR == 1 && NWG == 2 ? 4 : 2;  // k16 steps between two commits
  static constexpr int kMinBlocks = TN * FR <= 64 && NWG == 2 ? 2 : 1;
  // Registers per thread, of the 64,512 (2 groups), 30,720 (2 groups, twice per multiprocessor), 65,536 (3) or 61,440 (4) at the start.
  static constexpr int kProducerRegisters = NWG == 2 && kMinBlocks == 1 ? 40 : 32;
  static constexpr int kConsumerRegisters = NWG == 4 ? 112 : NWG == 3 ? 160 : kMinBlocks == 2 ? 104 : 232;
  // A slot's weights start at a multiple of 128 bytes, as tensor loads must.
  static __host__ __device__ int weight_bytes(int chunk_bytes) { return (kStrips * chunk_bytes + 127) & ~127; }
  static int slot_bytes(int chunk_bytes) { return kTokenBytes + weight_bytes(chunk_bytes); }
  static int fixed_bytes(int stages) { return NWG * kPassBytes + 16 * stages; }
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kMinBlocks) gemm_wgmma_kernel(const __grid_constant__ CUtensorMap weight_map,
                                                                              const __grid_constant__ CUtensorMap token_map, const Params p) {
#ifdef __CUDA_ARCH__
  constexpr int TN = S::TN, FR = S::FR, CL = S::CL, NWG = S::NWG;
  extern __shared__ __align__(1024) uint8_t smem[];
  uint8_t* const slots_x = smem;
  uint8_t* const slots_w = smem + p.stages * S::kTokenBytes;
  const int slot_w_bytes = S::weight_bytes(p.chunk_bytes);
  uint8_t* const turn = slots_w + p.stages * slot_w_bytes;
  const uint32_t full = smem_addr(turn + NWG * S::kPassBytes), empty = full + 8 * p.stages;

  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const uint32_t rank = CL == 1 ? 0 : cluster_rank();
  const int cluster = blockIdx.x / CL;

  TRACE(0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; i++) {
      mbar_init(full + 8 * i, 1);
      mbar_init(empty + 8 * i, 4 * NWG * CL);
    }
    mbar_init_fence();
  }
  if constexpr (CL == 1)
    __syncthreads();
  else
    cluster_sync();

  if (warp >= 4 * NWG) {
    // ---- producer -------------------------------------------------------------------------------------------------------------------
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(S::kProducerRegisters));
    if (threadIdx.x == 128 * NWG) {
      tensor_prefetch(&weight_map);
      tensor_prefetch(&token_map);
      const int tx = S::kTokenBytes + S::kStrips * p.chunk_bytes;
      struct Feed {
        Walk walk;
        Segment at;
        int strip, token;
        bool more;
        __device__ __forceinline__ void open(const Params& p, int rank) {
          more = walk.next(p, at);
          if (!more) return;
          int m_tile, n_tile;
          tile_position(p, at.tile, m_tile, n_tile);
          strip = (n_tile * CL + rank) * S::kStrips;
          token = m_tile * TN + rank * (TN / CL);
        }
        __device__ __forceinline__ void step(const Params& p, int rank) {
          if (++at.first == at.last) open(p, rank);
        }
      };
      auto load_weights = [&](const Feed& feed, int slot) {
        mbar_expect(full + 8 * slot, tx);
        tensor_load_3d(smem_addr(slots_w) + slot * slot_w_bytes, &weight_map, 0, feed.at.first, feed.strip, full + 8 * slot);
      };
      auto load_tokens = [&](const Feed& feed, int slot) {
#pragma unroll
        for (int panel = 0; panel < 2; panel++) {
          const uint32_t dst = smem_addr(slots_x) + slot * S::kTokenBytes + (panel * TN + rank * (TN / CL)) * 128;
          const int k = feed.at.first * kChunkK + 64 * panel;
          if constexpr (CL == 1)
            tensor_load(dst, &token_map, k, feed.token, full + 8 * slot);
          else
            tensor_load_multicast(dst, &token_map, k, feed.token, full + 8 * slot, (1 << CL) - 1);
        }
      };
      // The first lap over the ring needs no free slot, and its weights need nothing of the kernel before this one.
      Feed ahead{Walk(p, cluster)};
      ahead.open(p, rank);
      Feed behind = ahead;
      for (int i = 0; i < p.stages && ahead.more; i++, ahead.step(p, rank)) load_weights(ahead, i);
      grid_wait();
      for (int i = 0; i < p.stages && behind.more; i++, behind.step(p, rank)) load_tokens(behind, i);
      int slot = 0;
      uint32_t parity = 0;
      for (; ahead.more; ahead.step(p, rank)) {
        mbar_wait(empty + 8 * slot, parity);
        load_weights(ahead, slot);
        load_tokens(ahead, slot);
        if (++slot == p.stages) slot = 0, parity ^= 1;
      }
      grid_launch_dependents();
    }
  } else {
    // ---- consumers ------------------------------------------------------------------------------------------------------------------
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::kConsumerRegisters));
    const int group = warp >> 2, quarter = warp & 3, g = lane >> 2, thread = threadIdx.x & 127;
    constexpr int kStep = S::kStep, kSteps = 8 / kStep;
    float d[FR][TN / 2];
    uint32_t a[2][FR][kStep][4];
    Packed<S::ONE ? 1 : 4> packed[FR];

    auto dequantise = [&](uint32_t(&to)[FR][kStep][4], int step) {
#pragma unroll
      for (int f = 0; f < FR; f++) {
#pragma unroll
        for (int j = 0; j < kStep; j++) {
          const int k16 = step * kStep + j, i = S::ONE ? 0 : k16 / 2;
          RowPair<S::BF>(packed[f].scale[i], packed[f].zero[i]).weights(packed[f].q[k16], to[f][j]);
        }
      }
    };
    auto multiply = [&](uint32_t(&from)[FR][kStep][4], uint32_t tokens, int step, int accumulate) {
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < kStep; j++)
#pragma unroll
        for (int f = 0; f < FR; f++) {
          const int k16 = step * kStep + j;
          Wgmma<S::BF, TN>::mma(d[f], from[f][j], wgmma_desc(tokens + k16 / 4 * (TN * 128 >> 4) + k16 % 4 * 2), j == 0 ? accumulate : 1);
        }
      wgmma_commit();
    };
    const uint32_t empty_there = CL == 1 ? empty : cluster_address(empty, lane & (CL - 1));
    auto release = [&](int slot) {
      if (lane < CL) {
        if constexpr (CL == 1)
          mbar_arrive(empty + 8 * slot);
        else
          mbar_arrive_cluster(empty_there + 8 * slot);
      }
    };

    TRACE(1);
    grid_wait();
    TRACE(2);
    Walk walk(p, cluster);
    Segment s;
    int slot = 0;
    uint32_t parity = 0;
    const uint8_t* const my_chunk = slots_w + (group * FR * 4 + quarter) * p.chunk_bytes;
    const uint8_t* chunk = my_chunk;                       // of this warp in the current slot
    const uint32_t tokens0 = smem_addr(slots_x) >> 4;
    uint32_t tokens = tokens0;                             // of the current slot, as in a descriptor
    auto fetch = [&] {
      mbar_wait(full + 8 * slot, parity);
#pragma unroll
      for (int f = 0; f < FR; f++) packed[f].fetch(chunk + f * 4 * p.chunk_bytes, p.groups, p.zeros, lane);
    };
    while (walk.next(p, s)) {
      fetch();
      if (s.tile * p.chunks + s.first == split_begin(p, p.clusters - 1 - cluster)) TRACE(3);
      dequantise(a[0], 0);
      int previous = 0;
      for (int c = s.first; c < s.last; c++) {
        const uint32_t here = __reduce_max_sync(0xffffffffu, tokens);  // the same in all lanes, and now in a uniform register
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          multiply(a[step & 1], here, step, step == 0 ? c > s.first : 1);
          if (step + 1 < kSteps) {
            wgmma_wait<1>();
            if (step == 0 && c > s.first) release(previous);
            dequantise(a[(step + 1) & 1], step + 1);
          }
        }
        previous = slot++;
        chunk += slot_w_bytes;
        tokens += S::kTokenBytes >> 4;
        if (slot == p.stages) slot = 0, parity ^= 1, chunk = my_chunk, tokens = tokens0;
        if (c + 1 < s.last) {
          fetch();
          wgmma_wait<1>();
          dequantise(a[0], 0);
        }
      }
      wgmma_wait<0>();
      release(previous);
      TRACE(4);
#pragma unroll
      for (int f = 0; f < FR; f++)
#pragma unroll
        for (int i = 0; i < TN / 2; i++) asm volatile("" : "+f"(d[f][i])::"memory");

      // ---- partial sums of a tile that was cut along k ----------------------------------------------------------------------------
      const int mine = p.clusters - 1 - cluster;
      auto partial = [&](int i, int f) {
        return reinterpret_cast<float4*>(p.partials) + (static_cast<int64_t>((i * CL + rank) * NWG + group) * FR + f) * (TN / 8) * 128 + thread;
      };
      if (s.first > 0) {
#pragma unroll
        for (int f = 0; f < FR; f++) {
          float4* to = partial(mine, f);
#pragma unroll
          for (int i = 0; i < TN / 8; i++) __stcg(to + i * 128, make_float4(d[f][4 * i], d[f][4 * i + 1], d[f][4 * i + 2], d[f][4 * i + 3]));
        }
        named_barrier(1 + group, 128);
        if (thread == 0) flag_set(p.flags + (mine * CL + rank) * NWG + group);
        continue;
      }
      if (s.last < p.chunks) {
        int others = 1;
        for (const int tile_end = (s.tile + 1) * p.chunks; split_begin(p, mine + 1 + others) < tile_end;) others++;
        for (int i = thread; i < others; i += 128) {
          int* flag = p.flags + ((mine + 1 + i) * CL + rank) * NWG + group;
          while (!flag_is_set(flag)) __nanosleep(20);
          *flag = 0;  // ready for the next launch on this stream
        }
        named_barrier(1 + group, 128);
        // As many loads in flight as there are registers for; the sums are in order of k all the same.
        constexpr int kBatch = S::kConsumerRegisters < 128 ? 8 : 16, kQuads = TN / 8;
        constexpr int kAtOnce = kBatch > kQuads ? kBatch / kQuads : 1, kPart = kBatch < kQuads ? kBatch : kQuads;
        for (int i = 1; i <= others; i += kAtOnce) {
#pragma unroll
          for (int f = 0; f < FR; f++) {
#pragma unroll
            for (int part = 0; part < kQuads; part += kPart) {
              float4 v[kAtOnce][kPart];
#pragma unroll
              for (int j = 0; j < kAtOnce; j++)
#pragma unroll
                for (int k = 0; k < kPart; k++)
                  v[j][k] = i + j <= others ? __ldcg(partial(mine + i + j, f) + (part + k) * 128) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
              for (int j = 0; j < kAtOnce; j++)
#pragma unroll
                for (int k = 0; k < kPart; k++) {
                  float* to = d[f] + 4 * (part + k);
                  to[0] += v[j][k].x, to[1] += v[j][k].y, to[2] += v[j][k].z, to[3] += v[j][k].w;
                }
            }
          }
        }
      }

      TRACE(5);
      // ---- epilogue: turn the tile token by token through shared memory, so that rows leave in whole lines ---------------------------
      int m_tile, n_tile;
      tile_position(p, s.tile, m_tile, n_tile);
      uint8_t* const box = turn + group * S::kPassBytes;
      const uint32_t box_addr = smem_addr(box);
#pragma unroll
      for (int f = 0; f < FR; f++) {
        const int strip0 = (((n_tile * CL + static_cast<int>(rank)) * NWG + group) * FR + f) * 4;
        // Where the 8 rows of one half of a strip stand in the output.
        auto column_of = [&](int strip, int half) { return p.paired != 0 ? half * (p.n / 2) + 8 * strip : 16 * strip + 8 * half; };
        float bias0 = 0.f, bias8 = 0.f;
        if (p.bias != nullptr && strip0 + quarter < p.strips) {
          bias0 = from_16bit<S::BF>(p.bias[column_of(strip0 + quarter, 0) + g]);
          bias8 = from_16bit<S::BF>(p.bias[column_of(strip0 + quarter, 1) + g]);
        }
        // This thread's share of a pass: 16 bytes (8 columns) of every token_step-th token.
        const int unit = p.paired == 2 ? thread & 3 : thread & 7, first_token = p.paired == 2 ? thread >> 2 : thread >> 3;
        const int token_step = p.paired == 2 ? 32 : 16, strip = strip0 + (p.paired == 2 ? unit : unit >> 1);
        const int column = column_of(strip, p.paired == 2 ? 0 : unit & 1);
        const int tokens_here = strip < p.strips ? p.m - m_tile * TN : 0;
        uint16_t* const y = p.y + static_cast<int64_t>(m_tile * TN) * p.ldy + column;
        const uint16_t* const residual = p.residual == nullptr ? nullptr : p.residual + static_cast<int64_t>(m_tile * TN) * p.ldr + column;
#pragma unroll
        for (int pass = 0; pass < TN / S::kPass; pass++) {
          if (m_tile * TN + pass * S::kPass >= p.m) break;
          auto each_unit = [&](auto&& visit) {
#pragma unroll
            for (int i = 0; i < S::kPass * 8 / 128; i++) {
              const int token = first_token + i * token_step;
              if (token < S::kPass && pass * S::kPass + token < tokens_here)
                visit(reinterpret_cast<uint4*>(box + token * 128 + ((unit ^ (token & 7)) << 4)), static_cast<int64_t>(pass * S::kPass + token));
            }
          };
          named_barrier(1 + group, 128);
          if (residual != nullptr) {
            each_unit([&](uint4* at, int64_t token) { *at = *reinterpret_cast<const uint4*>(residual + token * p.ldr); });
            named_barrier(1 + group, 128);
          }
#pragma unroll
          for (int half = 0; half < S::kPass / 16; half++) {
            const float* v = d[f] + (pass * S::kPass / 8 + half * 2) * 4;
            if (p.paired == 2) {
              const int token = half * 16 + (lane & 15);
              uint32_t r[2];
#pragma unroll
              for (int j = 0; j < 2; j++)
                r[j] = pack<S::BF>(silu(v[4 * j] + bias0) * (v[4 * j + 2] + bias8), silu(v[4 * j + 1] + bias0) * (v[4 * j + 3] + bias8));
              stmatrix_x2_trans(box_addr + token * 128 + ((quarter ^ (token & 7)) << 4), r[0], r[1]);
            } else {
              const int token = half * 16 + (lane >> 4) * 8 + (lane & 7), at_unit = quarter * 2 + ((lane >> 3) & 1);
              const uint32_t at = box_addr + token * 128 + ((at_unit ^ (token & 7)) << 4);
              uint32_t r[4];
              if (residual != nullptr) {
                ldmatrix_x4_trans(r, at);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                  const float bias = j % 2 == 0 ? bias0 : bias8;
                  r[j] = pack<S::BF>(v[2 * j] + bias + from_16bit<S::BF>(r[j] & 0xffff), v[2 * j + 1] + bias + from_16bit<S::BF>(r[j] >> 16));
                }
              } else {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                  const float bias = j % 2 == 0 ? bias0 : bias8;
                  r[j] = pack<S::BF>(v[2 * j] + bias, v[2 * j + 1] + bias);
                }
              }
              stmatrix_x4_trans(at, r[0], r[1], r[2], r[3]);
            }
          }
          named_barrier(1 + group, 128);
          each_unit([&](uint4* at, int64_t token) { *reinterpret_cast<uint4*>(y + token * p.ldy) = *at; });
        }
      }
    }
  }
  TRACE(6);
  if constexpr (CL > 1) cluster_sync();  // a neighbour may still signal this block's barriers
#endif
}

// ---- launch ---------------------------------------------------------------------------------------------------------------------------

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                            const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, asked for at run time: the library loads where there is no driver.
Encode tensor_map_encoder() {
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  return encode;
}

// The packed weight as [strips][chunks][bytes of a chunk], in units of 8 bytes; a box is one chunk of `strips` strips.
bool map_weight(CUtensorMap& map, const WgmmaGemm& call, const Params& p, int strips) {
  const Encode encode = tensor_map_encoder();
  if (encode == nullptr) return false;
  const cuuint64_t chunk = static_cast<cuuint64_t>(p.chunk_bytes);
  const cuuint64_t size[3] = {chunk / 8, static_cast<cuuint64_t>(p.chunks), static_cast<cuuint64_t>(p.strips)}, stride[2] = {chunk, chunk * p.chunks};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(chunk / 8), 1, static_cast<cuuint32_t>(strips)}, step[3] = {1, 1, 1};
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT64, 3, const_cast<void*>(call.weight), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// x [m, k]; a box is 64 k of `tokens` tokens, zeros beyond m and k.
bool map_tokens(CUtensorMap& map, const WgmmaGemm& call, int tokens) {
  const Encode encode = tensor_map_encoder();
  if (encode == nullptr) return false;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(call.k), static_cast<cuuint64_t>(call.m)}, stride[1] = {static_cast<cuuint64_t>(call.ldx) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(tokens)}, step[2] = {1, 1};
  return encode(&map, call.bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(call.x), size, stride, box,
                step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

struct Device {
  int multiprocessors, shared_bytes;  // shared memory one block may have
};
cudaError_t current_device(Device& out) {
  static std::mutex lock;
  static Device known[64];
  int id = 0;
  cudaError_t error = cudaGetDevice(&id);
  if (error != cudaSuccess) return error;
  if (id >= 64) return cudaErrorInvalidDevice;
  const std::lock_guard<std::mutex> hold(lock);
  if (known[id].multiprocessors == 0) {
    int multiprocessors = 0;
    if ((error = cudaDeviceGetAttribute(&known[id].shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id)) != cudaSuccess) return error;
    if ((error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, id)) != cudaSuccess) return error;
    known[id].multiprocessors = multiprocessors;
  }
  out = known[id];
  return cudaSuccess;
}

template <class S>
cudaError_t launch(const WgmmaGemm& call, Params p, int blocks_per_sm, cudaStream_t stream) {
  Device device;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  CUtensorMap weights, tokens;
  if (!map_weight(weights, call, p, S::kStrips) || !map_tokens(tokens, call, S::TN / S::CL)) return cudaErrorInvalidValue;

  const int shared_limit = (device.shared_bytes + 1024) / (blocks_per_sm == 3 ? 2 : blocks_per_sm) - 1024;
  if (blocks_per_sm == 3) blocks_per_sm = 1;
  p.stages = (shared_limit - S::fixed_bytes(0)) / (S::slot_bytes(p.chunk_bytes) + 16);
  p.m_tiles = (p.m + S::TN - 1) / S::TN;
  p.n_tiles = (p.strips + S::kStrips * S::CL - 1) / (S::kStrips * S::CL);
  p.tiles = p.m_tiles * p.n_tiles;
  p.clusters = std::min({device.multiprocessors / S::CL * blocks_per_sm, p.tiles * p.chunks, kMaxSplitBlocks / S::CL});
  const int over = p.tiles % p.clusters;
  p.split_tiles = p.tiles < p.clusters || over == 0 ? over : over + p.clusters;
  if (p.stages < 2 || sizeof(float) * p.clusters * S::CL * S::kRows * S::TN > kPartialBytes) return cudaErrorInvalidValue;
  const int shared = S::fixed_bytes(p.stages) + p.stages * S::slot_bytes(p.chunk_bytes);

  const auto kernel = gemm_wgmma_kernel<S>;
  static std::once_flag prepared[64];
  int id = 0;
  if ((error = cudaGetDevice(&id)) != cudaSuccess) return error;
  std::call_once(prepared[id], [&] { error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes); });
  if (error != cudaSuccess) return error;

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(p.clusters * S::CL);
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {S::CL, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = call.dependent_launch ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, weights, tokens, p);
}

template <bool BF, bool ONE>
cudaError_t choose(const WgmmaGemm& call, const Params& p, cudaStream_t stream) {
  int tokens = call.tokens, cluster = call.cluster, blocks = call.blocks_per_sm;
  if (tokens == 0) tokens = p.m <= 16 ? 16 : p.m <= 32 ? 32 : p.m <= 64 ? 64 : p.m <= 128 ? 128 : 256;
  if (cluster == 0) cluster = tokens >= 64 ? 2 : 1;
  if (blocks == 0) blocks = 1;
  switch (tokens * 1000 + cluster * 100 + call.groups_per_block * 10 + blocks) {
#define GPTQ_CASE(TN, FR, CL, NWG, BLOCKS) \
  case TN * 1000 + CL * 100 + NWG * 10 + BLOCKS: return launch<Shape<BF, ONE, TN, FR, CL, NWG>>(call, p, BLOCKS, stream);
    GPTQ_CASE(16, 1, 1, 2, 1) GPTQ_CASE(16, 1, 1, 2, 2) GPTQ_CASE(16, 1, 1, 2, 3) GPTQ_CASE(16, 1, 1, 4, 1)
    GPTQ_CASE(32, 1, 1, 2, 1) GPTQ_CASE(32, 1, 1, 2, 2) GPTQ_CASE(32, 1, 1, 2, 3) GPTQ_CASE(32, 1, 1, 4, 1)
    GPTQ_CASE(64, 1, 1, 2, 1) GPTQ_CASE(64, 1, 1, 2, 2) GPTQ_CASE(64, 1, 1, 2, 3) GPTQ_CASE(64, 1, 1, 4, 1) GPTQ_CASE(64, 1, 2, 4, 1)
    GPTQ_CASE(128, 1, 1, 3, 1) GPTQ_CASE(128, 1, 1, 4, 1) GPTQ_CASE(128, 1, 2, 3, 1) GPTQ_CASE(128, 2, 1, 2, 1)
    GPTQ_CASE(256, 1, 1, 2, 1) GPTQ_CASE(256, 1, 2, 2, 1)
#undef GPTQ_CASE
  }
  return cudaErrorInvalidValue;
}

}  // namespace

size_t gemm_wgmma_workspace_bytes() { return kFlagBytes + kPartialBytes; }

cudaError_t gemm_wgmma(const WgmmaGemm& call, cudaStream_t stream) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  if (call.m <= 0 || call.n <= 0 || call.k <= 0 || call.n % 16 || call.k % 8 || call.ldx % 8 || call.ldy % 8 || call.ldr % 8) return cudaErrorInvalidValue;
  if (!aligned(call.weight) || !aligned(call.x) || !aligned(call.y) || !aligned(call.residual) || !aligned(call.workspace)) return cudaErrorInvalidValue;
  if ((call.groups != 1 && call.groups != 2 && call.groups != 4) || call.paired < 0 || call.paired > 2 ||
      (call.paired == 2 && call.residual != nullptr))
    return cudaErrorInvalidValue;
  Params p = {};
  p.y = static_cast<uint16_t*>(call.y);
  p.bias = static_cast<const uint16_t*>(call.bias);
  p.residual = static_cast<const uint16_t*>(call.residual);
  p.flags = static_cast<int*>(call.workspace);
  p.partials = reinterpret_cast<float*>(static_cast<uint8_t*>(call.workspace) + kFlagBytes);
  p.m = call.m;
  p.n = call.n;
  p.strips = call.n / kStripRows;
  p.chunks = (call.k + kChunkK - 1) / kChunkK;
  p.chunk_bytes = chunk_bytes(call.groups, call.zeros);
  p.ldy = call.ldy;
  p.ldr = call.ldr;
  p.groups = call.groups;
  p.zeros = call.zeros;
  p.paired = call.paired;
  const bool one = call.groups == 1;
  if (call.bf16) return one ? choose<true, true>(call, p, stream) : choose<true, false>(call, p, stream);
  return one ? choose<false, true>(call, p, stream) : choose<false, false>(call, p, stream);
}

}  // namespace gptq
