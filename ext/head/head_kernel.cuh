// The head's product by mma.sync: persistent blocks of eight warps, tiles of 128 rows of the weight x 8 to 128 tokens, a ring of cp.async.
//
// The weights are the A operand of mma.m16n8k16, 16 rows at a time, and tokens its 8 columns, whatever the tile: see head.h. Up to 32
// tokens a warp has 16 rows and all tokens, beyond 32 rows and half of them, so that fewer operands are read from shared memory. The ring
// runs on over the tiles of its block. Rows that the weight or x does not have, and what a row lacks to whole slots, are zeros.
//
// Programmatic dependent launch: weights of the first slots are asked for before grid_wait(), x after it.
#pragma once
#include "common/ptx.cuh"
#include "head/head_table.cuh"

namespace gptq {
namespace {

template <bool BF_, int TN_>
struct HeadShape {
  static constexpr bool BF = BF_;
  static constexpr int TN = TN_;
  static constexpr int kAcross = TN < 64 ? 1 : 2;            // warps beside each other along the tokens
  static constexpr int kDown = kHeadWarps / kAcross;         // and along the rows
  static constexpr int kStrips = kHeadRows / 16 / kDown;     // of 16 rows, of a warp
  static constexpr int kColumns = TN / 8 / kAcross;          // tiles of 8 tokens, of a warp
  static constexpr int kWeightBytes = kHeadRows * kHeadRowBytes, kSlot = head_slot_bytes(TN);
  static constexpr int kEarly = 2;  // slots whose weights are asked for before x is there
};

// What a thread asks for next: its 16-byte pieces of 64 k of a tile.
template <class S>
struct HeadFeed {
  static constexpr int kRowsAtOnce = kHeadThreads / 8;
  const uint16_t* weights;
  const uint16_t* tokens;
  int tile, left, k_left, rows, token_rows;  // chunks of the tile; of k, the weight and x from this thread's place on

