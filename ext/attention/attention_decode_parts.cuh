// What the attention kernel is made of: asynchronous copies that fill with zeros, fragments of keys, values and queries in either type of
// cache, and partial results and how they add up.
#pragma once
#include <cuda_fp8.h>

#include "attention/attention_decode_schedule.cuh"
#include "common/layout.cuh"
#include "common/ptx.cuh"
#include "attention/rotary.cuh"

namespace gptq {

// Hopper and the large Blackwell have 228 KiB of shared memory per multiprocessor, others 100 to 164.
inline bool has_small_shared_memory(int capability) { return capability < 90 || capability >= 120; }
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr bool kSmall = true;
#else
constexpr bool kSmall = false;
#endif

// Sizes of the kernel for a head dimension and a cache of FP8 or 16-bit elements.
template <int D, bool FP8, bool SMALL = kSmall>
struct AttentionShape {
  static constexpr int kElement = FP8 ? 1 : 2;
  static constexpr int kRow = D * kElement;       // bytes of a token's key
  static constexpr int kChunks = kRow / 16;       // 16-byte pieces of it
  static constexpr int kEntry = kTile * kRow;     // a tile of keys, or of values
  // Entries of a warp's ring: keys, values, keys, ... No more, so that a block fits beside a product's.
  static constexpr int kDepth = !SMALL ? (kEntry >= 8192 ? 2 : 4) : kEntry >= 4096 ? 16384 / kEntry : 6;
  static constexpr int kTiles = D / 16;           // m-tiles of the output: rows are dimensions, columns heads
  static constexpr int kRing = kAttentionWarps * kDepth * kEntry;
  static constexpr int kQueryStride = D * 2 + 16;  // bytes; so that no bank is met twice
};

// Lanes of a fragment whose columns hold a head: they come first in the order of lane_slot.
__host__ __device__ constexpr int head_lanes(int part_heads) { return 8 * ((part_heads + 1) / 2); }
// Shared memory for results of the warps, or queries.
template <int D>
__host__ __device__ constexpr int exchange_bytes(int part_heads) {
  const int sums = kAttentionWarps * (D / 16) * head_lanes(part_heads) * 16, queries = kPartHeads * (D * 2 + 16);
  return sums > queries ? sums : queries;
}
template <class Team, int D>
__host__ __device__ constexpr int scratch_bytes(int part_heads) {
  if (Team::kWarps == 1) return kAttentionWarps * (kPartHeads * (D * 2 + 16) + kScratchInts * 4);
  return exchange_bytes<D>(part_heads) + kAttentionWarps * kPartHeads * 8 + kScratchInts * 4;
}
template <class Team, int D, bool FP8>
constexpr int attention_smem(int part_heads, bool small) {
  const int ring = small ? AttentionShape<D, FP8, true>::kRing : AttentionShape<D, FP8, false>::kRing;
  return ring + scratch_bytes<Team, D>(part_heads);
}
// Floats of a chunk's result in the workspace: the fragments, then for each warp (maximum, sum) of each head.
__host__ __device__ constexpr int slot_floats(int head_dim, int part_heads) {
  return head_dim / 16 * head_lanes(part_heads) * 4 + kAttentionWarps * 2 * kPartHeads;
}

// The 128 bytes from `from` on, into the L1.
__device__ __forceinline__ void prefetch_line(const void* from) { asm volatile("prefetch.global.L1 [%0];" ::"l"(from)); }
// 16 bytes, or 16 zeros.
__device__ __forceinline__ void cp_async16_or_zero(uint32_t dst, const void* src, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr) : "memory");
}
__device__ __forceinline__ uint32_t transpose8x8(uint32_t v) {
  uint32_t r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}
__device__ __forceinline__ float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

__device__ __forceinline__ void sts128(uint32_t addr, const uint4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void sts64(uint32_t addr, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(addr), "r"(x), "r"(y) : "memory");
}

