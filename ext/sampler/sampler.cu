#include "sampler/sampler_race.cuh"

namespace gptq {
namespace {

template <int C>
__device__ __forceinline__ void sample_row(const SamplerRows& a, const SamplerHistory& history, int* tokens) {
  __shared__ CutShared<C> sh;
  __shared__ u64 mail[2][C];
  grid_launch_dependents();
  grid_wait();
  const int r = blockIdx.x / C, seat = field(a, r, kSeat), warp = threadIdx.x >> 5;
  const bool first_thread = blockIdx.x % C == 0 && threadIdx.x == 0;
  if (seat < 0) {
    if (first_thread) tokens[r] = -1;
    return;
  }
  RowTeam<C> team(mail);
  const auto finish = [&](int token) {
    tokens[r] = token;
    const int length = field(a, r, kLength);
    if (length < history.capacity) history.tokens[seat * history.ld + length] = max(token, 0);  // -1 is no input id
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
cudaError_t launch_teams(const SamplerRows& rows, const SamplerHistory& history, int* tokens, cudaStream_t stream) {
  return launch_overlapped(sample_kernel<C>, dim3(rows.S * C), kRowThreads, C, stream, rows, history, tokens);
}

}  // namespace

cudaError_t launch_sample(const SamplerRows& rows, const SamplerHistory& history, int* tokens, cudaStream_t stream) {
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  // As many blocks per row as run at once: a few SMs have no neighbours to form a cluster with.
  const int spare = device.code < 90 ? 1 : device.sms * 7 / 8 / rows.S;
  if (spare >= 8) return launch_teams<8>(rows, history, tokens, stream);
  if (spare >= 4) return launch_teams<4>(rows, history, tokens, stream);
  if (spare >= 2) return launch_teams<2>(rows, history, tokens, stream);
  return launch_teams<1>(rows, history, tokens, stream);
}

}  // namespace gptq
