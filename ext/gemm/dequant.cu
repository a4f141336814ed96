#include "gemm/dequant.h"

#include <algorithm>

#include "common/launch.cuh"
#include "common/layout.cuh"
#include "common/ptx.cuh"
#include "common/vector.cuh"

namespace gptq {
namespace {

constexpr int kDequantWarps = 8;
constexpr int kDequantBlocks = 3;  // on an SM that registers are for

// One warp per chunk: the fragments go through shared memory so that rows leave in whole lines.
template <int G, bool ZP, bool BF>
__global__ void __launch_bounds__(kDequantWarps * 32, kDequantBlocks) dequant_kernel(const DequantArgs a) {
  using C = Chunk<G, ZP>;
  __shared__ __align__(16) uint16_t tile[kDequantWarps][kStripRows][kChunkK + 8];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int nch = (a.K + kChunkK - 1) / kChunkK;
  const int c = blockIdx.x * kDequantWarps + warp, strip = a.strip_first + blockIdx.y;
  const bool planes = ZP && a.paired == kPlanes;
  if (c >= nch) return;
  const uint8_t* chunk = a.w + (static_cast<size_t>(strip) * nch + c) * C::kBytes;
#pragma unroll
  for (int b = 0; b < 2; b++) {
    const uint4 q4 = *reinterpret_cast<const uint4*>(chunk + b * kBlockBytes + lane * 16);
    const uint32_t q[4] = {q4.x, q4.y, q4.z, q4.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int k = b * 64 + j * 16, group = k * G / kChunkK;
      const float2 scale = scale_pair(*reinterpret_cast<const uint32_t*>(chunk + C::kScaleOffset + group * 32 + g * 4));
      const float z0 = ZP ? chunk[C::kZeroOffset + group * 16 + g * 2] : 8.f,
                  z1 = ZP ? chunk[C::kZeroOffset + group * 16 + g * 2 + 1] : 8.f;
      float first = 0.f, second = 0.f;  // weights; of planes, rows g + 8 get the sums
#pragma unroll
      for (int p = 0; p < 4; p++) {
        const float s = p & 1 ? scale.y : scale.x, z = p & 1 ? z1 : z0;
        const uint32_t low = (q[j] >> (4 * p)) & 15u, high = (q[j] >> (4 * p + 16)) & 15u;
        const float upper = first, upper_second = second;
        first = (static_cast<float>(low) - z) * s, second = (static_cast<float>(high) - z) * s;
        if (p % 2 == 1 && planes) first += upper, second += upper_second;
        const uint32_t both = to_16bit<BF>(first) | static_cast<uint32_t>(to_16bit<BF>(second)) << 16;
        *reinterpret_cast<uint32_t*>(&tile[warp][g + 8 * (p & 1)][k + 2 * t + 8 * (p >> 1)]) = both;
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < kStripRows * kChunkK / 8; i += 32) {
    const int r = i / (kChunkK / 8), k = i % (kChunkK / 8) * 8;
    if (c * kChunkK + k >= a.K || (planes && r < 8)) continue;
    const int at = blockIdx.y, half = planes ? 0 : (r >> 3) * 8 * a.strip_count;
    const int row = a.paired ? at * 8 + (r & 7) + half : at * kStripRows + r;
    *reinterpret_cast<uint4*>(a.out + static_cast<size_t>(row) * a.ldo + c * kChunkK + k) =
        *reinterpret_cast<const uint4*>(&tile[warp][r][k]);
  }
}

constexpr int kGatherThreads = 256, kGatherRows = 4;

// A block stages up to kGatherRows whole rows in shared memory and writes `units` x 8 columns of each, 16 bytes at a time.
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const GatherArgs a, int rows, int units) {
  extern __shared__ uint4 staged[];
  const int row_units = a.K / 8, first = blockIdx.x * rows, here = min(rows, a.M - first), begin = blockIdx.y * units + threadIdx.x;
  const auto order = reinterpret_cast<const int4*>(a.perm);
  int4 low = {}, high = {};  // of the first columns, which is all of them where rows are few: they depend on no kernel before
  if (begin < row_units) low = order[2 * begin], high = order[2 * begin + 1];
  grid_launch_dependents();
  grid_wait();
  for (int r = 0; r < here; r++) {
    const uint4* from = reinterpret_cast<const uint4*>(a.x + static_cast<size_t>(first + r) * a.ldx);
    for (int i = threadIdx.x; i < row_units; i += kGatherThreads) staged[r * row_units + i] = from[i];
  }
  __syncthreads();
  const int end = min(row_units, static_cast<int>(blockIdx.y + 1) * units);
  for (int i = begin; i < end; i += kGatherThreads) {
    if (i != begin) low = order[2 * i], high = order[2 * i + 1];
    const uint16_t* row = reinterpret_cast<const uint16_t*>(staged);
    uint16_t* out = a.out + static_cast<size_t>(first) * a.ldo + 8 * i;
    for (int r = 0; r < here; r++, row += a.K, out += a.ldo) {
      const auto pair = [&](int k0, int k1) { return row[k0] | static_cast<uint32_t>(row[k1]) << 16; };
      *reinterpret_cast<uint4*>(out) = make_uint4(pair(low.x, low.y), pair(low.z, low.w), pair(high.x, high.y), pair(high.z, high.w));
    }
  }
}

// Where a row does not fit into shared memory: a thread's eight columns.
__global__ void __launch_bounds__(kGatherThreads) gather_unstaged_kernel(const GatherArgs a) {
  const int i = blockIdx.x * kGatherThreads + threadIdx.x;
  int4 low = {}, high = {};
  if (8 * i < a.K) low = reinterpret_cast<const int4*>(a.perm)[2 * i], high = reinterpret_cast<const int4*>(a.perm)[2 * i + 1];
  grid_launch_dependents();
  grid_wait();
  if (8 * i >= a.K) return;
  for (int m = blockIdx.y; m < a.M; m += gridDim.y) {
    const uint16_t* x = a.x + static_cast<size_t>(m) * a.ldx;
    const auto pair = [&](int k0, int k1) { return __ldcg(x + k0) | static_cast<uint32_t>(__ldcg(x + k1)) << 16; };
    const uint4 sorted = make_uint4(pair(low.x, low.y), pair(low.z, low.w), pair(high.x, high.y), pair(high.z, high.w));
    *reinterpret_cast<uint4*>(a.out + static_cast<size_t>(m) * a.ldo + 8 * i) = sorted;
  }
}

template <int G, bool ZP>
cudaError_t launch_dequant(const DequantArgs& a, bool bf16, cudaStream_t stream) {
  const dim3 grid(((a.K + kChunkK - 1) / kChunkK + kDequantWarps - 1) / kDequantWarps, a.strip_count);
  if (bf16) dequant_kernel<G, ZP, true><<<grid, kDequantWarps * 32, 0, stream>>>(a);
  else dequant_kernel<G, ZP, false><<<grid, kDequantWarps * 32, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_dequant(const DequantArgs& a, int groups, bool zeros, bool bf16, cudaStream_t stream) {
  switch (groups) {
    case 1: return zeros ? launch_dequant<1, true>(a, bf16, stream) : launch_dequant<1, false>(a, bf16, stream);
    case 2: return zeros ? launch_dequant<2, true>(a, bf16, stream) : launch_dequant<2, false>(a, bf16, stream);
    case 4: return zeros ? launch_dequant<4, true>(a, bf16, stream) : launch_dequant<4, false>(a, bf16, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_gather(const GatherArgs& a, cudaStream_t stream) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  if (a.M <= 0 || a.K % 8 || a.ldx % 8 || a.ldo % 8 || !aligned(a.x) || !aligned(a.out) || !aligned(a.perm)) return cudaErrorInvalidValue;
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  const int row_bytes = 2 * a.K;
  if (row_bytes > device.smem) {
    const dim3 grid((a.K / 8 + kGatherThreads - 1) / kGatherThreads, std::min(a.M, 1024));
    return launch_kernel(reinterpret_cast<const void*>(gather_unstaged_kernel), {grid, kGatherThreads, 0, stream}, device, a);
  }
  // More rows share one reading of perm, while every SM has a block; few rows are cut into slices of columns.
  const int rows = std::max(1, std::min({kGatherRows, device.smem / 2 / row_bytes, a.M / device.sms}));
  const int blocks = (a.M + rows - 1) / rows, row_units = a.K / 8;
  const int slices = std::max(1, std::min(device.sms / blocks, (row_units + kGatherThreads - 1) / kGatherThreads));
  const int units = (row_units + slices - 1) / slices;
  const void* kernel = reinterpret_cast<const void*>(gather_kernel);
  static std::atomic<uint64_t> done;
  if (const cudaError_t status = set_limits(kernel, done, device.smem, device); status != cudaSuccess) return status;
  const dim3 grid(blocks, (row_units + units - 1) / units);
  return launch_kernel(kernel, {grid, kGatherThreads, rows * row_bytes, stream}, device, a, rows, units);
}

}  // namespace gptq
