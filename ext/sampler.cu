#include "sampler_parts.h"

namespace gptq {
namespace {

// Weights are integers, exp(t) * 2^40 rounded down, so sums do not depend on their order; t <= 0, and 2^18 weights fit into 64 bits.
constexpr float kWeightOne = 0x1p40f;
// Bins of equal width in t, best first; what is below the last edge (a millionth of the best) is one bin, summed in registers.
constexpr int kBins = 2048;
constexpr float kBinScale = -146.f;  // the last bin begins at t = -14.02
constexpr int kCandidates = 1024;

struct Shared {
  uint32_t mass_low[kBins], mass_high[kBins], count[kBins];
  u64 key[kCandidates], weight[kCandidates];
  u64 scratch[kRowWarps], warp_mass[kRowWarps];
  u64 before_count, before_mass, num_candidates;  // of the bracket in which a cut lies
  u64 cut, kept;
  int bin;
};

struct Weights {
  float best, inverse_temperature, min_p;

  __device__ __forceinline__ float scaled(float x) const { return __fmul_rn(__fsub_rn(x, best), inverse_temperature); }
  __device__ __forceinline__ u64 of(float t) const {
    const float e = __expf(t);
    return e < min_p ? 0 : __float2ull_rz(e * kWeightOne);
  }
  static __device__ __forceinline__ int bin(float t) { return static_cast<int>(fminf(t * kBinScale, static_cast<float>(kBins - 1))); }
};

__device__ void histogram(const Row& row, const Weights& weights, bool counts, Shared& sh) {
  for (int i = threadIdx.x; i < kBins; i += kRowThreads) sh.mass_low[i] = sh.mass_high[i] = sh.count[i] = 0;
  __syncthreads();
  u64 tail_mass = 0;
  uint32_t tail_count = 0;
  row.each<2>(-INFINITY, [&](float x, int) {
    const float t = weights.scaled(x);
    const u64 w = weights.of(t);
    const int bin = Weights::bin(t);
    if (bin == kBins - 1) {
      tail_mass += w, tail_count += w != 0;
    } else if (w) {
      const uint32_t low = static_cast<uint32_t>(w);
      const uint32_t carry = atomicAdd(&sh.mass_low[bin], low) > ~low;
      const uint32_t high = static_cast<uint32_t>(w >> 32) + carry;
      if (high) atomicAdd(&sh.mass_high[bin], high);
      if (counts) atomicAdd(&sh.count[bin], 1u);
    }
  });
  tail_mass = block_sum(tail_mass, sh.scratch);
  const u64 tail = block_sum(tail_count, sh.scratch);
  if (threadIdx.x == 0) {
    sh.mass_low[kBins - 1] = static_cast<uint32_t>(tail_mass), sh.mass_high[kBins - 1] = static_cast<uint32_t>(tail_mass >> 32);
    sh.count[kBins - 1] = static_cast<uint32_t>(tail);
  }
  __syncthreads();
}

// The bin in which the `need`-th unit of count, or of mass, lies: sh.bin, and what is before it. False where there are not so many.
template <bool kByCount>
__device__ bool find_bin(u64 need, Shared& sh) {
  static_assert(kBins == 2 * kRowThreads);
  const int b = 2 * threadIdx.x;
  const u64 mass0 = static_cast<u64>(sh.mass_high[b]) << 32 | sh.mass_low[b], mass1 = static_cast<u64>(sh.mass_high[b + 1]) << 32 | sh.mass_low[b + 1];
  const u64 count0 = sh.count[b], count1 = sh.count[b + 1];
  u64 total_mass, total_count = 0;
  const u64 mass = block_scan(mass0 + mass1, total_mass, sh.scratch);
  const u64 count = kByCount ? block_scan(count0 + count1, total_count, sh.scratch) : 0;
  if (kByCount && total_count <= need) return false;
  const u64 start = kByCount ? count : mass, middle = start + (kByCount ? count0 : mass0), end = middle + (kByCount ? count1 : mass1);
  if (start < need && need <= end) {
    const bool second = need > middle;
    sh.bin = b + second;
    sh.before_mass = mass + (second ? mass0 : 0);
    sh.before_count = count + (second ? count0 : 0);
  }
  __syncthreads();
  return true;
}

// Narrows [low, high], whose elements (of weight above 0) are too many to rank at once, around the `need`-th unit.
template <bool kByCount>
__device__ void bisect(const Row& row, const Weights& weights, u64 need, u64& low, u64& high, u64& num, u64& before_count, u64& before_mass, Shared& sh) {
  while (num > kCandidates && low < high) {
    const u64 middle = low + (high - low) / 2 + 1;  // upper part: [middle, high]
    u64 mass = 0, count = 0;
    row.each<1>(-INFINITY, [&](float x, int id) {
      const u64 key = rank_key(x, id);
      if (key >= middle && key <= high) {
        const u64 w = weights.of(weights.scaled(x));
        mass += w, count += w != 0;
      }
    });
    mass = block_sum(mass, sh.scratch), count = block_sum(count, sh.scratch);
    if (need <= (kByCount ? before_count + count : before_mass + mass)) {
      low = middle, num = count;
    } else {
      high = middle - 1, num -= count;
      before_count += count, before_mass += mass;
    }
  }
}

// Cuts the ranking of the row where `need` is reached: sh.cut is the key of the last element kept, sh.kept the mass of all kept.
template <bool kByCount>
__device__ void find_cut(const Row& row, const Weights& weights, u64 need, Shared& sh) {
  const int bin = sh.bin;
  u64 low = ~0ull, high = 0;
  const auto gather = [&](auto&& inside) {
    if (threadIdx.x == 0) sh.num_candidates = 0;
    __syncthreads();
    row.each<2>(-INFINITY, [&](float x, int id) {
      if (!inside(x, id)) return;
      const u64 w = weights.of(weights.scaled(x));
      if (!w) return;
      const u64 key = rank_key(x, id), i = atomicAdd(&sh.num_candidates, 1ull);
      low = key < low ? key : low, high = key > high ? key : high;
      if (i < kCandidates) sh.key[i] = key, sh.weight[i] = w;
    });
    __syncthreads();
  };
  gather([&](float x, int) { return Weights::bin(weights.scaled(x)) == bin; });
  u64 num = sh.num_candidates, before_count = sh.before_count, before_mass = sh.before_mass;
  if (num > kCandidates) {
    high = block_max(high, sh.scratch), low = ~block_max(~low, sh.scratch);
    bisect<kByCount>(row, weights, need, low, high, num, before_count, before_mass, sh);
    __syncthreads();
    gather([&](float x, int id) {
      const u64 key = rank_key(x, id);
      return key >= low && key <= high;
    });
    num = sh.num_candidates;
  }
  if (threadIdx.x < num) {
    const u64 key = sh.key[threadIdx.x];
    u64 mass = before_mass, count = before_count;
#pragma unroll 2
    for (int i = 0; i < static_cast<int>(num); i++)
      if (sh.key[i] > key) mass += sh.weight[i], count++;
    const u64 w = sh.weight[threadIdx.x], start = kByCount ? count : mass, end = kByCount ? count + 1 : mass + w;
    if (start < need && need <= end) sh.cut = key, sh.kept = mass + w;
  }
  __syncthreads();
}

// The first id at which the running sum of kept weights passes target, by the warp in whose part that is; -1 in the lanes that do not have it.
__device__ int look_up(const Row& row, const Weights& weights, u64 cut, u64 before, u64 target) {
#pragma unroll 1
  for (int c = row.first; c < row.last; c++) {
    const float4 v = row.load(c, -INFINITY);
    const int id = c * kRowChunk + (threadIdx.x & 31) * 4;
    const float x[4] = {v.x, v.y, v.z, v.w};
    u64 w[4];
#pragma unroll
    for (int j = 0; j < 4; j++) w[j] = rank_key(x[j], id + j) >= cut ? weights.of(weights.scaled(x[j])) : 0;
    const u64 end = before + warp_scan(w[0] + w[1] + w[2] + w[3]);
    const uint32_t passed = __ballot_sync(~0u, target < end);
    if (passed) {
      if ((threadIdx.x & 31) != __ffs(passed) - 1) return -1;
      u64 sum = end - w[3] - w[2] - w[1];
      if (target < sum) return id;
      if (target < (sum += w[1])) return id + 1;
      return target < sum + w[2] ? id + 2 : id + 3;
    }
    before = __shfl_sync(~0u, end, 31);
  }
  return -1;
}

__global__ void __launch_bounds__(kRowThreads, 1) sample_kernel(const SamplerRows a, const SamplerHistory history, int* tokens) {
  __shared__ Shared sh;
  grid_launch_dependents();
  grid_wait();
  const int r = blockIdx.x, slot = field(a, r, kSlot);
  if (slot < 0) {
    if (threadIdx.x == 0) tokens[r] = -1;
    return;
  }
  const auto finish = [&](int token) {
    tokens[r] = token;
    const int length = field(a, r, kLength);
    if (length < history.capacity) history.tokens[slot * history.ld + length] = max(token, 0);  // -1 is no input id
  };
  const Row row(a, r);
  const float inverse_temperature = float_field(a, r, kInverseTemperature);

  float best = -FLT_MAX;
  int best_id = row.first * kRowChunk + (threadIdx.x & 31) * 4;
  bool finite = true;
  row.each<8>(-FLT_MAX, [&](float x, int id) {
    finite &= fabsf(x) <= FLT_MAX;
    if (x > best) best = x, best_id = id;
  });
  const u64 top = block_max(finite ? rank_key(best, best_id) : ~0ull, sh.scratch);  // ~0 is above the key of any finite number
  if (top == ~0ull || inverse_temperature == 0.f) {
    if (threadIdx.x == 0) finish(top == ~0ull ? -1 : key_id(top));
    return;
  }

  const Weights weights{key_value(top), inverse_temperature, float_field(a, r, kMinP)};
  const int top_k = field(a, r, kTopK);
  const float top_p = float_field(a, r, kTopP);
  u64 cut = 0, kept = 0;
  if (top_k > 0 || top_p < 1.f) {
    histogram(row, weights, top_k > 0, sh);
    u64 total;
    if (top_k > 0 && find_bin<true>(top_k, sh)) {
      find_cut<true>(row, weights, top_k, sh);
      cut = sh.cut, total = sh.kept;
    } else {
      const int b = 2 * threadIdx.x;
      total = block_sum((static_cast<u64>(sh.mass_high[b]) << 32) + sh.mass_low[b] + (static_cast<u64>(sh.mass_high[b + 1]) << 32) + sh.mass_low[b + 1], sh.scratch);
    }
    if (top_p < 1.f) {
      // Whatever top_k left out lies behind `total`, so the cut is never below its own.
      const u64 need = max(1ull, static_cast<u64>(ceil(static_cast<double>(top_p) * static_cast<double>(total))));
      __syncthreads();
      find_bin<false>(need, sh);
      find_cut<false>(row, weights, need, sh);
      cut = sh.cut;
    }
  }

  u64 mass = 0;
  const float cut_value = cut ? key_value(cut) : -FLT_MAX;
  row.each<2>(-INFINITY, [&](float x, int id) {
    if (x >= cut_value && rank_key(x, id) >= cut) mass += weights.of(weights.scaled(x));
  });
  mass = warp_sum(mass);
  if ((threadIdx.x & 31) == 0) sh.warp_mass[threadIdx.x >> 5] = mass;
  __syncthreads();
  const u64 until = warp_scan(sh.warp_mass[threadIdx.x & 31]);
  kept = __shfl_sync(~0u, until, 31);
  const u64 target = __umul64hi(random_bits(field(a, r, kSeedLow), field(a, r, kSeedHigh), field(a, r, kLength)), kept);
  const int owner = __ffs(__ballot_sync(~0u, target < until)) - 1;
  if (owner != static_cast<int>(threadIdx.x >> 5)) return;
  const u64 before = __shfl_sync(~0u, until, owner ? owner - 1 : 0);
  const int token = look_up(row, weights, cut, owner ? before : 0, target);
  if (token >= 0) finish(token);
}

}  // namespace

cudaError_t launch_sample(const SamplerRows& rows, const SamplerHistory& history, int* tokens, cudaStream_t stream) {
  return launch_overlapped(sample_kernel, dim3(rows.S), kRowThreads, stream, rows, history, tokens);
}

}  // namespace gptq
