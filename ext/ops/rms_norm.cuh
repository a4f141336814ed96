// RMSNorm of rows by one kernel or another: who brings x may be the cache, or another GPU.
#pragma once
#include "common/ptx.cuh"
#include "common/vector.cuh"
#include "ops/ops.h"

namespace gptq {
namespace {

constexpr int kVector = 8;  // elements of one 16-byte access

__device__ __forceinline__ uint4 load16(const uint16_t* p) { return *reinterpret_cast<const uint4*>(p); }
__device__ __forceinline__ void store16(uint16_t* p, const uint4& v) { *reinterpret_cast<uint4*>(p) = v; }

__device__ __forceinline__ float sum_of_squares(const float (&v)[8]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) sum = __fmaf_rn(v[i], v[i], sum);
  return sum;
}

// Where in a row vector j of this thread begins.
__device__ __forceinline__ int vector_at(int j) { return (j * blockDim.x + threadIdx.x) * kVector; }

// A block takes rows blockIdx.x, + gridDim.x, ...; N vectors of a row per thread. What does not depend on an earlier kernel (weights, and
// the places to gather from) is in registers before the wait; one barrier per row, since consecutive rows use the two halves of shared
// memory.
// load(x, row) brings a thread's vectors of a row of x, or zeros beyond the last row.
template <bool BF, bool PERM, int N, typename Load>
__device__ __forceinline__ void rms_norm_rows(const RmsNormArgs& a, Load&& load) {
  extern __shared__ __align__(16) uint16_t rows[];  // PERM: two rows of x
  __shared__ float sums[2][16];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  uint4 weight[N] = {};
  uint4 from[N] = {};  // eight indices of 16 bits
#pragma unroll
  for (int j = 0; j < N; j++) {
    const int k = vector_at(j);
    if (k >= a.H) continue;
    if constexpr (PERM) {
      const int4 p = *reinterpret_cast<const int4*>(a.perm + k), q = *reinterpret_cast<const int4*>(a.perm + k + 4);
      from[j] = make_uint4(p.x | p.y << 16, p.z | p.w << 16, q.x | q.y << 16, q.z | q.w << 16);
    }
    weight[j] = load16(a.weight + k);
  }
  grid_launch_dependents();
  grid_wait();
  uint4 next[N];
  load(next, blockIdx.x);
  int half = 0;
  for (int row = blockIdx.x; row < a.T; row += gridDim.x, half ^= 1) {
    uint4 x[N];
    float sum = 0;
#pragma unroll
    for (int j = 0; j < N; j++) {
      x[j] = next[j];
      float v[8];
      unpack8<BF>(v, x[j]);
      sum += sum_of_squares(v);
      const int k = vector_at(j);
      if (PERM && k < a.H) store16(rows + half * a.H + k, x[j]);
    }
    load(next, row + gridDim.x);
#pragma unroll
    for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) sums[half][warp] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < warps; w++) sum += sums[half][w];
    const float scale = rsqrtf(sum / static_cast<float>(a.H) + a.eps);
#pragma unroll
    for (int j = 0; j < N; j++) {
      const int k = vector_at(j);
      if (k >= a.H) continue;
      if constexpr (PERM) {
        const uint16_t* x0 = rows + half * a.H;
        const auto two = [&](uint32_t i) { return static_cast<uint32_t>(x0[i & 0xffff]) | static_cast<uint32_t>(x0[i >> 16]) << 16; };
        x[j] = make_uint4(two(from[j].x), two(from[j].y), two(from[j].z), two(from[j].w));
      }
      float v[8], w[8];
      unpack8<BF>(v, x[j]);
      unpack8<BF>(w, weight[j]);
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] = v[i] * scale * w[i];
      store16(a.out + static_cast<size_t>(row) * a.ldo + k, pack8<BF>(v));
    }
  }
}

constexpr int kOneVector = 256 * kVector, kTwoVectors = 2 * 512 * kVector;  // widths up to which a thread has one, or two

inline int warps_for(int threads) { return (threads + 31) / 32 * 32; }

// Threads of a block, for N vectors of each.
inline int norm_threads(int H, int N) { return warps_for((H / kVector + N - 1) / N); }

}  // namespace
}  // namespace gptq
