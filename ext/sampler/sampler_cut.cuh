// Where top-k and top-p cut a row, without sorting it: a histogram of weights finds the bin, the bin's few elements are ranked.
#pragma once
#include "common/ptx.cuh"
#include "sampler/sampler_team.cuh"

namespace gptq {

// Bins of equal width in t, best first; what is below the last edge (a millionth of the best) is one bin, summed in registers.
constexpr int kBins = kRowThreads;
constexpr float kBinScale = -73.f;  // the last bin begins at t = -14.01
constexpr int kCandidates = 512;

// Weights are integers, exp(t) * 2^40 rounded down, so sums do not depend on their order; t <= 0, and 2^23 weights fit into 64 bits.
struct Weights {
  float best, inverse_temperature, min_p;

  __device__ __forceinline__ float scaled(float x) const { return __fmul_rn(__fsub_rn(x, best), inverse_temperature); }
  __device__ __forceinline__ u64 of(float t) const {
    float e = exp2_approx(t * 1.44269504f);
    if (e < min_p) e = 0.f;
    // 17 bits above and 23 below the point of e * 2^17, each as the mantissa of a float: several times faster than a conversion to 64 bits.
    const float high = __fmaf_rz(e, 0x1p17f, 0x1p23f), rest = __fmaf_rn(e, 0x1p17f, 0x1p23f - high),
                low = __fmaf_rz(rest, 0x1p23f, 0x1p23f);
    return (static_cast<u64>(__float_as_uint(high) & 0x7fffffu) << 23) + (__float_as_uint(low) & 0x7fffffu);
  }
  static __device__ __forceinline__ int bin(float t) { return static_cast<int>(fminf(t * kBinScale, static_cast<float>(kBins - 1))); }
};

struct Histogram {
  uint32_t low[kBins], high[kBins], count[kBins];  // mass in two words, counts
};
struct Candidates {
  u64 key[kCandidates], weight[kCandidates];
};
template <int C>
struct CutShared {
  static constexpr int kAll = C > 1;  // of two, the first is the block's own and the second the whole row's
  Histogram histogram[kAll + 1];
  Candidates candidates[kAll + 1];
  u64 scratch[kRowWarps];
  u64 before_count, before_mass;  // the bin, and what is before it
  int bin, num_candidates;
  u64 cut, kept;
};

template <int C>
__device__ void build_histogram(const Row& row, const Weights& weights, bool counts, RowTeam<C>& team, CutShared<C>& sh) {
  Histogram& h = sh.histogram[0];
  h.low[threadIdx.x] = h.high[threadIdx.x] = h.count[threadIdx.x] = 0;
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
      const uint32_t carry = atomicAdd(&h.low[bin], low) > ~low;
      const uint32_t high = static_cast<uint32_t>(w >> 32) + carry;
      if (high) atomicAdd(&h.high[bin], high);
      if (counts) atomicAdd(&h.count[bin], 1u);
    }
  });
  tail_mass = block_sum(tail_mass, sh.scratch);
  const u64 tail = block_sum(tail_count, sh.scratch);
  if (threadIdx.x == 0) {
    h.low[kBins - 1] = static_cast<uint32_t>(tail_mass), h.high[kBins - 1] = static_cast<uint32_t>(tail_mass >> 32);
    h.count[kBins - 1] = static_cast<uint32_t>(tail);
  }
  __syncthreads();
  if constexpr (C > 1) {  // each block adds up its share of the bins and hands the sums to all
    team.sync();
    if (threadIdx.x < kBins / C) {
      const int bin = team.rank * (kBins / C) + threadIdx.x;
      u64 mass = 0;
      uint32_t count = 0;
#pragma unroll
      for (int peer = 0; peer < C; peer++) {
        mass += (static_cast<u64>(team.read(&h.high[bin], peer)) << 32) + team.read(&h.low[bin], peer);
        if (counts) count += team.read(&h.count[bin], peer);
      }
      Histogram& all = sh.histogram[1];
#pragma unroll
      for (int peer = 0; peer < C; peer++) {
        team.write(&all.low[bin], peer, static_cast<uint32_t>(mass)), team.write(&all.high[bin], peer, static_cast<uint32_t>(mass >> 32));
        if (counts) team.write(&all.count[bin], peer, count);
      }
    }
    team.sync();
  }
}

template <int C>
__device__ __forceinline__ u64 bin_mass(const CutShared<C>& sh) {
  const Histogram& h = sh.histogram[sh.kAll];
  return static_cast<u64>(h.high[threadIdx.x]) << 32 | h.low[threadIdx.x];
}

