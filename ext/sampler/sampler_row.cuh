// What the sampler's kernels share: blocks that belong to one row, each warp of which walks its own contiguous part of the row.
#pragma once
#include <cfloat>
#include <cstdint>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "sampler/sampler.h"

namespace gptq {

using u64 = unsigned long long;

constexpr int kRowThreads = 1024, kRowWarps = kRowThreads / 32;
constexpr int kRowChunk = 128;  // elements a warp reads with one instruction

__device__ __forceinline__ int field(const SamplerRows& a, int row, SamplerField f) { return a.fields[f * a.ldf + row]; }
__device__ __forceinline__ float float_field(const SamplerRows& a, int row, SamplerField f) { return __int_as_float(field(a, row, f)); }

// Larger exactly where x is larger, or equal with a lower id. -0 is 0.
__device__ __forceinline__ u64 rank_key(float x, int id) {
  const uint32_t bits = __float_as_uint(__fadd_rn(x, 0.f));
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<u64>(ordered) << 32 | ~static_cast<uint32_t>(id);
}
__device__ __forceinline__ int key_id(u64 key) { return static_cast<int>(~static_cast<uint32_t>(key)); }
__device__ __forceinline__ float key_value(u64 key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// A part of one row.
struct Row {
  const float* x;
  int first, last, end;  // chunks [first, last), elements below `end`
  bool aligned;          // x is 16-byte aligned

  __device__ __forceinline__ Row(const SamplerRows& a, int row)
      : x(a.logits + row * a.ldl),
        first(0),
        last((a.V + kRowChunk - 1) / kRowChunk),
        end(a.V),
        aligned((reinterpret_cast<uintptr_t>(x) & 15) == 0) {}

  // The `index`-th of so many equal parts.
  __device__ __forceinline__ Row part(int index, int parts) const {
    Row r = *this;
    const int chunks = last - first;  // below 2^20, and not more than 2^9 parts
    r.first = first + chunks * index / parts, r.last = first + chunks * (index + 1) / parts;
    r.end = min(end, r.last * kRowChunk);
    return r;
  }

  // The lane's four elements of a chunk; `fill` beyond the part.
  __device__ __forceinline__ float4 load(int chunk, float fill) const {
    const int i = chunk * kRowChunk + (threadIdx.x & 31) * 4;
    if (aligned && i + 3 < end) return *reinterpret_cast<const float4*>(x + i);
    return make_float4(i < end ? x[i] : fill, i + 1 < end ? x[i + 1] : fill, i + 2 < end ? x[i + 2] : fill, i + 3 < end ? x[i + 3] : fill);
  }

  // f(value, id) for every element of the part, by one warp, ids of a lane ascending; `U` chunks in flight.
  template <int U, typename F>
  __device__ __forceinline__ void each(float fill, F&& f) const {
#pragma unroll 1
    for (int c = first; c < last; c += U) {
      float4 v[U];
#pragma unroll
      for (int u = 0; u < U; u++) v[u] = load(c + u, fill);
#pragma unroll
      for (int u = 0; u < U; u++) {
        const int id = (c + u) * kRowChunk + (threadIdx.x & 31) * 4;
        f(v[u].x, id), f(v[u].y, id + 1), f(v[u].z, id + 2), f(v[u].w, id + 3);
      }
    }
  }
};

// ---- reductions; a warp's by shuffles, a block's through `scratch` [kRowWarps], every thread gets the result --------------------------
__device__ __forceinline__ u64 warp_max(u64 v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) {
    const u64 other = __shfl_xor_sync(~0u, v, d);
    v = other > v ? other : v;
  }
  return v;
}
__device__ __forceinline__ u64 warp_sum(u64 v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(~0u, v, d);
  return v;
}
// Sum over this lane and those before it.
__device__ __forceinline__ u64 warp_scan(u64 v) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const u64 other = __shfl_up_sync(~0u, v, d);
    if (lane >= d) v += other;
  }
  return v;
}
__device__ __forceinline__ u64 block_max(u64 v, u64* scratch) {
  v = warp_max(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
  __syncthreads();
  return warp_max(scratch[threadIdx.x & 31]);
}
__device__ __forceinline__ u64 block_sum(u64 v, u64* scratch) {
  v = warp_sum(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
  __syncthreads();
  return warp_sum(scratch[threadIdx.x & 31]);
}
// Sum over the threads before this one; `total` over all.
__device__ __forceinline__ u64 block_scan(u64 v, u64& total, u64* scratch) {
  const u64 inclusive = warp_scan(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 31) scratch[threadIdx.x >> 5] = inclusive;
  __syncthreads();
  const u64 warps = warp_scan(scratch[threadIdx.x & 31]);
  total = __shfl_sync(~0u, warps, 31);
  const int warp = threadIdx.x >> 5;
  const u64 before = __shfl_sync(~0u, warps, warp ? warp - 1 : 0);
  return (warp ? before : 0) + inclusive - v;
}

// In clusters of so many blocks.
template <typename... P>
cudaError_t launch_overlapped(void (*kernel)(P...), dim3 grid, int threads, int cluster, cudaStream_t stream,
                              const std::decay_t<P>&... args) {
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  return launch_kernel(reinterpret_cast<const void*>(kernel), {grid, threads, 0, stream, cluster}, device, args...);
}

}  // namespace gptq