// What another block reads while both run. A word is either there or kEmpty, a NaN that no arithmetic makes, so nothing need be ordered: a fence
// would wait for every load in flight on the multiprocessor, the next kernel's among them.
constexpr uint32_t kEmpty = 0xffffffffu;
__device__ __forceinline__ float4 load_exchanged(const float4* from) {
  float4 v;
  asm volatile("ld.volatile.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
  return v;
}
__device__ __forceinline__ void store_exchanged(float4* to, const float4& v) {
  asm volatile("st.volatile.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ bool is_there(const float4& v) {
  return __float_as_uint(v.x) != kEmpty && __float_as_uint(v.y) != kEmpty && __float_as_uint(v.z) != kEmpty && __float_as_uint(v.w) != kEmpty;
}

// Where 16-byte piece `chunk` of row `row` of a tile lies: eight rows of a column of pieces never meet in a bank.
template <int CHUNKS>
__device__ __forceinline__ int swizzled(int chunk, int row) {
  return CHUNKS >= 8 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
}

__device__ __forceinline__ uint32_t halves_of_e4m3(uint32_t two) {
  const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3);
  return raw.x | static_cast<uint32_t>(raw.y) << 16;
}

template <bool BF>
__device__ __forceinline__ uint32_t pack2(float x, float y) {
  if constexpr (BF) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&both);
  } else {
    const __half2 both = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
}

// To fp16, what is beyond its range to the range's end; NaN stays NaN.
__device__ __forceinline__ uint4 pack8_saturated(float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = fabsf(v[i]) > 65504.f ? copysignf(65504.f, v[i]) : v[i];
  return pack8<false>(v);
}

// s[m] += keys of tokens 16m .. 16m+15 of the tile times the queries. q[j]: B fragment of dimensions 16j .. 16j+15; with FP8, whose fragments come
// as four neighbouring bytes a lane, the dimensions of a step are permuted (see query_dimension).
template <int D, bool FP8, bool BF>
__device__ __forceinline__ void scores(float (&s)[2][4], uint32_t tile, const uint32_t (&q)[D / 16][2], int lane) {
  using Shape = AttentionShape<D, FP8>;
  if constexpr (FP8) {
    const int row = (lane & 7) + (lane >> 3 & 1) * 8, half = lane >> 4;
#pragma unroll
    for (int j = 0; j < D / 16; j += 2)
#pragma unroll
      for (int m = 0; m < 2; m++) {
        uint32_t r[4];
        ldmatrix_x4(r, tile + (16 * m + row) * Shape::kRow + swizzled<Shape::kChunks>(j + half, row) * 16);
        const uint32_t a[4] = {halves_of_e4m3(r[0] & 0xffff), halves_of_e4m3(r[1] & 0xffff), halves_of_e4m3(r[0] >> 16), halves_of_e4m3(r[1] >> 16)};
        const uint32_t b[4] = {halves_of_e4m3(r[2] & 0xffff), halves_of_e4m3(r[3] & 0xffff), halves_of_e4m3(r[2] >> 16), halves_of_e4m3(r[3] >> 16)};
        mma_m16n8k16<false>(s[m], a, q[j][0], q[j][1]);
        mma_m16n8k16<false>(s[m], b, q[j + 1][0], q[j + 1][1]);
      }
  } else {
    const int row = (lane & 7) + (lane >> 3 & 1) * 8, half = lane >> 4;
#pragma unroll
    for (int j = 0; j < D / 16; j++)
#pragma unroll
      for (int m = 0; m < 2; m++) {
        uint32_t a[4];
        ldmatrix_x4(a, tile + (16 * m + row) * Shape::kRow + swizzled<Shape::kChunks>(2 * j + half, row) * 16);
        mma_m16n8k16<BF>(s[m], a, q[j][0], q[j][1]);
      }
  }
}

// First of the two neighbouring dimensions in word i of the B fragment of step j.
template <bool FP8>
__device__ __forceinline__ int query_dimension(int j, int i, int lane) {
  return 16 * j + (FP8 ? 4 * (lane & 3) + 2 * i : 2 * (lane & 3) + 8 * i);
}

