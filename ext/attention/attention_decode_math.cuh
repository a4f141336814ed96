// The attention's arithmetic: fragments of keys, values and queries in either type of cache, and partial results: how they cross blocks and
// how they add up.
#pragma once
#include <cuda_fp8.h>

#include "attention/attention_decode_shape.cuh"
#include "common/ptx.cuh"
#include "common/vector.cuh"

namespace gptq {

// The 128 bytes from `from` on, into the L1.
__device__ __forceinline__ void prefetch_line(const void* from) { asm volatile("prefetch.global.L1 [%0];" ::"l"(from)); }
// 16 bytes, or 16 zeros.
__device__ __forceinline__ void cp_async16_or_zero(uint32_t dst, const void* src, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ uint32_t transpose8x8(uint32_t v) {
  uint32_t r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}
// What another block reads while both run. A word is either there or kEmpty, a NaN that no arithmetic makes, so nothing need be ordered: a
// fence would wait for every load in flight on the SM, the next kernel's among them.
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
  return __float_as_uint(v.x) != kEmpty && __float_as_uint(v.y) != kEmpty && __float_as_uint(v.z) != kEmpty &&
         __float_as_uint(v.w) != kEmpty;
}

// Where 16-byte piece `piece` of row `row` of a tile lies: eight rows of a column of pieces never meet in a bank.
template <int PIECES>
__device__ __forceinline__ int swizzled(int piece, int row) {
  return PIECES >= 8 ? piece ^ (row & 7) : piece ^ ((row >> 1) & 3);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
constexpr bool kE4m3HasNaN = true;
#else
constexpr bool kE4m3HasNaN = false;  // it is read as a number
#endif
// Two numbers in the low 16 bits of `two`.
__device__ __forceinline__ uint32_t halves_of_e4m3(uint32_t two) {
#if __CUDA_ARCH__ >= 890
  const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3);
  return raw.x | static_cast<uint32_t>(raw.y) << 16;
#else
  // No conversion in hardware. With its exponent and mantissa where fp16 has them a number is 2^-8 of itself, a subnormal one too, and the
  // product is exact. The one that is none, a NaN, becomes 480: who wrote it has been told so by its logits.
  const uint32_t apart = __byte_perm(two, 0, 0x1404), moved = (apart & 0x80008000u) | (apart >> 1 & 0x3f803f80u);
  const __half2 scaled = __hmul2(*reinterpret_cast<const __half2*>(&moved), __half2half2(__ushort_as_half(0x5c00)));  // 256
  return *reinterpret_cast<const uint32_t*>(&scaled);
#endif
}

// To fp16, what is beyond its range to the range's end; NaN stays NaN.
__device__ __forceinline__ uint4 pack8_saturated(float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = fabsf(v[i]) > 65504.f ? copysignf(65504.f, v[i]) : v[i];
  return pack8<false>(v);
}

// s[m] += keys of tokens 16m .. 16m+15 of the tile times the queries. q[j]: B fragment of dimensions 16j .. 16j+15; with FP8, whose
// fragments come as four neighbouring bytes a lane, the dimensions of a step are permuted (see query_dimension).
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
        ldmatrix_x4(r, tile + (16 * m + row) * Shape::kRow + swizzled<Shape::kPieces>(j + half, row) * 16);
        const uint32_t a[4] = {halves_of_e4m3(r[0] & 0xffff), halves_of_e4m3(r[1] & 0xffff), halves_of_e4m3(r[0] >> 16),
                               halves_of_e4m3(r[1] >> 16)};
        const uint32_t b[4] = {halves_of_e4m3(r[2] & 0xffff), halves_of_e4m3(r[3] & 0xffff), halves_of_e4m3(r[2] >> 16),
                               halves_of_e4m3(r[3] >> 16)};
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
        ldmatrix_x4(a, tile + (16 * m + row) * Shape::kRow + swizzled<Shape::kPieces>(2 * j + half, row) * 16);
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
      ldmatrix_x4_trans(r, tile + row * Shape::kRow + swizzled<Shape::kPieces>(i + half, row) * 16);
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
        ldmatrix_x4_trans(a, tile + row * Shape::kRow + swizzled<Shape::kPieces>(2 * (i + k) + half, row) * 16);
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

// Softmax over some tokens, unnormalised: maximum (in powers of two), sum and weighted values of heads 2t and 2t+1; N tiles of 16
// dimensions.
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
  of_this = exp2_approx(max - base), of_other = exp2_approx(other_max - base);
  max = both;
  sum = __fmaf_rn(other_sum, of_other, __fmul_rn(sum, of_this));
}
__device__ __forceinline__ void add_values(float& v, float other, float of_this, float of_other) {
  v = __fmaf_rn(other, of_other, __fmul_rn(v, of_this));
}

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