  __device__ __forceinline__ explicit HeadFeed(const HeadParams& p) : tile(blockIdx.x) { open(p); }
  __device__ __forceinline__ void open(const HeadParams& p) {
    left = tile < p.tiles ? p.chunks : 0;
    const int n_tile = tile / p.m_tiles, m_tile = tile - n_tile * p.m_tiles, piece = threadIdx.x & 7;
    const int row = n_tile * kHeadRows + (threadIdx.x >> 3), token = m_tile * S::TN + (threadIdx.x >> 3);
    weights = p.weight + static_cast<int64_t>(row) * p.k + piece * 8;
    tokens = p.x + token * p.ldx + piece * 8;
    rows = p.n - row, token_rows = p.m - token, k_left = p.k - piece * 8;
  }
  // In the slot at `to`.
  static __device__ __forceinline__ uint32_t place(uint32_t to) {
    return to + (threadIdx.x >> 3) * kHeadRowBytes + (((threadIdx.x ^ (threadIdx.x >> 3)) & 7) << 4);
  }
  __device__ __forceinline__ void ask_weights(const HeadParams& p, uint32_t to) const {
    if (left == 0) return;
    const int exist = k_left > 0 ? rows : 0;
#pragma unroll
    for (int i = 0; i < kHeadRows / kRowsAtOnce; i++)
      cp_async16_or_zeros(place(to) + i * kRowsAtOnce * kHeadRowBytes, weights + static_cast<int64_t>(i * kRowsAtOnce) * p.k,
                          i * kRowsAtOnce < exist ? 16 : 0);
  }
  __device__ __forceinline__ void ask_tokens(const HeadParams& p, uint32_t to) const {
    if (left == 0 || (S::TN < kRowsAtOnce && threadIdx.x >= S::TN * 8)) return;
    const int exist = k_left > 0 ? token_rows : 0;
#pragma unroll
    for (int i = 0; i < (S::TN + kRowsAtOnce - 1) / kRowsAtOnce; i++)
      cp_async16_or_zeros(place(to) + S::kWeightBytes + i * kRowsAtOnce * kHeadRowBytes, tokens + i * kRowsAtOnce * p.ldx,
                          i * kRowsAtOnce < exist ? 16 : 0);
  }
  __device__ __forceinline__ void advance(const HeadParams& p) {
    if (left == 0) return;
    weights += kHeadK, tokens += kHeadK, k_left -= kHeadK;
    if (--left == 0) tile += gridDim.x, open(p);
  }
};

// Until at most `behind` groups of copies are under way.
__device__ __forceinline__ void wait_for_copies(int behind) {
  switch (behind) {
    case 1: cp_async_wait<1>(); break;
    case 2: cp_async_wait<2>(); break;
    case 3: cp_async_wait<3>(); break;
    case 4: cp_async_wait<4>(); break;
    case 5: cp_async_wait<5>(); break;
    case 6: cp_async_wait<6>(); break;
    default: cp_async_wait<7>();
  }
}
static_assert(kHeadMinDepth - 2 == 1 && kHeadMaxDepth - 2 == 7, "the cases above");

// 64 k of the warp's part of a tile. `weights`, `tokens`: this lane's first, as ldmatrix wants them.
template <class S>
__device__ __forceinline__ void multiply_slot(float (&d)[S::kStrips][S::kColumns][4], uint32_t weights, uint32_t tokens) {
  uint32_t b8[4];
#pragma unroll
  for (int k16 = 0; k16 < kHeadK / 16; k16++) {
    uint32_t a[S::kStrips][4];
#pragma unroll
    for (int s = 0; s < S::kStrips; s++) ldmatrix_x4(a[s], (weights ^ (k16 << 5)) + s * 16 * kHeadRowBytes);
    if constexpr (S::kColumns == 1) {
      if (k16 % 2 == 0) ldmatrix_x4(b8, tokens ^ (k16 << 5));
      mma_m16n8k16<S::BF>(d[0][0], a[0], b8[k16 % 2 * 2], b8[k16 % 2 * 2 + 1]);
    } else {
      uint32_t b[S::kColumns / 2][4];
#pragma unroll
      for (int pair = 0; pair < S::kColumns / 2; pair++) ldmatrix_x4(b[pair], (tokens ^ (k16 << 5)) + pair * 16 * kHeadRowBytes);
#pragma unroll
      for (int n = 0; n < S::kColumns; n++)
#pragma unroll
        for (int s = 0; s < S::kStrips; s++) mma_m16n8k16<S::BF>(d[s][n], a[s], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kHeadThreads, 1) head_kernel(const __grid_constant__ HeadParams p) {
  extern __shared__ __align__(128) uint8_t smem[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const uint32_t ring = smem_addr(smem), end = ring + p.stages * S::kSlot;
  HeadFeed<S> feed(p);
  {
    HeadFeed<S> early = feed;
    for (int i = 0; i < S::kEarly; i++, early.advance(p)) early.ask_weights(p, ring + i * S::kSlot);
  }
  grid_launch_dependents();
  grid_wait();
  uint32_t to = ring, slot = ring;
  for (int i = 0; i < p.stages - 1; i++, to += S::kSlot) {
    if (i >= S::kEarly) feed.ask_weights(p, to);
    feed.ask_tokens(p, to);
    feed.advance(p);
    cp_async_commit();
  }
  // Of 16 rows and 16 k; of 16 tokens and 16 k, or 8 tokens and 32 k.
  const int strip_row = lane & 15, first_row = warp % S::kDown * S::kStrips * 16, first_token = warp / S::kDown * S::kColumns * 8;
  const int token = S::kColumns == 1 ? lane & 7 : (lane & 7) + ((lane >> 4) << 3), piece = S::kColumns == 1 ? lane >> 3 : (lane >> 3) & 1;
  const uint32_t weights_at = (first_row + strip_row) * kHeadRowBytes + (((lane >> 4) ^ (lane & 7)) << 4);
  const uint32_t tokens_at = S::kWeightBytes + (first_token + token) * kHeadRowBytes + ((piece ^ (lane & 7)) << 4);
#pragma unroll 1
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    float d[S::kStrips][S::kColumns][4] = {};
#pragma unroll 1
    for (int c = 0; c < p.chunks; c++) {
      wait_for_copies(p.stages - 2);
      __syncthreads();  // the slot has come through all threads, and none still reads the one before
      feed.ask_weights(p, to);
      feed.ask_tokens(p, to);
      feed.advance(p);
      cp_async_commit();
      multiply_slot<S>(d, slot + weights_at, slot + tokens_at);
      to = slot;
      slot += S::kSlot;
      if (slot == end) slot = ring;
    }
    const int n_tile = tile / p.m_tiles, m_tile = tile - n_tile * p.m_tiles;
    const int row = n_tile * kHeadRows + first_row + (lane >> 2), token = m_tile * S::TN + first_token + (lane & 3) * 2;
#pragma unroll
    for (int n = 0; n < S::kColumns; n++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        if (token + n * 8 + j >= p.m) continue;
        float* const to_token = p.logits + (token + n * 8 + j) * p.ldl + row;
#pragma unroll
        for (int s = 0; s < S::kStrips; s++) {
          if (row + s * 16 < p.n) to_token[s * 16] = d[s][n][j];
          if (row + s * 16 + 8 < p.n) to_token[s * 16 + 8] = d[s][n][2 + j];
        }
      }
  }
}

template <bool BF>
const void* find_head_kernel(int tokens) {
  switch (tokens) {
    case 8: return reinterpret_cast<const void*>(head_kernel<HeadShape<BF, 8>>);
    case 16: return reinterpret_cast<const void*>(head_kernel<HeadShape<BF, 16>>);
    case 32: return reinterpret_cast<const void*>(head_kernel<HeadShape<BF, 32>>);
    case 64: return reinterpret_cast<const void*>(head_kernel<HeadShape<BF, 64>>);
    case 128: return reinterpret_cast<const void*>(head_kernel<HeadShape<BF, 128>>);
  }
  return nullptr;
}

}  // namespace
}  // namespace gptq
