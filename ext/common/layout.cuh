// The packed weight: one layout that serves every M, on every architecture.
//
// Output rows come in strips of 16, k in chunks of 128; a strip's chunks follow one another, strips follow one another:
//
//   stream[strip][chunk] = | 1024 B int4 | G x 32 B scales | G x 16 B zero points (asymmetric only) |
//
//   G       groups per chunk: 4 (group 32), 2 (group 64), 1 (group 128, 256, ... and one group for all of K: repeated per chunk).
//   int4    2 blocks of 64 k, 32 lanes x 16 B each. Word j of lane 4g+t is k16 step j of the block, and holds what that lane feeds to
//           the A operand of mma.m16n8k16, or of wgmma m64nNk16 where warp i of a warpgroup owns strip i. Nibble p / p+4 is the
//           first / second k of pair p:
//             p0 (row g, k 2t)   p1 (row g+8, k 2t)   p2 (row g, k 2t+8)   p3 (row g+8, k 2t+8)      k relative to 64*block + 16*j
//   scales  __half2 (scale of row g, scale of row g+8) at 4g. Always fp16, as checkpoints hold them: the same bytes serve bf16 activations.
//   zeros   u8 pair (row g, row g+8) at 2g, values 0..16 (readers of the first format add one to a stored 15).
//
// "Row g" is a position in the strip. Normally rows are consecutive; a row-paired weight has (gate_i, up_i) at (g, g+8), i = 8*strip + g.
// K is padded to a multiple of 128 with weights equal to their zero point, so padding contributes exactly 0 to any finite x.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace gptq {

constexpr int kStripRows = 16;
constexpr int kChunkK = 128;
constexpr int kBlockBytes = 512;               // 64 k of one strip
constexpr int kWeightBytes = 2 * kBlockBytes;  // 128 k of one strip

template <int G, bool ZP>
struct Chunk {
  static constexpr int kGroups = G;
  static constexpr bool kHasZeros = ZP;
  static constexpr int kScaleOffset = kWeightBytes;
  static constexpr int kZeroOffset = kWeightBytes + 32 * G;
  static constexpr int kBytes = kZeroOffset + (ZP ? 16 * G : 0);  // a multiple of 16: a legal bulk copy
};

__host__ __device__ constexpr int chunk_bytes(int groups, bool zeros) { return kWeightBytes + 32 * groups + (zeros ? 16 * groups : 0); }

// ---- dequantization: exact, one logic operation and one subtraction (or fma) for two weights ------------------------------------
// An fp16 with exponent bits 0x6400 and v in its low nibble is 1024+v, with v in the next nibble 1024+16v; a bf16 with 0x4300 is 128+v.

__device__ __forceinline__ uint32_t and_or(uint32_t q, uint32_t mask, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(q), "r"(mask), "r"(bits));
  return r;
}
__device__ __forceinline__ uint32_t sub_h2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ uint32_t fma_h2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
__device__ __forceinline__ uint32_t sub_bf2(uint32_t a, uint32_t b) {
  // sub.bf16x2 exists from sm_90 on; a*1 - b as one fma is exact as well and runs everywhere.
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3f803f80u), "r"(b ^ 0x80008000u));
  return r;
}

// What dequant() needs to know of the zero points of rows g and g+8.
struct ZeroPair {
  uint32_t g, g8;
};

template <bool BF>
__device__ __forceinline__ ZeroPair symmetric_zeros() {
  return BF ? ZeroPair{0x43084308u, 0x43084308u} : ZeroPair{0x64086408u, 0xd480d480u};  // 128+8, 128+8 | 1024+8, -(64+8)
}

// `pair` is the u16 of the zeros section: row g in the low byte, row g+8 in the high byte, 0..16 each.
template <bool BF>
__device__ __forceinline__ ZeroPair load_zeros(uint32_t pair) {
  const uint32_t a = pair & 255u, b = pair >> 8;
  if constexpr (BF) return {(0x4300u | a) * 0x10001u, (0x4300u | b) * 0x10001u};
  return {(0x6400u | a) * 0x10001u, (0xd400u | (b << 4)) * 0x10001u};  // fp16: 1024+z and -(64+z), ulp 1/16
}

