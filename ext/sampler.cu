#include "sampler_cut.h"

namespace gptq {
namespace {

// What may be drawn: elements from the cut up.
struct Kept {
  Weights weights;
  float value;
  int id;

  __device__ __forceinline__ u64 weight(float x, int i) const { return x > value || (x == value && i <= id) ? weights.of(weights.scaled(x)) : 0; }
};

// The warp whose part the target-th unit of mass lies in; `before`: the mass before the parts, then before that warp's. mass: of the calling warp.
__device__ int find_warp(u64 mass, u64 target, u64& before, u64* scratch) {
  __syncthreads();
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = mass;
  __syncthreads();
  const u64 until = before + warp_scan(scratch[threadIdx.x & 31]);
  const int warp = __ffs(__ballot_sync(~0u, target < until)) - 1;
  if (warp > 0) before = __shfl_sync(~0u, until, warp - 1);
  return warp;
}

__device__ __forceinline__ u64 kept_mass(const Row& row, const Kept& kept) {
  u64 mass = 0;
  row.each<2>(-INFINITY, [&](float x, int id) { mass += kept.weight(x, id); });
  return warp_sum(mass);
}

// The first id at which the running sum of weights passes target, by the warp in whose part that is; -1 in the lanes that do not have it.
__device__ int look_up(const Row& row, const Kept& kept, u64 before, u64 target) {
#pragma unroll 1
  for (int c = row.first; c < row.last; c++) {
    const float4 v = row.load(c, -INFINITY);
    const int id = c * kRowChunk + (threadIdx.x & 31) * 4;
    const u64 w0 = kept.weight(v.x, id), w1 = kept.weight(v.y, id + 1), w2 = kept.weight(v.z, id + 2), w3 = kept.weight(v.w, id + 3);
    const u64 end = before + warp_scan(w0 + w1 + w2 + w3);
    const uint32_t passed = __ballot_sync(~0u, target < end);
    if (passed) {
      if ((threadIdx.x & 31) != __ffs(passed) - 1) return -1;
      return target < end - w3 - w2 - w1 ? id : target < end - w3 - w2 ? id + 1 : target < end - w3 ? id + 2 : id + 3;
    }
    before = __shfl_sync(~0u, end, 31);
  }
  return -1;
}

template <int C>
__device__ __forceinline__ void sample_row(const SamplerRows& a, const SamplerHistory& history, int* tokens) {
  __shared__ CutShared<C> sh;
  __shared__ u64 mail[2][C];
  grid_launch_dependents();
  grid_wait();
  const int r = blockIdx.x / C, slot = field(a, r, kSlot), warp = threadIdx.x >> 5;
  const bool first_thread = blockIdx.x % C == 0 && threadIdx.x == 0;
  if (slot < 0) {
    if (first_thread) tokens[r] = -1;
    return;
  }
  Team<C> team(mail);
  const auto finish = [&](int token) {
    tokens[r] = token;
    const int length = field(a, r, kLength);
    if (length < history.capacity) history.tokens[slot * history.ld + length] = max(token, 0);  // -1 is no input id
  };
  const Row row = Row(a, r).part(team.rank * kRowWarps + warp, C * kRowWarps);
  const float inverse_temperature = float_field(a, r, kInverseTemperature);

  float best = -FLT_MAX;
  int best_id = row.first * kRowChunk + (threadIdx.x & 31) * 4;
  bool finite = true;
  row.each<8>(-FLT_MAX, [&](float x, int id) {
    finite &= fabsf(x) <= FLT_MAX;
    if (x > best) best = x, best_id = id;
  });
  team.meet();
  const u64 top = team.max(block_max(finite ? rank_key(best, best_id) : ~0ull, sh.scratch));  // ~0 is above the key of any finite number
  if (top == ~0ull || inverse_temperature == 0.f) {
    if (first_thread) finish(top == ~0ull ? -1 : key_id(top));
    return;
  }

  const Weights weights{key_value(top), inverse_temperature, float_field(a, r, kMinP)};
  const int top_k = field(a, r, kTopK);
  const float top_p = float_field(a, r, kTopP);
  Kept kept{weights, -FLT_MAX, INT_MAX};
  if (top_k > 0 || top_p < 1.f) {
    build_histogram(row, weights, top_k > 0, team, sh);
    u64 total, cut = 0;
    if (top_k > 0 && find_bin<true>(top_k, sh)) {
      find_cut<true>(row, weights, top_k, team, sh);
      cut = sh.cut, total = sh.kept;
    } else {
      total = block_sum(bin_mass(sh), sh.scratch);
    }
    if (top_p < 1.f) {
      // Whatever top_k left out lies behind `total`, so this cut is never below the other.
      const u64 need = max(1ull, static_cast<u64>(ceil(static_cast<double>(top_p) * static_cast<double>(total))));
      __syncthreads();
      find_bin<false>(need, sh);
      find_cut<false>(row, weights, need, team, sh);
      cut = sh.cut;
    }
    if (cut) kept.value = key_value(cut), kept.id = key_id(cut);
  }

  const u64 mass = kept_mass(row, kept);
  u64 total, before = team.before(block_sum((threadIdx.x & 31) == 0 ? mass : 0, sh.scratch), total);
  const u64 target = __umul64hi(random_bits(field(a, r, kSeedLow), field(a, r, kSeedHigh), field(a, r, kLength)), total);
  int owner = find_warp(mass, target, before, sh.scratch);
  if (owner < 0 || target < before) return;  // another block has it
  Row part = Row(a, r).part(team.rank * kRowWarps + owner, C * kRowWarps);
  if (part.last - part.first > 4) {  // once more, by all warps
    const Row whole = part;
    part = whole.part(warp, kRowWarps);
    owner = find_warp(kept_mass(part, kept), target, before, sh.scratch);
    part = whole.part(owner, kRowWarps);
  }
  if (warp != owner) return;
  const int token = look_up(part, kept, before, target);
  if (token >= 0) finish(token);
}

template <int C>
__global__ void __launch_bounds__(kRowThreads, 1) sample_kernel(const SamplerRows a, const SamplerHistory history, int* tokens) {
#if __CUDA_ARCH__ >= 900
  sample_row<C>(a, history, tokens);
#else
  if constexpr (C == 1) sample_row<C>(a, history, tokens);
#endif
}

template <int C>
cudaError_t launch(const SamplerRows& rows, const SamplerHistory& history, int* tokens, cudaStream_t stream) {
  return launch_overlapped(sample_kernel<C>, dim3(rows.S * C), kRowThreads, C, stream, rows, history, tokens);
}

}  // namespace

cudaError_t launch_sample(const SamplerRows& rows, const SamplerHistory& history, int* tokens, cudaStream_t stream) {
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  // As many blocks per row as run at once: a few SMs have no neighbours to form a cluster with.
  const int spare = device.capability < 90 ? 1 : device.sms * 7 / 8 / rows.S;
  if (spare >= 8) return launch<8>(rows, history, tokens, stream);
  if (spare >= 4) return launch<4>(rows, history, tokens, stream);
  if (spare >= 2) return launch<2>(rows, history, tokens, stream);
  return launch<1>(rows, history, tokens, stream);
}

}  // namespace gptq
