// The kernel of same_bits.cu, compiled in same_bits_fp16.cu and same_bits_bf16.cu so that two cores work side by side.
//
// What gemv_math.cuh does to a group of a chunk, and gemv_kernel.cuh to the sums of its warps, is done here to more tokens. An operation
// that the compiler could round otherwise (a product and a sum as one) is written out in both.
#pragma once
#include "common/layout.cuh"
#include "common/ptx.cuh"
#include "common/vector.cuh"
#include "gemm/same_bits_table.cuh"

namespace gptq {
namespace {

// A kernel: 32 WARPS output rows x TN tokens. Each warp has two strips. ONE: one scale group per chunk, or fewer.
template <bool BF_, bool ONE_, int WARPS_, int TN_>
struct SameBitsShape {
  static constexpr bool BF = BF_, ONE = ONE_;
  static constexpr int WARPS = WARPS_, TN = TN_, kThreads = 32 * WARPS;
  static constexpr int kStrips = 2 * WARPS, kTiles = TN / 8, kPairs = TN / 16;  // column tiles of eight, and pairs of them
  static constexpr int kAtOnce = kPairs < 2 ? kPairs : 2;                       // pairs that are multiplied with the weights as expanded
  static constexpr int kTokenBytes = TN * kChunkK * 2;                          // of a slot
  static constexpr int kRows = kThreads / 16;                                   // tokens that are brought in at a time
  static constexpr int kBlocksPerSM = WARPS == 4 ? 2 : 1;
};

// A value that the compiler keeps instead of computing it again where it is used.
template <typename T>
__device__ __forceinline__ T kept(T v) {
  if constexpr (sizeof(T) == 8) asm("" : "+l"(v));
  else asm("" : "+r"(v));
  return v;
}

// The chunks of a chain: first, first + kChains, ... below end.
struct Chain {
  int first, end;
  __device__ __forceinline__ Chain(const SameBitsParams& p, int chain) {
    const int segment = chain / kChains * p.segment;
    first = segment + chain % kChains;
    end = min(segment + p.segment, p.k_chunks);
  }
};

// What a block asks for next: a chunk of a tile. A warp brings in the weights of its strips, and with the others the tokens.
template <class S>
struct SameBitsFeed {
  Walk walk;
  const uint8_t* weights;  // of this lane, of the first strip; and what follows from there on, at the start of k
  const uint8_t* meta;     // of this lane, of what comes after the weights of either
  const uint8_t* tokens;   // of this thread's first row
  int strip_bytes, row_bytes;
  int chunk, end, chain, last;  // the next chunk; where its chain ends; the chain, and the one that is no longer this block's
  int rows, strips;             // that exist, from there on
  int meta_strip, meta_from;
  uint32_t weights_to, meta_to, tokens_to;  // in a slot

