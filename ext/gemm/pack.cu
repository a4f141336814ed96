#include "gemm/pack.h"

#include "common/layout.cuh"

namespace gptq {
namespace {

constexpr int kPackThreads = 256;  // one per word of a chunk
static_assert(kPackThreads * 4 == kWeightBytes);

// A block per chunk. Inputs are fetched one by one, 16 neighbouring outputs at a time: act-order scatters them over the whole matrix,
// and without it the other seven of a word are still in the L1.
template <int G, bool ZP>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const PackArgs a) {
  using C = Chunk<G, ZP>;
  __shared__ uint8_t nibbles[kChunkK][kStripRows + 4];
  __shared__ int columns[kStripRows];
  const int chunk = blockIdx.x, strip = blockIdx.y, tid = threadIdx.x;
  if (tid < kStripRows) columns[tid] = a.columns ? a.columns[strip * kStripRows + tid] : strip * kStripRows + tid;
  __syncthreads();

  const int row = tid & (kStripRows - 1), column = columns[row];
  for (int i = tid / kStripRows; i < kChunkK; i += kPackThreads / kStripRows) {
    const int k = chunk * kChunkK + i;
    uint32_t value = 8;
    if (k < a.K) {
      const int from = a.perm ? a.perm[k] : k;
      value = a.qweight[static_cast<size_t>(from >> 3) * a.N + column] >> (4 * (from & 7)) & 15u;
    } else if (ZP) {  // weighs nothing; for a zero point of 16 no nibble does, and kernels feed zeros there
      value = min(static_cast<int>(a.zeros[static_cast<size_t>(a.group_count - 1) * a.N + column]), 15);
    }
    nibbles[i][row] = static_cast<uint8_t>(value);
  }
  __syncthreads();

  uint8_t* out = a.out + (static_cast<size_t>(strip) * gridDim.x + chunk) * C::kBytes;
  const int block = tid >> 7, lane = (tid >> 2) & 31, step = tid & 3, g = lane >> 2, t = lane & 3;
  const int first = 64 * block + 16 * step + 2 * t;
  uint32_t word = 0;
#pragma unroll
  for (int p = 0; p < 4; p++)
#pragma unroll
    for (int e = 0; e < 2; e++) word |= static_cast<uint32_t>(nibbles[first + 8 * (p >> 1) + e][g + 8 * (p & 1)]) << (4 * p + 16 * e);
  reinterpret_cast<uint32_t*>(out)[tid] = word;

  if (tid < kStripRows * G) {  // scales and zero points: (row g, row g+8) side by side
    const int group = tid / kStripRows, at = tid % kStripRows, from = columns[(at >> 1) + 8 * (at & 1)];
    const int in_file = min((chunk * kChunkK + group * (kChunkK / G)) / a.group_size, a.group_count - 1);
    const size_t source = static_cast<size_t>(in_file) * a.N + from;
    reinterpret_cast<uint16_t*>(out + C::kScaleOffset)[tid] = a.scales[source];
    if (ZP) out[C::kZeroOffset + tid] = a.zeros[source];
  }
}

template <int G>
cudaError_t launch_pack(const PackArgs& a, cudaStream_t stream) {
  const dim3 grid((a.K + kChunkK - 1) / kChunkK, a.N / kStripRows);
  if (a.zeros) pack_kernel<G, true><<<grid, kPackThreads, 0, stream>>>(a);
  else pack_kernel<G, false><<<grid, kPackThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_pack(const PackArgs& a, int groups, cudaStream_t stream) {
  switch (groups) {
    case 1: return launch_pack<1>(a, stream);
    case 2: return launch_pack<2>(a, stream);
    case 4: return launch_pack<4>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace gptq
