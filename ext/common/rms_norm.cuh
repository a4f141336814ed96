// RMSNorm's arithmetic, for the kernel in ops/ and for a GEMV that normalizes its own x: a row has the same bits from either.
//
// The sum of squares has one order, whatever the number of rows and of threads that serve one. A row is shared by 8 warps: lane l of warp w
// takes the four elements from k = 1024 j + 128 w + 4 l, for j = 0, 1, ... So warp w of a GEMV meets just those of its own chunks of 128. A
// lane adds even and odd j up apart, then both; lanes are added up as a tree, then the warps.
#pragma once
#include <cstdint>

#include "common/vector.cuh"

namespace gptq {

constexpr int kNormWarps = 8, kNormLanes = kNormWarps * 32;
constexpr int kNormVector = 4, kNormStep = kNormLanes * kNormVector;  // elements of a lane at a time, and from one j to the next

template <bool BF>
__device__ __forceinline__ void unpack4(float (&to)[4], const uint2& from) {
  const uint32_t words[2] = {from.x, from.y};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if constexpr (BF) {
      to[2 * i] = __uint_as_float(words[i] << 16), to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      to[2 * i] = both.x, to[2 * i + 1] = both.y;
    }
  }
}

// Of a lane. What is not there counts as zeros, and need not be added.
struct SquareSum {
  float parity[2] = {0.f, 0.f};

  template <bool BF>
  __device__ __forceinline__ void add(int j, const uint2& x) {
    float v[4];
    unpack4<BF>(v, x);
#pragma unroll
    for (int i = 0; i < 4; i++) parity[j & 1] = __fmaf_rn(v[i], v[i], parity[j & 1]);
  }
  // Of the warp, in every lane.
  __device__ __forceinline__ float of_warp() const {
    float sum = __fadd_rn(parity[0], parity[1]);
#pragma unroll
    for (int step = 16; step; step >>= 1) sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, step));
    return sum;
  }
};

// What the row is multiplied by, from the sums of its 8 warps (in shared memory, 16-byte aligned) and 1 / its length.
__device__ __forceinline__ float norm_scale(const float* of_warps, float inverse, float eps) {
  const float4 a = reinterpret_cast<const float4*>(of_warps)[0], b = reinterpret_cast<const float4*>(of_warps)[1];
  const float low = __fadd_rn(__fadd_rn(a.x, a.y), __fadd_rn(a.z, a.w)), high = __fadd_rn(__fadd_rn(b.x, b.y), __fadd_rn(b.z, b.w));
  return rsqrtf(__fmaf_rn(__fadd_rn(low, high), inverse, eps));
}

template <bool BF>
__device__ __forceinline__ uint2 normalized(const uint2& x, float scale, const uint2& weight) {
  float v[4], w[4];
  unpack4<BF>(v, x);
  unpack4<BF>(w, weight);
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = v[i] * scale * w[i];
  return make_uint2(pack2<BF>(v[0], v[1]), pack2<BF>(v[2], v[3]));
}

}  // namespace gptq