  __device__ __forceinline__ SameBitsFeed(const SameBitsParams& p) : walk(p, blockIdx.x) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = threadIdx.x >> 4, piece = threadIdx.x & 15;
    const int size = p.chunk_bytes, pieces = (size - kWeightBytes) / 16;
    strip_bytes = kept(p.k_chunks * size);
    row_bytes = kept(2 * S::kRows * p.ldx);
    meta_strip = kept(lane / pieces);
    meta_from = kWeightBytes + lane % pieces * 16;
    weights_to = kept(S::kTokenBytes + warp * 2 * size + lane * 16);
    meta_to = kept(S::kTokenBytes + (warp * 2 + meta_strip) * size + meta_from);
    // A token's 16-byte pieces are permuted by its number modulo 8, so that ldmatrix meets no bank twice.
    tokens_to = kept(row * (kChunkK * 2) + ((piece ^ (row & 7)) << 4));
    open(p);
  }
  __device__ __forceinline__ void start(const SameBitsParams& p) {
    const Chain at(p, chain);
    chunk = at.first, end = at.end;
  }
  __device__ __forceinline__ void open(const SameBitsParams& p) {
    Segment at;
    chain = last = 0;
    if (!walk.next(p, at)) return;
    chain = at.first, last = at.last;
    int m_tile, n_tile;
    tile_position(p, at.tile, m_tile, n_tile);
    const int strip = n_tile * S::kStrips + 2 * (threadIdx.x >> 5), row = m_tile * S::TN + (threadIdx.x >> 4);
    strips = min(p.strips - strip, 2), rows = p.m - row;
    const uint8_t* const of_strip = p.weight + static_cast<int64_t>(strip) * strip_bytes;
    weights = kept(of_strip + (threadIdx.x & 31) * 16);
    meta = kept(of_strip + static_cast<int64_t>(meta_strip) * strip_bytes + meta_from);
    tokens = kept(reinterpret_cast<const uint8_t*>(p.x + static_cast<int64_t>(row) * p.ldx + (threadIdx.x & 15) * 8));
    start(p);
  }
  // Asks for it, into the slot at `to`, and turns to what comes after.
  __device__ __forceinline__ void fetch(const SameBitsParams& p, uint32_t to) {
    if (chain == last) return;
    const int size = p.chunk_bytes, at = chunk * size;
    const uint32_t first = to + weights_to, token = to + tokens_to;
    const uint8_t* const from = weights + at;
    if (strips > 0) cp_async16(first, from), cp_async16(first + kBlockBytes, from + kBlockBytes);
    if (strips > 1) {
      const uint8_t* const second = from + strip_bytes;
      cp_async16(first + size, second), cp_async16(first + size + kBlockBytes, second + kBlockBytes);
    }
    if (meta_strip < strips) cp_async16(to + meta_to, meta + at);
    const int k_left = p.k - chunk * kChunkK - (threadIdx.x & 15) * 8;
    const int rows_here = k_left > 0 ? rows : 0;  // others become zeros, and are not read
    const uint8_t* row = tokens + chunk * (kChunkK * 2);
#pragma unroll
    for (int i = 0; i < S::TN / S::kRows; i++) {
      cp_async16_or_zeros(token + i * S::kRows * kChunkK * 2, row, i * S::kRows < rows_here ? 16 : 0);
      row = kept(row + row_bytes);
    }
    chunk += kChains;
    if (chunk < end) return;
    if (++chain == last) open(p);
    else start(p);
  }
};

// Where a lane finds what it multiplies, in a slot; and, of all shared memory, sums of x: [group][token] float.
struct SameBitsPlaces {
  uint32_t tokens, weights, scales, zeros, own_tokens, sums;
  uint32_t minus;  // what x is multiplied by in them, see Offset
};

// A chunk of a warp's strips: acc += scale * (sum v x - z sum x), group by group, as chunk_mma of gemv_math.cuh. `ask` for the next one,
// once the tensor cores work. Each of the first warps computes the sums of x of 16 tokens, and leaves them for all: x is the A operand
// there, and each column of the product the same.
template <class S, typename Ask>
__device__ __forceinline__ void multiply_chunk(float (&acc)[2][S::kTiles][4], const SameBitsParams& p, const SameBitsPlaces& places,
                                               uint32_t slot, const Ask& ask) {
  using O = Offset<S::BF, true>;
  const uint32_t tokens = slot + places.tokens, weights = slot + places.weights, own = slot + places.own_tokens;
  const int size = p.chunk_bytes, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  constexpr bool kAllSum = S::kPairs == S::WARPS;
  const auto at_k16 = [](uint32_t from, int k16) { return (from ^ k16 % 4 * 32) + k16 / 4 * 128; };  // permuted within 128 bytes
  // Whether a group ends with this k16 step, and which one.
  const auto ends_group = [&](int k16) { return S::ONE ? k16 == 7 : k16 % 4 == 3 || (k16 % 2 == 1 && p.groups == 4); };
  const auto group_of = [&](int k16) { return S::ONE ? 0 : (k16 / 2 * p.groups) >> 2; };

  float off[4] = {};
  const auto sum_up = [&](int k16) {
    if (!kAllSum && warp >= S::kPairs) return;
    uint32_t x[4];
    ldmatrix_x4(x, at_k16(own, k16));
    mma_m16n8k16<S::BF>(off, {x[0], x[2], x[1], x[3]}, places.minus, places.minus);
    if (ends_group(k16)) {
      const uint32_t at = places.sums + (group_of(k16) * S::TN + warp * 16 + (lane >> 2)) * 4;
      if ((lane & 3) == 0) sts32(at, off[0]), sts32(at + 32, off[2]);
#pragma unroll
      for (int i = 0; i < 4; i++) off[i] = 0.f;
    }
  };
  if constexpr (!S::ONE) {
#pragma unroll
    for (int k16 = 0; k16 < 8; k16++) sum_up(k16);
    __syncthreads();
  }
#pragma unroll
  for (int first = 0; first < S::kPairs; first += S::kAtOnce) {
    float part[2][2 * S::kAtOnce][4] = {};
    uint4 q[2];
    uint32_t x[2][S::kAtOnce][4], w[2][2][4];
    const auto bring = [&](int k16) {
#pragma unroll
      for (int pair = 0; pair < S::kAtOnce; pair++)
        ldmatrix_x4(x[k16 & 1][pair], at_k16(tokens, k16) + (first + pair) * 16 * kChunkK * 2);
    };
    const auto expand_k16 = [&](int k16) {
      const int j = k16 % 4;
#pragma unroll
      for (int s = 0; s < 2; s++) {
        if (j == 0) q[s] = lds128(weights + s * size + k16 / 4 * kBlockBytes);
        expand<S::BF>(j == 0 ? q[s].x : j == 1 ? q[s].y : j == 2 ? q[s].z : q[s].w, w[k16 & 1][s]);
      }
    };
    // The group's sums, once complete, with zero points and scales.
    const auto finish = [&](int k16) {
      const int group = group_of(k16);
      float2 scale[2], zero[2];
#pragma unroll
      for (int s = 0; s < 2; s++) {
        scale[s] = scale_pair(lds32(slot + places.scales + s * size + 32 * group));
        zero[s] = make_float2(1.f, 1.f);  // what is in the sums of x then
        if (p.zeros) {
          const uint32_t pair = lds16(slot + places.zeros + s * size + 16 * group);
          zero[s] = make_float2(O::kZeroBase + static_cast<float>(pair & 255u), O::kZeroBase + static_cast<float>(pair >> 8));
        }
      }
#pragma unroll
      for (int n = 0; n < 2 * S::kAtOnce; n++) {
        const float2 found = lds64(places.sums + (group * S::TN + (2 * first + n) * 8 + (lane & 3) * 2) * 4);
        const float off_of[4] = {found.x, found.y, __fmul_rn(found.x, O::kG8), __fmul_rn(found.y, O::kG8)};
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float whole = __fmaf_rn(i < 2 ? zero[s].x : zero[s].y, off_of[i], part[s][n][i]);
            float& sum = acc[s][2 * first + n][i];
            sum = __fmaf_rn(i < 2 ? scale[s].x : scale[s].y, whole, sum);
            part[s][n][i] = 0.f;
          }
      }
    };
    expand_k16(0);
    bring(0);
#pragma unroll
    for (int k16 = 0; k16 < 8; k16++) {
      if (k16 < 7) bring(k16 + 1);
#pragma unroll
      for (int n = 0; n < 2 * S::kAtOnce; n++)
#pragma unroll
        for (int s = 0; s < 2; s++) {
          const uint32_t(&b)[4] = x[k16 & 1][n / 2];
          mma_m16n8k16<S::BF>(part[s][n], w[k16 & 1][s], b[n % 2 * 2], b[n % 2 * 2 + 1]);
        }
      if (S::ONE && first == 0) sum_up(k16);
      if (k16 == 0 && first == 0) ask();
      if (k16 < 7) expand_k16(k16 + 1);
      if (ends_group(k16)) {
        if (S::ONE && first == 0) __syncthreads();
        finish(k16);
      }
    }
  }
}

