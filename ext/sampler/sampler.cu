#include "sampler/sampler_cut.cuh"

namespace gptq {
namespace {

// What may be drawn: elements from the cut up.
struct Kept {
  Weights weights;
  float value;
  int id;

  __device__ __forceinline__ bool has(float x, int i) const { return (x > value || (x == value && i <= id)) && weights.of(weights.scaled(x)); }
};

// The exponential race of a row: every element that is kept scores its scaled logit plus Gumbel noise of its own, in units of log 2; the highest wins.
struct Race {
  Kept kept;
  uint32_t key0, key1;
  float score;  // of the leader, as far as this lane knows
  int id;

  __device__ __forceinline__ Race(const Kept& kept, u64 bits, int best_id)
      : kept(kept), key0(static_cast<uint32_t>(bits)), key1(static_cast<uint32_t>(bits >> 32)), score(race_noise(random_word(key0, key1, best_id))), id(best_id) {}

  __device__ __forceinline__ void enter(float x, int i, uint32_t word) {
    const float s = __fmaf_rn(kept.weights.scaled(x), 1.44269504f, race_noise(word));
    if (s > score && kept.has(x, i)) score = s, id = i;
  }

  // One warp's elements, four chunks in flight. E is at least v / log(2), so only words below a bound can beat the leader, even beside the likeliest of
  // the lane's four elements: the logarithms are for those. (The bound's margin, 1 %, is far above the rounding of all that is in it.)
  __device__ __forceinline__ void run(const Row& row) {
#pragma unroll 1
    for (int c = row.first; c < row.last; c += 4) {
      float4 x[4];
#pragma unroll
      for (int u = 0; u < 4; u++) x[u] = row.load(c + u, -INFINITY);
#pragma unroll
      for (int u = 0; u < 4; u++) chunk(x[u], (c + u) * kRowChunk + (threadIdx.x & 31) * 4);
    }
  }

  __device__ __forceinline__ void chunk(float4 x, int i) {
    const float largest = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
    const float lead = __fmaf_rn(kept.weights.scaled(largest), 1.44269504f, 31.49f - score);
    const uint32_t bound = largest < kept.value ? 0 : __float2uint_rn(exp2_approx(lead));
    if (!__any_sync(~0u, bound > 0)) return;
    const uint32_t w0 = random_word(key0, key1, i), w1 = random_word(key0, key1, i + 1), w2 = random_word(key0, key1, i + 2), w3 = random_word(key0, key1, i + 3);
    const bool may_win = min(min(w0, w1), min(w2, w3)) < bound;
    if (!__any_sync(~0u, may_win)) return;
    if (may_win) enter(x.x, i, w0), enter(x.y, i + 1, w1), enter(x.z, i + 2, w2), enter(x.w, i + 3, w3);
    follow();
  }

  // Every lane takes over the leader of the warp.
  __device__ __forceinline__ void follow() {
    const u64 leader = warp_max(rank_key(score, id));
    score = key_value(leader), id = key_id(leader);
  }
};

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

  Race race(kept, random_bits(field(a, r, kSeedLow), field(a, r, kSeedHigh), field(a, r, kLength)), key_id(top));
  race.run(row);
  const u64 winner = team.max(block_max(rank_key(race.score, race.id), sh.scratch));
  if (first_thread) finish(key_id(winner));
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
