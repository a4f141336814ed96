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
  if (p.bias != nullptr) bias[0] = from_16bit<BF>(p.bias[column[0] + g]);
  if (p.bias != nullptr && p.paired < kPlanes) bias[1] = from_16bit<BF>(p.bias[column[1] + g]);
  // Of float32, a lane has an output of two tokens as they are, and 8 lanes write 32 bytes; else, once turned, two outputs of a token.
  const bool joined = p.paired >= kGated;
  const int size = p.f32 ? 4 : 2, first = first_token + (p.f32 ? 2 * t : g), within = column[0] + (p.f32 ? g : 2 * t);
  uint8_t* y = static_cast<uint8_t*>(p.y) + (first * p.ldy + within) * size;
  const uint16_t* from = p.residual + (first * p.ldr + within);
#pragma unroll
  for (int n = 0; n < TN / 8; n++, y += 8 * p.ldy * size, from += 8 * p.ldr) {
    const int left = p.m - first - n * 8;
    const auto residual = [&](int corner) {  // of two tokens
      const auto at = reinterpret_cast<const uint32_t*>(from + corner * (column[1] - column[0]));
      const uint32_t r = p.residual == nullptr ? 0u : transpose_8x8(left > 0 ? *at : 0u);
      return make_float2(from_16bit<BF>(static_cast<uint16_t>(r)), from_16bit<BF>(static_cast<uint16_t>(r >> 16)));
    };
    const auto store = [&](int corner, float one, float two) {
      uint8_t* const at = y + corner * (column[1] - column[0]) * size;
      const uint32_t turned = transpose_8x8(pack2<BF>(one, two));
      if (left > 0) *reinterpret_cast<uint32_t*>(at) = p.f32 ? __float_as_uint(one) : turned;
      if (left > 1 && p.f32) reinterpret_cast<float*>(at)[p.ldy] = two;
    };
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = __fmaf_rn(d[4 * n + i], i < 2 ? O::kUnscaleG : O::kUnscaleG8, bias[i / 2]);
    const float2 r = residual(0);
    if (joined) v[0] = join_rows(p.paired, v[0], v[2], r.x), v[1] = join_rows(p.paired, v[1], v[3], r.y);
    else v[0] += r.x, v[1] += r.y;
    store(0, v[0], v[1]);
    if (!joined) {
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