// Sums of a tile that blocks leave for one another, each lane for its like.
template <class S>
struct Pieces {
  const SameBitsParams& p;
  __device__ __forceinline__ Pieces(const SameBitsParams& p) : p(p) {}
  __device__ __forceinline__ float4* at(int block, int piece) const {
    const int64_t first = (static_cast<int64_t>(block) * kPieceSlots + piece) * S::WARPS + (threadIdx.x >> 5);
    return reinterpret_cast<float4*>(p.partials) + first * (2 * S::kTiles * 32) + (threadIdx.x & 31);
  }
};

template <class S, typename Do>
__device__ __forceinline__ void each(const Do& act) {
#pragma unroll
  for (int s = 0; s < 2; s++)
#pragma unroll
    for (int n = 0; n < S::kTiles; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) act(s, n, i);
}

template <class S>
__device__ __forceinline__ void leave(float4* to, const float (&d)[2][S::kTiles][4]) {
#pragma unroll
  for (int s = 0; s < 2; s++)
#pragma unroll
    for (int n = 0; n < S::kTiles; n++)
      __stcg(to + (s * S::kTiles + n) * 32, make_float4(d[s][n][0], d[s][n][1], d[s][n][2], d[s][n][3]));
}

// d += what was left there.
template <class S>
__device__ __forceinline__ void add_left(float (&d)[2][S::kTiles][4], const float4* from) {
#pragma unroll
  for (int s = 0; s < 2; s++)
#pragma unroll
    for (int n = 0; n < S::kTiles; n++) {
      const float4 v = __ldcg(from + (s * S::kTiles + n) * 32);
      d[s][n][0] += v.x, d[s][n][1] += v.y, d[s][n][2] += v.z, d[s][n][3] += v.w;
    }
}

