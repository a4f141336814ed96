// The kernel of same_bits.cu, compiled in same_bits_fp16.cu and same_bits_bf16.cu so that two cores work side by side.
//
// What gemv_math.cuh does to a group of a chunk, and gemv_kernel.cuh to the sums of its warps, is done here to more tokens. An operation
// that the compiler could round otherwise (a product and a sum as one) is written out in both.
#pragma once
#include "common/layout.cuh"
#include "common/ptx.cuh"
#include "gemm/same_bits_finish.cuh"
#include "gemm/same_bits_sums.cuh"

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
  static constexpr int kSums = 8 * kTiles;                                      // of a lane: [strip][column tile][4]
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
__device__ __forceinline__ void multiply_chunk(float (&acc)[S::kSums], const SameBitsParams& p, const SameBitsPlaces& places,
                                               uint32_t slot, const Ask& ask) {
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
        zero[s] = zero_pair<S::BF>(p.zeros, p.zeros ? lds16(slot + places.zeros + s * size + 16 * group) : 0u);
      }
#pragma unroll
      for (int n = 0; n < 2 * S::kAtOnce; n++) {
        const float2 off_of = lds64(places.sums + (group * S::TN + (2 * first + n) * 8 + (lane & 3) * 2) * 4);
#pragma unroll
        for (int s = 0; s < 2; s++) {
          finish_group(acc + (s * S::kTiles + 2 * first + n) * 4, part[s][n], scale[s], zero[s], off_of);
#pragma unroll
          for (int i = 0; i < 4; i++) part[s][n][i] = 0.f;
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

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerSM) same_bits_kernel(const __grid_constant__ SameBitsParams p) {
  extern __shared__ __align__(128) uint8_t smem[];
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
    places.minus = minus_of<S::BF>(p.zeros);
  }
  InRegisters<S::kSums> total;
  const auto multiply = [&](const Segment&, int chain, float(&acc)[S::kSums]) {
    const Chain at(p, chain);
#pragma unroll 1
    for (int c = at.first; c < at.end; c += kChains) {
      cp_async_wait<kSameBitsDepth - 2>();
      __syncthreads();  // the slot has come through all threads, and none still reads the one before
      multiply_chunk<S>(acc, p, places, slot, ask);
      slot += p.slot;
      if (slot == end) slot = ring;
    }
  };
  const auto store = [&](int tile, const float(&sums)[S::kSums]) {
    int m_tile, n_tile;
    tile_position(p, tile, m_tile, n_tile);
#pragma unroll
    for (int f = 0; f < 2; f++)
      store_strip<S::BF, S::TN>(p, sums + f * 4 * S::kTiles, n_tile * S::kStrips + 2 * warp + f, m_tile * S::TN);
  };
  add_up<S::kSums>(p, S::WARPS, warp, total, multiply, store);
}

template <class S>
SameBitsKernel info() {
  return {reinterpret_cast<const void*>(same_bits_kernel<S>), S::WARPS, S::kBlocksPerSM, 0};
}

template <bool BF, bool ONE>
SameBitsKernel find_kernel(SameBitsTile tile) {
  switch (tile) {
    case SameBitsTile::k128x16: return info<SameBitsShape<BF, ONE, 4, 16>>();
    case SameBitsTile::k128x32: return info<SameBitsShape<BF, ONE, 4, 32>>();
    case SameBitsTile::k128x64: return info<SameBitsShape<BF, ONE, 4, 64>>();
  }
  return {};
}

template <bool BF>
SameBitsKernel find_kernel(SameBitsTile tile, bool one_group) {
  return one_group ? find_kernel<BF, true>(tile) : find_kernel<BF, false>(tile);
}

}  // namespace
}  // namespace gptq