// o[k] += values' dimensions 16(i+k) .. 16(i+k)+15, transposed, times p: B fragments of tokens 0..15 and 16..31. i is even.
template <int D, bool FP8, bool BF>
__device__ __forceinline__ void weigh_two(float (&o)[2][4], int i, uint32_t tile, const uint32_t (&p)[2][2], int lane) {
  using Shape = AttentionShape<D, FP8>;
#pragma unroll
  for (int m = 0; m < 2; m++) {
    if constexpr (FP8) {
      const int row = 16 * m + (lane & 7) + (lane >> 3 & 1) * 8, half = lane >> 4;
      uint32_t r[4];
      ldmatrix_x4_trans(r, tile + row * Shape::kRow + swizzled<Shape::kChunks>(i + half, row) * 16);
#pragma unroll
      for (int k = 0; k < 4; k++) r[k] = __byte_perm(r[k], 0, 0x3120);  // bytes: two dimensions of a token, then of the next one
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const uint32_t x = r[2 * k], y = r[2 * k + 1];
        const uint32_t a[4] = {halves_of_e4m3(x & 0xffff), halves_of_e4m3(x >> 16), halves_of_e4m3(y & 0xffff), halves_of_e4m3(y >> 16)};
        mma_m16n8k16<false>(o[k], a, p[m][0], p[m][1]);
      }
    } else {
      const int row = 16 * m + (lane & 7) + (lane >> 4) * 8, half = lane >> 3 & 1;
#pragma unroll
      for (int k = 0; k < 2; k++) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, tile + row * Shape::kRow + swizzled<Shape::kChunks>(2 * (i + k) + half, row) * 16);
        mma_m16n8k16<BF>(o[k], a, p[m][0], p[m][1]);
      }
    }
  }
}

// Dimension that o[i][k] is of, with the fragments of weigh().
template <bool FP8>
__device__ __forceinline__ int output_dimension(int i, int k, int lane) {
  return 16 * i + (FP8 ? 2 * (lane >> 2) + (k >> 1) : (lane >> 2) + 8 * (k >> 1));
}

// Softmax over some tokens, unnormalised: maximum (in powers of two), sum and weighted values of heads 2t and 2t+1; N tiles of 16 dimensions.
template <int N>
struct Partial {
  float max[2], sum[2];
  float o[N][4];

  __device__ __forceinline__ void clear() {
    max[0] = max[1] = -INFINITY, sum[0] = sum[1] = 0;
#pragma unroll
    for (int i = 0; i < N; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;
  }
};

__device__ __forceinline__ float finite_or_zero(float max) { return max == -INFINITY ? 0.f : max; }

// One order of operations, whoever adds: (max, sum) of a head and what its values are multiplied with, then values.
__device__ __forceinline__ void add_sums(float& max, float& sum, float other_max, float other_sum, float& of_this, float& of_other) {
  const float both = fmaxf(max, other_max), base = finite_or_zero(both);
  of_this = exp2_fast(max - base), of_other = exp2_fast(other_max - base);
  max = both;
  sum = __fmaf_rn(other_sum, of_other, __fmul_rn(sum, of_this));
}
__device__ __forceinline__ void add_values(float& v, float other, float of_this, float of_other) { v = __fmaf_rn(other, of_other, __fmul_rn(v, of_this)); }

// a = a and b.
template <int N>
__device__ __forceinline__ void add(Partial<N>& a, const Partial<N>& b) {
  float of_a[2], of_b[2];
#pragma unroll
  for (int h = 0; h < 2; h++) add_sums(a.max[h], a.sum[h], b.max[h], b.sum[h], of_a[h], of_b[h]);
#pragma unroll
  for (int i = 0; i < N; i++)
#pragma unroll
    for (int k = 0; k < 4; k++) add_values(a.o[i][k], b.o[i][k], of_a[k & 1], of_b[k & 1]);
}

}  // namespace gptq
