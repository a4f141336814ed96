// How a warp of the GEMM in the GEMV's order scales the sums of a group, and what it writes: as gemv_math.cuh does.
#pragma once
#include "common/layout.cuh"
#include "common/ptx.cuh"
#include "common/vector.cuh"
#include "gemm/same_bits_table.cuh"

namespace gptq {
namespace {

// What the sums of x of row g are multiplied by for rows g and g+8: zero points, or 1 where the constant in those sums has them already.
// The power of two that row g+8 has over row g is in it; the GEMV has it in the sums, which rounds nothing either.
template <bool BF>
__device__ __forceinline__ float2 zero_pair(bool zeros, uint32_t pair) {
  using O = Offset<BF, true>;
  if (!zeros) return make_float2(1.f, O::kG8);
  return make_float2(O::kZeroBase + static_cast<float>(pair & 255u), (O::kZeroBase + static_cast<float>(pair >> 8)) * O::kG8);
}

// sums += scale * (part + zero * off) for rows g and g+8 and a lane's two tokens of eight; off: of row g.
__device__ __forceinline__ void finish_group(float* sums, const float* part, float2 scale, float2 zero, float2 off) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    sums[i] = __fmaf_rn(i < 2 ? scale.x : scale.y, __fmaf_rn(i < 2 ? zero.x : zero.y, i % 2 ? off.y : off.x, part[i]), sums[i]);
}

// Writes a strip of TN tokens, four sums for each eight of them: 8x8 corners are turned in registers, so that a lane has two neighbouring
// outputs of a token. The arithmetic is that of Outputs::store.
template <bool BF, int TN>
__device__ __forceinline__ void store_strip(const SameBitsParams& p, const float* d, int strip, int first_token) {
  using O = Offset<BF, false>;
  if (strip >= p.strips) return;
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int column[2] = {p.paired ? 8 * strip : 16 * strip, p.paired ? p.n / 2 + 8 * strip : 16 * strip + 8};  // of rows 0 and 8
  float bias[2] = {};
  if (p.bias != nullptr) bias[0] = from_16bit<BF>(p.bias[column[0] + g]), bias[1] = from_16bit<BF>(p.bias[column[1] + g]);
#pragma unroll
  for (int n = 0; n < TN / 8; n++) {
    const int token = first_token + n * 8 + g;  // of this lane, once turned
    const bool exists = token < p.m;
    const auto place = [&](const uint16_t* from, int64_t stride, int corner) {
      return reinterpret_cast<const uint32_t*>(from + token * stride + column[corner] + 2 * t);
    };
    const auto residual = [&](int corner) {  // of two tokens
      const uint32_t r = p.residual == nullptr ? 0u : transpose_8x8(exists ? *place(p.residual, p.ldr, corner) : 0u);
      return make_float2(from_16bit<BF>(static_cast<uint16_t>(r)), from_16bit<BF>(static_cast<uint16_t>(r >> 16)));
    };
    const auto store = [&](int corner, float first, float second) {
      const uint32_t turned = transpose_8x8(pack2<BF>(first, second));
      if (exists) *const_cast<uint32_t*>(place(p.y, p.ldy, corner)) = turned;
    };
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = __fmaf_rn(d[4 * n + i], i < 2 ? O::kUnscaleG : O::kUnscaleG8, bias[i / 2]);
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

// What x is multiplied by in the sums that zero points need: the same two numbers in every element, see Offset.
template <bool BF>
__device__ __forceinline__ uint32_t minus_of(bool zeros) {
  return zeros ? Offset<BF, true>::kRowG : Offset<BF, false>::kRowG;
}

}  // namespace
}  // namespace gptq