// One word -> the lane's A fragment of a k16 step, as weight - zero (integers in -16..15, exact in fp16 and bf16), scale not applied:
// a[0] row g k 2t,2t+1 | a[1] row g+8 | a[2] row g k 2t+8,2t+9 | a[3] row g+8.
template <bool BF>
__device__ __forceinline__ void dequant(uint32_t q, uint32_t (&a)[4], ZeroPair z) {
  if constexpr (BF) {
    constexpr uint32_t kLow = 0x000f000fu, k128 = 0x43004300u;
    a[0] = sub_bf2(and_or(q, kLow, k128), z.g);
    a[1] = sub_bf2(and_or(q >> 4, kLow, k128), z.g8);
    a[2] = sub_bf2(and_or(q >> 8, kLow, k128), z.g);
    a[3] = sub_bf2(and_or(q >> 12, kLow, k128), z.g8);
  } else {
    constexpr uint32_t kLow = 0x000f000fu, kHigh = 0x00f000f0u, k1024 = 0x64006400u, kSixteenth = 0x2c002c00u;
    a[0] = sub_h2(and_or(q, kLow, k1024), z.g);
    a[1] = fma_h2(and_or(q, kHigh, k1024), kSixteenth, z.g8);
    q >>= 8;
    a[2] = sub_h2(and_or(q, kLow, k1024), z.g);
    a[3] = fma_h2(and_or(q, kHigh, k1024), kSixteenth, z.g8);
  }
}

// ---- dequantization for mma with the zero point taken out afterwards: one logic operation for two weights --------------------------
// sum_k (v - z) x = sum_k v x - z sum_k x, and the second sum costs one more mma per k16 step, shared by all strips of a warp.
// fp16: v in the low bits of a half is the subnormal v * 2^-24 (next nibble: v * 2^-20), which tensor cores multiply exactly and at full
// rate; the powers of two leave with the last reduction. bf16 has no such room below, so there it is 128 + v.
template <bool BF>
__device__ __forceinline__ void expand(uint32_t q, uint32_t (&a)[4]) {
  constexpr uint32_t kLow = 0x000f000fu, kHigh = 0x00f000f0u, k128 = 0x43004300u;
  if constexpr (BF) {
    a[0] = and_or(q, kLow, k128);
    a[1] = and_or(q >> 4, kLow, k128);
    a[2] = and_or(q >> 8, kLow, k128);
    a[3] = and_or(q >> 12, kLow, k128);
  } else {
    a[0] = q & kLow;
    a[1] = q & kHigh;
    q >>= 8;
    a[2] = q & kLow;
    a[3] = q & kHigh;
  }
}

template <bool BF, bool ZP>
struct Offset {
  // A operand that makes mma compute the correction: -(8) sum x with a known zero point, else -sum x, in the scale of expand(); kG8: what
  // row g+8 has over row g.
  static constexpr uint32_t kRowG = BF ? (ZP ? 0xbf80bf80u : 0xc308c308u) : (ZP ? 0x80018001u : 0x80088008u);
  static constexpr uint32_t kRowG8 = BF ? (ZP ? 0xbf80bf80u : 0xc308c308u) : (ZP ? 0x80108010u : 0x80808080u);
  static constexpr float kG8 = BF ? 1.f : 16.f;
  static constexpr float kUnscaleG = BF ? 1.f : 16777216.f;  // what expand() left in the sums of rows g and g+8
  static constexpr float kUnscaleG8 = BF ? 1.f : 1048576.f;
  static constexpr float kZeroBase = BF ? 128.f : 0.f;
};

// (scale of row g, scale of row g+8) of a chunk's group, from the word at kScaleOffset + 32*group + 4*g.
__device__ __forceinline__ float2 scale_pair(uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

}  // namespace gptq