// Writes a strip: 8x8 corners are turned in registers, so that a lane has two neighbouring outputs of a token. The arithmetic is that of
// Outputs::store in gemv_math.cuh.
template <class S>
__device__ __forceinline__ void store_strip(const SameBitsParams& p, const float (&d)[S::kTiles][4], int strip, int first_token) {
  using O = Offset<S::BF, false>;
  if (strip >= p.strips) return;
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int column[2] = {p.paired ? 8 * strip : 16 * strip, p.paired ? p.n / 2 + 8 * strip : 16 * strip + 8};  // of rows 0 and 8
  float bias[2] = {};
  if (p.bias != nullptr) bias[0] = from_16bit<S::BF>(p.bias[column[0] + g]), bias[1] = from_16bit<S::BF>(p.bias[column[1] + g]);
#pragma unroll
  for (int n = 0; n < S::kTiles; n++) {
    const int token = first_token + n * 8 + g;  // of this lane, once turned
    const bool exists = token < p.m;
    const auto place = [&](const uint16_t* from, int64_t stride, int corner) {
      return reinterpret_cast<const uint32_t*>(from + token * stride + column[corner] + 2 * t);
    };
    const auto residual = [&](int corner) {  // of two tokens
      const uint32_t r = p.residual == nullptr ? 0u : transpose_8x8(exists ? *place(p.residual, p.ldr, corner) : 0u);
      return make_float2(from_16bit<S::BF>(static_cast<uint16_t>(r)), from_16bit<S::BF>(static_cast<uint16_t>(r >> 16)));
    };
    const auto store = [&](int corner, float first, float second) {
      const uint32_t turned = transpose_8x8(pack2<S::BF>(first, second));
      if (exists) *const_cast<uint32_t*>(place(p.y, p.ldy, corner)) = turned;
    };
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = __fmaf_rn(d[n][i], i < 2 ? O::kUnscaleG : O::kUnscaleG8, bias[i / 2]);
    const float2 r = residual(0);
    if (p.paired == 2) {
      store(0, __fmaf_rn(silu(v[0]), v[2], r.x), __fmaf_rn(silu(v[1]), v[3], r.y));
    } else {
      store(0, v[0] + r.x, v[1] + r.y);
      const float2 r8 = residual(1);
      store(1, v[2] + r8.x, v[3] + r8.y);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerSM) same_bits_kernel(const __grid_constant__ SameBitsParams p) {
  extern __shared__ __align__(128) uint8_t smem[];
  using O = Offset<S::BF, true>;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const uint32_t ring = smem_addr(smem), end = ring + p.stages * p.slot;
  grid_launch_dependents();
  grid_wait();
  SameBitsFeed<S> feed(p);
  uint32_t to = ring, slot = ring;
  // As many groups to a slot as make the wait below the same for every depth.
  const auto ask = [&] {
    feed.fetch(p, to);
    cp_async_commit();
    if (p.stages < 4) cp_async_commit();
    if (p.stages < 3) cp_async_commit();
    to += p.slot;
    if (to == end) to = ring;
  };
  for (int i = 0; i < p.stages - 1; i++) ask();
  SameBitsPlaces places;
  {
    // Of 16 tokens and of 16 k, as ldmatrix wants them.
    const int row = (lane & 7) + ((lane >> 4) << 3), half = (lane >> 3) & 1, chunk = S::kTokenBytes + 2 * warp * p.chunk_bytes;
    places.tokens = kept(row * (kChunkK * 2) + ((half ^ (row & 7)) << 4));
    places.own_tokens = kept(places.tokens + warp * 16 * kChunkK * 2);
    places.weights = kept(chunk + lane * 16);
    places.scales = kept(chunk + kWeightBytes + (lane & 28));
    places.zeros = kept(chunk + kWeightBytes + 32 * p.groups + (lane & 28) / 2);
    places.sums = kept(ring + p.sums);
    places.minus = p.zeros ? O::kRowG : Offset<S::BF, false>::kRowG;
  }
  const Pieces<S> pieces(p);
  const int mine = p.clusters - 1 - blockIdx.x;
  Walk walk(p, blockIdx.x);
  Segment s;
#pragma unroll 1
  while (walk.next(p, s)) {
    float total[2][S::kTiles][4] = {}, acc[2][S::kTiles][4];
    const int whole_from = s.first == 0 ? 0 : (s.first + kChains - 1) / kChains * kChains;  // chains before it are left by themselves
    int piece = 0;
#pragma unroll 1
    for (int chain = s.first; chain < s.last; chain++) {
      each<S>([&](int f, int n, int i) { acc[f][n][i] = 0.f; });
      const Chain at(p, chain);
#pragma unroll 1
      for (int c = at.first; c < at.end; c += kChains) {
        cp_async_wait<kSameBitsDepth - 2>();
        __syncthreads();  // the slot has come through all threads, and none still reads the one before
        multiply_chunk<S>(acc, p, places, slot, ask);
        slot += p.slot;
        if (slot == end) slot = ring;
      }
      each<S>([&](int f, int n, int i) { total[f][n][i] += acc[f][n][i]; });
      // The sum of a segment, or of what this block has of one. The first block of a tile keeps that with which it ends, and adds up those
      // before; the others leave each.
      const bool complete = chain % kChains == kChains - 1 || chain + 1 == p.chunks;
      if (s.first == 0) {
        if (!complete || chain + 1 == s.last) continue;
        float4* const before = pieces.at(mine, kPieces);
        if (chain >= kChains) {
          each<S>([&](int f, int n, int i) { acc[f][n][i] = total[f][n][i], total[f][n][i] = 0.f; });
          add_left<S>(total, before);
          each<S>([&](int f, int n, int i) { total[f][n][i] += acc[f][n][i]; });
        }
        leave<S>(before, total);
      } else {
        if (!complete && chain >= whole_from && chain + 1 < s.last) continue;
        leave<S>(pieces.at(mine, piece++), total);
      }
      each<S>([&](int f, int n, int i) { total[f][n][i] = 0.f; });
    }
    if (s.first > 0) {
      __syncwarp();
      if (lane == 0) {
        __threadfence();
        flag_set(p.flags + mine * kMmaWarps + warp);
      }
      continue;
    }
    // The segments before the one that `total` is of; from here on those that are complete.
    auto& sum = acc;
    each<S>([&](int f, int n, int i) { sum[f][n][i] = 0.f; });
    if (s.last > kChains) add_left<S>(sum, pieces.at(mine, kPieces));
    const auto close = [&](int chain) {  // the last one in `total`
      if (chain % kChains != kChains - 1 && chain + 1 != p.chunks) return;
      each<S>([&](int f, int n, int i) { sum[f][n][i] += total[f][n][i], total[f][n][i] = 0.f; });
    };
    close(s.last - 1);
    if (s.last < p.chunks) {
      const int tile_end = (s.tile + 1) * p.chunks;
      for (int i = mine + 1; split_begin(p, i) < tile_end; i++) {
        int* flag = p.flags + i * kMmaWarps + warp;
        if (lane == 0) {
          while (!flag_is_set(flag)) __nanosleep(20);
          *flag = 0;  // ready for the next launch on this stream
        }
        __syncwarp();
        const int first = split_begin(p, i) - s.tile * p.chunks, last = min(split_begin(p, i + 1) - s.tile * p.chunks, p.chunks);
        const int its_whole_from = (first + kChains - 1) / kChains * kChains;
        piece = 0;
#pragma unroll 1
        for (int chain = first; chain < last; chain++) {
          if (chain >= its_whole_from) chain = min(min(chain / kChains * kChains + kChains, p.chunks), last) - 1;
          add_left<S>(total, pieces.at(i, piece++));
          close(chain);
        }
      }
    }
    int m_tile, n_tile;
    tile_position(p, s.tile, m_tile, n_tile);
#pragma unroll
    for (int f = 0; f < 2; f++) store_strip<S>(p, sum[f], n_tile * S::kStrips + 2 * warp + f, m_tile * S::TN);
  }
}

template <class S>
SameBitsKernel info() {
  return {reinterpret_cast<const void*>(same_bits_kernel<S>), S::WARPS, S::kBlocksPerSM};
}

template <bool BF, bool ONE>
SameBitsKernel find_kernel(SameBitsTile tile) {
  switch (tile) {
    case SameBitsTile::k128x16: return info<SameBitsShape<BF, ONE, 4, 16>>();
    case SameBitsTile::k128x32: return info<SameBitsShape<BF, ONE, 4, 32>>();
    case SameBitsTile::k128x64: return info<SameBitsShape<BF, ONE, 4, 64>>();
    case SameBitsTile::k256x64: return info<SameBitsShape<BF, ONE, 8, 64>>();
  }
  return {};
}

template <bool BF>
SameBitsKernel find_kernel(SameBitsTile tile, bool one_group) {
  return one_group ? find_kernel<BF, true>(tile) : find_kernel<BF, false>(tile);
}

}  // namespace
}  // namespace gptq
