// What every kernel that writes keys does with eight elements: rotation, and rounding into the KV cache. In one place, with explicit
// rounding and no contraction left to the compiler, so that all of them write the same bits.
#pragma once
#include <cuda_fp8.h>

#include <cstdint>

#include "common/vector.cuh"

namespace gptq {

#if __CUDA_ARCH__ < 890
// What __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3) gives, in a tenth of the instructions that it takes where no hardware converts.
__device__ __forceinline__ uint32_t e4m3_of(float v) {
  const uint32_t sign = __float_as_uint(v) >> 24 & 0x80u;
  const float size = fminf(fabsf(v), 448.f);
  // A number whose last bit weighs as much as the result's: an eighth of size's power of two, or 2^-9 for what is subnormal there.
  const float coarse = __uint_as_float((max(__float_as_uint(size) >> 23, 121u) + 20u) << 23);
  const float rounded = __fsub_rn(__fadd_rn(size, coarse), coarse);
  // 2^-120 of it has its exponent, subnormal or not, where e4m3 has it, 20 bits further up.
  return v == v ? sign | __float_as_uint(__fmul_rn(rounded, 0x1p-120f)) >> 20 : 0x7fu;
}
#endif

__device__ __forceinline__ uint2 pack8_e4m3(const float (&from)[8]) {
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 4; i++) {
#if __CUDA_ARCH__ >= 890
    const uint32_t two = __nv_cvt_float2_to_fp8x2(make_float2(from[2 * i], from[2 * i + 1]), __NV_SATFINITE, __NV_E4M3);
#else
    const uint32_t two = e4m3_of(from[2 * i]) | e4m3_of(from[2 * i + 1]) << 8;
#endif
    words[i / 2] |= two << (i % 2 * 16);
  }
  return make_uint2(words[0], words[1]);
}

// Elements i and i + D/2 of a head, which the rotary embedding turns as a pair.
__device__ __forceinline__ void rotate8(float (&low)[8], float (&high)[8], const float (&cos)[8], const float (&sin)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float l = low[i], h = high[i];
    low[i] = __fmaf_rn(l, cos[i], -__fmul_rn(h, sin[i]));
    high[i] = __fmaf_rn(h, cos[i], __fmul_rn(l, sin[i]));
  }
}

// `values` to element `index` of a cache whose elements are of the activations' type, or e4m3.
template <bool BF, bool FP8>
__device__ __forceinline__ void cache8(void* cache, size_t index, const float (&values)[8]) {
  if constexpr (FP8) *reinterpret_cast<uint2*>(static_cast<uint8_t*>(cache) + index) = pack8_e4m3(values);
  else *reinterpret_cast<uint4*>(static_cast<uint16_t*>(cache) + index) = pack8<BF>(values);
}

}  // namespace gptq
