// How a warp of a GEMM turns packed weights into the A operand of wgmma or mma.
#pragma once
#include "common/layout.cuh"
#include "common/vector.cuh"

namespace gptq {
namespace {

// Scales and zero points of rows g and g+8 for one group.
template <bool BF>
struct RowPair {
  ZeroPair zero;
  uint32_t scale[2], rest[2];  // bf16: the fp16 scale is scale + rest to 16 bits

  RowPair() = default;
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
#if __CUDA_ARCH__ >= 900
        asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(low) : "r"(a[i]), "r"(rest[i & 1]));
#else  // which has no such instruction: plus -0
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(low) : "r"(a[i]), "r"(rest[i & 1]), "r"(0x80008000u));
#endif
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
      if (zeros)
        zero[i] = *reinterpret_cast<const uint16_t*>(chunk + kWeightBytes + 32 * (GROUPS == 1 ? 1 : groups) + 16 * group + (lane & 28) / 2);
    }
  }
};

}  // namespace
}  // namespace gptq
