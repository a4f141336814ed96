// Elements in pairs and by eights, between 16 bits and float: one place, so that every kernel rounds alike.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/pairing.h"

namespace gptq {

template <bool BF>
__device__ __forceinline__ uint16_t to_16bit(float v) {
  if constexpr (BF) return __bfloat16_as_ushort(__float2bfloat16_rn(v));
  return __half_as_ushort(__float2half_rn(v));
}
template <bool BF>
__device__ __forceinline__ float from_16bit(uint16_t v) {
  if constexpr (BF) return __bfloat162float(__ushort_as_bfloat16(v));
  return __half2float(__ushort_as_half(v));
}

// x in the low half.
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

template <bool BF>
__device__ __forceinline__ void unpack8(float (&to)[8], const uint4& from) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (BF) {
      to[2 * i] = __uint_as_float(words[i] << 16), to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      to[2 * i] = both.x, to[2 * i + 1] = both.y;
    }
  }
}

template <bool BF>
__device__ __forceinline__ uint4 pack8(const float (&from)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) words[i] = pack2<BF>(from[2 * i], from[2 * i + 1]);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.f + __expf(-v)); }

// What rows g and g+8 give where they make one output, before it is rounded; `other`: of the residual, 0 without. Operations are written
// out, so that kernels whose bits are to be the same need only call it.
__device__ __forceinline__ float join_rows(int paired, float first, float second, float other) {
  if (paired == kGated) return __fmaf_rn(silu(first), second, other);
  const float sum = __fadd_rn(first, second);
  return paired == kPlanes ? __fadd_rn(sum, other) : __fmul_rn(silu(sum), other);
}

}  // namespace gptq
