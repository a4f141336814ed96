// The exchange of the residual stream and the RMSNorm behind it, in one kernel: who normalizes a row pushes this rank's part of it, and
// has the peers' parts in registers as soon as they are here.
#include <algorithm>
#include <atomic>

#include "common/launch.cuh"
#include "exchange/exchange.cuh"
#include "ops/rms_norm.cuh"

namespace gptq {
namespace {

template <bool BF, bool PERM, int N>
__global__ void __launch_bounds__(512) exchange_norm_kernel(const __grid_constant__ ExchangeArgs e, const __grid_constant__ RmsNormArgs a) {
  ExchangeState& state = *e.state;
  rms_norm_rows<BF, PERM, N>(a, [&](uint4(&x)[N], int row) {
#pragma unroll
    for (int j = 0; j < N; j++) x[j] = uint4{};
    if (row >= a.T) return;  // a block has one row
    const Round round(state);
    const uint64_t tag = static_cast<uint64_t>(round.number) << 32;
    const size_t turn = static_cast<size_t>(round.number & 1) * e.ranks;
    const int own_begin = e.begin[e.rank], own_end = e.begin[e.rank + 1];
    uint16_t* const stream = reinterpret_cast<uint16_t*>(e.full[e.rank]) + static_cast<size_t>(row) * a.ldx;
#pragma unroll
    for (int j = 0; j < N; j++) {
      const int k = vector_at(j), column = k / 2;
      if (k >= a.H) continue;
      if (round.live && (column < own_begin || column >= own_end)) continue;
      x[j] = load16(stream + k);
      if (!round.live) continue;
      const size_t at = (turn + e.rank) * e.capacity + static_cast<size_t>(row) * (own_end - own_begin) + column - own_begin;
      for (int peer = 0; peer < e.ranks; peer++) {
        if (peer == e.rank) continue;
        push2(e.words[peer] + at, tag | x[j].x, tag | x[j].y);
        push2(e.words[peer] + at + 2, tag | x[j].z, tag | x[j].w);
      }
    }
    pass_round(state, round);
    if (!round.live) return;
#pragma unroll
    for (int j = 0; j < N; j++) {
      const int k = vector_at(j), column = k / 2;
      if (k >= a.H || (column >= own_begin && column < own_end)) continue;
      int peer = 0;
      while (column >= e.begin[peer + 1]) peer++;
      const int begin = e.begin[peer], theirs = e.begin[peer + 1] - begin;
      const uint64_t* const from =
          e.words[e.rank] + (turn + peer) * e.capacity + static_cast<size_t>(row) * theirs + column - begin;
      ulonglong2 low = {}, high = {};
      const auto is_here = [&](uint64_t word) { return word >> 32 == round.number; };
      wait_for(e, peer, [&] {
        low = look2(from), high = look2(from + 2);
        return is_here(low.x) && is_here(low.y) && is_here(high.x) && is_here(high.y);
      });
      x[j] = make_uint4(static_cast<uint32_t>(low.x), static_cast<uint32_t>(low.y), static_cast<uint32_t>(high.x),
                        static_cast<uint32_t>(high.y));
      store16(stream + k, x[j]);
    }
  });
}

template <bool BF, bool PERM, int N>
cudaError_t launch(const ExchangeArgs& e, const RmsNormArgs& a, cudaStream_t stream) {
  static std::atomic<uint64_t> done;
  const void* kernel = reinterpret_cast<const void*>(&exchange_norm_kernel<BF, PERM, N>);
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  if (const cudaError_t status = set_limits(kernel, done, 4 * kMaxWidth, device); status != cudaSuccess) return status;
  return launch_kernel(kernel, {dim3(a.T), norm_threads(a.H, N), PERM ? 2 * a.H : 0, stream}, device, e, a);  // a row each
}

template <bool BF, bool PERM>
cudaError_t launch(const ExchangeArgs& e, const RmsNormArgs& a, cudaStream_t stream) {
  if (a.H <= kOneVector) return launch<BF, PERM, 1>(e, a, stream);
  if (a.H <= kTwoVectors) return launch<BF, PERM, 2>(e, a, stream);
  return launch<BF, PERM, 4>(e, a, stream);
}

}  // namespace

cudaError_t launch_exchange_norm(const ExchangeArgs& e, const RmsNormArgs& a, bool bf16, cudaStream_t stream) {
  if (e.ranks < 2 || e.ranks > kMaxRanks || e.state == nullptr || e.index != nullptr || a.H > kMaxWidth || a.H % kVector || a.ldx % kVector)
    return cudaErrorInvalidValue;
  for (int rank = 0; rank < e.ranks; rank++) {
    const int words = e.begin[rank + 1] - e.begin[rank];
    if (e.begin[rank] % 4 || words <= 0 || a.T * words > e.capacity || e.words[rank] == nullptr) return cudaErrorInvalidValue;
  }
  if (bf16) return a.perm ? launch<true, true>(e, a, stream) : launch<true, false>(e, a, stream);
  return a.perm ? launch<false, true>(e, a, stream) : launch<false, false>(e, a, stream);
}

}  // namespace gptq
