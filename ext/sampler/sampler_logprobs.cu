// Log-probabilities of raw logits: the sampled token's and the n best, found one after another from every warp's best.
#include "sampler/sampler_row.cuh"

namespace gptq {
namespace {

// The best key of the warp's part below `bound`; 0: none.
__device__ u64 best_below(const Row& row, u64 bound) {
  u64 best = 0;
  row.each<4>(-INFINITY, [&](float x, int id) {
    const u64 key = rank_key(x, id);
    if (key < bound && key > best && id < row.end) best = key;
  });
  return warp_max(best);
}

__global__ void __launch_bounds__(kRowThreads, 1) logprobs_kernel(const SamplerRows a, const int* tokens, int* out) {
  __shared__ u64 scratch[kRowWarps];
  __shared__ float sums[kRowWarps];
  grid_launch_dependents();
  grid_wait();
  const int r = blockIdx.x, num = field(a, r, kTopLogprobs), warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  if (num < 0 || field(a, r, kSeat) < 0) return;
  int* ids = out + r * 2 * (1 + kMaxTopLogprobs);
  float* values = reinterpret_cast<float*>(ids + 1 + kMaxTopLogprobs);
  const int token = tokens[r];
  if (token < 0) {
    if (threadIdx.x == 0) ids[0] = -1;
    return;
  }
  const Row row = Row(a, r).part(warp, kRowWarps);
  u64 mine = best_below(row, ~0ull);
  u64 best = block_max(mine, scratch);
  const float highest = key_value(best);
  float sum = 0.f;
  row.each<4>(-INFINITY, [&](float x, int) { sum += expf(x - highest); });
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  sum = sums[lane];
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
  const float log_sum = logf(sum);
  if (threadIdx.x == 0) ids[0] = token, values[0] = row.x[token] - highest - log_sum;
  for (int i = 1; i <= num; i++) {
    if (threadIdx.x == 0) ids[i] = best ? key_id(best) : -1, values[i] = best ? key_value(best) - highest - log_sum : 0.f;
    if (i == num || !best) continue;
    if (mine == best) mine = best_below(row, best);
    best = block_max(mine, scratch);
  }
}

}  // namespace

cudaError_t launch_sample_logprobs(const SamplerRows& rows, const int* tokens, int* out, cudaStream_t stream) {
  return launch_overlapped(logprobs_kernel, dim3(rows.S), kRowThreads, 1, stream, rows, tokens, out);
}

}  // namespace gptq