// The bin in which the `need`-th unit of count, or of mass, lies: sh.bin, and what is before it. False where there are not so many.
template <bool kByCount, int C>
__device__ bool find_bin(u64 need, CutShared<C>& sh) {
  u64 total_mass, total_count = 0;
  const u64 bin = bin_mass(sh), bin_count = sh.histogram[sh.kAll].count[threadIdx.x];
  const u64 mass = block_scan(bin, total_mass, sh.scratch);
  const u64 count = kByCount ? block_scan(bin_count, total_count, sh.scratch) : 0;
  if (kByCount && total_count <= need) return false;
  const u64 start = kByCount ? count : mass, end = start + (kByCount ? bin_count : bin);
  if (start < need && need <= end) sh.bin = threadIdx.x, sh.before_mass = mass, sh.before_count = count;
  __syncthreads();
  return true;
}

struct Bracket {
  u64 low, high;  // keys
  u64 num, before_count, before_mass;
};

// Narrows a bracket, whose elements (of weight above 0) are too many to rank, around the `need`-th unit.
template <bool kByCount, int C>
__device__ void bisect(const Row& row, const Weights& weights, u64 need, Bracket& b, RowTeam<C>& team, CutShared<C>& sh) {
  while (b.num > kCandidates && b.low < b.high) {
    const u64 middle = b.low + (b.high - b.low) / 2 + 1;  // upper part: [middle, high]
    u64 mass = 0, count = 0;
    row.each<1>(-INFINITY, [&](float x, int id) {
      const u64 key = rank_key(x, id);
      if (key >= middle && key <= b.high) {
        const u64 w = weights.of(weights.scaled(x));
        mass += w, count += w != 0;
      }
    });
    mass = team.sum(block_sum(mass, sh.scratch)), count = team.sum(block_sum(count, sh.scratch));
    if (need <= (kByCount ? b.before_count + count : b.before_mass + mass)) {
      b.low = middle, b.num = count;
    } else {
      b.high = middle - 1, b.num -= count;
      b.before_count += count, b.before_mass += mass;
    }
  }
}

// Lists the elements for which `inside` holds and widens `b` by their keys; b.num is how many there are, which the list may not hold.
template <int C, typename F>
__device__ __forceinline__ void list_candidates(const Row& row, const Weights& weights, Bracket& b, RowTeam<C>& team, CutShared<C>& sh,
                                                F&& inside) {
  Candidates& own = sh.candidates[0];
  team.sync();  // another block may still read the list before this one
  if (threadIdx.x == 0) sh.num_candidates = 0;
  __syncthreads();
  row.each<2>(-INFINITY, [&](float x, int id) {
    if (!inside(x, id)) return;
    const u64 w = weights.of(weights.scaled(x));
    if (!w) return;
    const u64 key = rank_key(x, id);
    const int i = atomicAdd(&sh.num_candidates, 1);
    b.low = key < b.low ? key : b.low, b.high = key > b.high ? key : b.high;
    if (i < kCandidates) own.key[i] = key, own.weight[i] = w;
  });
  __syncthreads();
  b.num = sh.num_candidates;
  if constexpr (C > 1) {
    const u64* nums = team.exchange(b.num);
    u64 total = 0;
    int peer = 0, index = threadIdx.x;
    for (int i = 0; i < C; i++) {
      total += nums[i];
      if (peer == i && index >= static_cast<int>(nums[i])) index -= static_cast<int>(nums[i]), peer++;
    }
    b.num = total;
    if (total <= kCandidates && threadIdx.x < total) {
      sh.candidates[1].key[threadIdx.x] = team.read(&own.key[index], peer);
      sh.candidates[1].weight[threadIdx.x] = team.read(&own.weight[index], peer);
    }
    __syncthreads();
  }
}

// Cuts the ranking of the row in sh.bin where `need` is reached: sh.cut is the key of the last element kept, sh.kept the mass of all kept.
template <bool kByCount, int C>
__device__ void find_cut(const Row& row, const Weights& weights, u64 need, RowTeam<C>& team, CutShared<C>& sh) {
  const int bin = sh.bin;
  Bracket b{~0ull, 0, 0, sh.before_count, sh.before_mass};
  list_candidates(row, weights, b, team, sh, [&](float x, int) { return Weights::bin(weights.scaled(x)) == bin; });
  if (b.num > kCandidates) {
    b.high = team.max(block_max(b.high, sh.scratch)), b.low = ~team.max(block_max(~b.low, sh.scratch));
    bisect<kByCount>(row, weights, need, b, team, sh);
    const u64 low = b.low, high = b.high;
    list_candidates(row, weights, b, team, sh, [&](float x, int id) {
      const u64 key = rank_key(x, id);
      return key >= low && key <= high;
    });
  }
  const int num = static_cast<int>(b.num);
  const Candidates& all = sh.candidates[sh.kAll];
  if (threadIdx.x < num) {
    const u64 key = all.key[threadIdx.x], w = all.weight[threadIdx.x];
    u64 mass = b.before_mass, count = b.before_count;
#pragma unroll 2
    for (int i = 0; i < num; i++)
      if (all.key[i] > key) mass += all.weight[i], count++;
    const u64 start = kByCount ? count : mass, end = start + (kByCount ? 1 : w);
    if (start < need && need <= end) sh.cut = key, sh.kept = mass + w;
  }
  __syncthreads();
}

}  // namespace gptq
