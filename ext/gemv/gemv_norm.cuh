// RMSNorm in the GEMV's prologue: each warp that multiplies brings the chunks that are its own into their final form before it begins, so
// no kernel that only normalizes stands between two GEMVs. A block does so for all of its x: nobody waits for what its neighbours do as
// well, and a hand-over from kernel to kernel costs a microsecond.
//
// Of one token a lane reads its elements itself: that is earlier than by a bulk copy, and finds them in registers. Several tokens come by
// bulk copies, as without a norm. For another order, x stands in a place of its own, and each element is fetched from there.
#pragma once
#include "common/ptx.cuh"
#include "common/rms_norm.cuh"
#include "gemv/gemv_plan.cuh"

namespace gptq {

static_assert(kNormWarps == kMathWarps && kNormStep == kMathWarps * kChunkK && kNormVector * 32 == kChunkK);

// Whether no bulk copy brings x.
__device__ __forceinline__ bool reads_x_itself(const GemvArgs& a) { return a.norm && a.M == 1; }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// The warp's sum of squares of token `m`, from which scale_of makes its scale once all warps have left theirs.
__device__ __forceinline__ void leave_squares(const SquareSum& squares, uint8_t* smem, int m, int warp, int lane) {
  const float sum = squares.of_warp();
  if (lane == 0) reinterpret_cast<float*>(smem + kSquares)[m * kNormWarps + warp] = sum;
}
__device__ __forceinline__ float scale_of(const GemvArgs& a, const uint8_t* smem, int m) {
  return norm_scale(reinterpret_cast<const float*>(smem + kSquares) + m * kNormWarps, a.inverse, a.eps);
}
// Four elements of the x that begins at `raw`.
__device__ __forceinline__ uint2 gathered(uint32_t raw, const int4& from) {
  return make_uint2(lds16(raw + from.x * 2) | lds16(raw + from.y * 2) << 16, lds16(raw + from.z * 2) | lds16(raw + from.w * 2) << 16);
}

// Each of these waits for the kernel before. `first`: the lane's first element, of the warp's first chunk; `chunks`: of the row.
template <bool BF>
__device__ __forceinline__ void normalize_one(const GemvArgs& a, uint8_t* smem, int first, int chunks, int warp, int lane) {
  constexpr int kAlways = 4;  // chunks without a branch for each: not worth one, and the compiler mixes their instructions
  const uint32_t raw = smem_addr(smem) + a.plan.raw, to = smem_addr(smem) + a.plan.x + first * 2;
  const uint16_t* from = a.x + first;
  uint2 weight[kNormChunks], x[kNormChunks];
  int4 order[kNormChunks] = {};
#pragma unroll
  for (int i = 0; i < kNormChunks; i++)
    weight[i] = first + i * kNormStep < a.K ? *reinterpret_cast<const uint2*>(a.norm + first + i * kNormStep) : uint2{};
  if (a.order) {
#pragma unroll
    for (int i = 0; i < kNormChunks; i++)
      if (first + i * kNormStep < a.K) order[i] = *reinterpret_cast<const int4*>(a.order + first + i * kNormStep);
  }
  grid_wait();
#pragma unroll
  for (int i = 0; i < kNormChunks; i++)
    x[i] = first + i * kNormStep < a.K ? __ldcg(reinterpret_cast<const uint2*>(from + i * kNormStep)) : uint2{};
  SquareSum squares;
#pragma unroll
  for (int i = 0; i < kNormChunks; i++) {
    if (i >= kAlways && warp + i * kMathWarps >= chunks) break;
    squares.add<BF>(i, x[i]);
  }
  if (a.order) {
#pragma unroll
    for (int i = 0; i < kNormChunks; i++)
      if (first + i * kNormStep < a.K) sts64(raw + (first + i * kNormStep) * 2, x[i].x, x[i].y);
  }
  leave_squares(squares, smem, 0, warp, lane);
  named_sync(kNormMet, kNormThreads);
  const float scale = scale_of(a, smem, 0);
  if (a.order) {
#pragma unroll
    for (int i = 0; i < kNormChunks; i++) {
      if (warp + i * kMathWarps >= chunks) break;
      asm("" : "+r"(order[i].x), "+r"(order[i].y), "+r"(order[i].z), "+r"(order[i].w));  // or they are awaited where they are loaded
      x[i] = gathered(raw, order[i]);  // behind the end the first element, whose weight is 0 there
    }
  }
#pragma unroll
  for (int i = 0; i < kNormChunks; i++) {
    if (warp + i * kMathWarps >= chunks) break;
    const uint2 y = normalized<BF>(x[i], scale, weight[i]);
    sts64(to + i * kNormStep * 2, y.x, y.y);
  }
}

template <bool BF>
__device__ __forceinline__ void normalize_several(const GemvArgs& a, uint8_t* smem, uint32_t x_bar, int first, int chunks, int warp,
                                                  int lane) {
  const GemvPlan& at = a.plan;
  const uint32_t raw = smem_addr(smem) + at.raw, to = smem_addr(smem) + at.x + first * 2, row = at.x_stride * 2;
  const int parts = (chunks + kMathWarps - 1) / kMathWarps;
  const auto weights = [&](int k) { return k < a.K ? *reinterpret_cast<const uint2*>(a.norm + k) : uint2{}; };
  const auto places = [&](int k) { return a.order && k < a.K ? *reinterpret_cast<const int4*>(a.order + k) : int4{}; };
  uint2 weight = weights(first);
  int4 order = places(first);
  grid_wait();
#pragma unroll 1
  for (int m = 0; m < a.M; m++) {
    SquareSum squares;
#pragma unroll 1
    for (int even = 0; even < parts; even += 2) {
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        const int i = even + odd;
        if (i >= parts) break;
        if (m == 0) mbar_wait(x_bar + 8 * i, 0);  // of other warps' chunks too: a gather looks there
        if (warp + i * kMathWarps < chunks) squares.add<BF>(odd, lds64_words(raw + m * row + (first + i * kNormStep) * 2));
      }
    }
    leave_squares(squares, smem, m, warp, lane);
  }
  named_sync(kNormMet, kNormThreads);
  const float scales = scale_of(a, smem, min(lane, a.M - 1));  // of token `lane`
#pragma unroll 1
  for (int c = warp, k = first; c < chunks; c += kMathWarps, k += kNormStep) {
    const uint2 next_weight = weights(k + kNormStep);
    const int4 next_order = places(k + kNormStep);
#pragma unroll 1
    for (int m = 0; m < a.M; m++) {
      const uint2 x = a.order ? gathered(raw + m * row, order) : lds64_words(raw + m * row + k * 2);
      const uint2 y = normalized<BF>(x, __shfl_sync(~0u, scales, m), weight);
      sts64(to + m * row + (k - first) * 2, y.x, y.y);
    }
    weight = next_weight, order = next_order;
  }
}

// In all warps that multiply: waits for the kernel before, then for x, and leaves the warp's own chunks normalized, padding zero.
// `x_bar`: the first of the barriers at which x arrives.
template <bool BF>
__device__ __forceinline__ void normalize_own_chunks(const GemvArgs& a, uint8_t* smem, uint32_t x_bar, int warp, int lane) {
  const int first = warp * kChunkK + lane * kNormVector, chunks = (a.K + kChunkK - 1) / kChunkK;
  if (reads_x_itself(a)) normalize_one<BF>(a, smem, first, chunks, warp, lane);
  else normalize_several<BF>(a, smem, x_bar, first, chunks, warp, lane);
  __syncwarp();
}
#endif

}  // namespace gptq
