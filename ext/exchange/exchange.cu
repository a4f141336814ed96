// Ranks are GPUs of one process. Whoever computed something pushes it, into its peers' memory or, where a GPU cannot write another one's,
// into the host's; nobody asks.
//
// A rank may write what a peer is still reading only where that cannot be: between two pushes to the same place lies an exchange in the
// other direction, whose words the peer pushed after it had read the place (its kernels run one after another, and each waits for the
// whole of the one before). The two buffers of words take turns for the same reason: who pushes round n + 2 has received round n + 1,
// which was pushed by who had read round n. So nothing is emptied and there is no barrier.
#include "exchange/exchange.h"

#include <algorithm>
#include <atomic>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "exchange/exchange.cuh"

namespace gptq {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxRowBlocks = 264;  // of the kernel for many rows

__device__ __forceinline__ void put(const ExchangeArgs& a, int row, int column, uint32_t word) {
  uint32_t* const to = a.full[a.rank] + static_cast<size_t>(row) * a.ldf;
  if (a.index == nullptr) {
    to[column] = word;
    return;
  }
  const int2 places = *reinterpret_cast<const int2*>(a.index + 2 * column);
  uint16_t* const halves = reinterpret_cast<uint16_t*>(to);
  halves[places.x] = static_cast<uint16_t>(word), halves[places.y] = static_cast<uint16_t>(word >> 16);
}

__global__ void __launch_bounds__(kThreads) exchange_words_kernel(const __grid_constant__ ExchangeArgs a) {
  grid_launch_dependents();
  grid_wait();
  ExchangeState& state = *a.state;
  const Round round(state);
  const bool live = round.live;
  const uint64_t tag = static_cast<uint64_t>(round.number) << 32;
  const size_t turn = static_cast<size_t>(round.number & 1) * a.ranks;
  const int own = a.begin[a.rank + 1] - a.begin[a.rank], first = blockIdx.x * kThreads + threadIdx.x, step = gridDim.x * kThreads;
  const bool in_place = a.index == nullptr && a.source == a.full[a.rank] + a.begin[a.rank];
  for (int i = first; i < a.rows * own; i += step) {
    const int row = i / own, column = i - row * own;
    const uint32_t word = a.source[static_cast<size_t>(row) * a.lds + column];
    if (live)
      for (int peer = 0; peer < a.ranks; peer++)
        if (peer != a.rank) push(a.words[peer] + (turn + a.rank) * a.capacity + i, tag | word);
    if (!in_place) put(a, row, a.begin[a.rank] + column, word);
  }
  pass_round(state, round);
  if (live)
    for (int peer = 0; peer < a.ranks; peer++) {
      if (peer == a.rank) continue;
      const int theirs = a.begin[peer + 1] - a.begin[peer];
      for (int i = first; i < a.rows * theirs; i += step) {
        const uint64_t* const from = a.words[a.rank] + (turn + peer) * a.capacity + i;
        uint64_t word = 0;
        wait_for(a, peer, [&] { return (word = look(from)) >> 32 == round.number; });
        const int row = i / theirs;
        put(a, row, a.begin[peer] + i - row * theirs, static_cast<uint32_t>(word));
      }
    }
}

// [rows, columns] of a round, with the strides of `full`.
__device__ __forceinline__ uint32_t* stage_of(const ExchangeArgs& a, const Round& round) { return a.staged + (round.number & 1) * a.stage; }

// 16 bytes at a time where rows allow it.
template <typename Vector>
__device__ __forceinline__ void push_rows(const ExchangeArgs& a, const Round& round, bool in_place) {
  constexpr int kWords = sizeof(Vector) / 4;
  const int own = (a.begin[a.rank + 1] - a.begin[a.rank]) / kWords;
  const int64_t total = static_cast<int64_t>(a.rows) * own;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / own, column = (i - row * own) * kWords;
    const Vector v = *reinterpret_cast<const Vector*>(a.source + row * a.lds + column);
    const int64_t at = row * a.ldf + a.begin[a.rank] + column;
    if (!in_place) *reinterpret_cast<Vector*>(a.full[a.rank] + at) = v;
    if (!round.live) continue;
    if (a.staged != nullptr) {
      *reinterpret_cast<Vector*>(stage_of(a, round) + at) = v;
      continue;
    }
    for (int peer = 0; peer < a.ranks; peer++)
      if (peer != a.rank) *reinterpret_cast<Vector*>(a.full[peer] + at) = v;
  }
}

__device__ __forceinline__ void wait_for_rows(const ExchangeArgs& a, int peer, const Round& round) {
  wait_for(a, peer, [&] { return static_cast<int32_t>(acquire(a.arrived[a.rank] + peer) - round.number) >= 0; });
}

__global__ void __launch_bounds__(kThreads) exchange_rows_kernel(const __grid_constant__ ExchangeArgs a, bool vectors) {
  grid_launch_dependents();
  grid_wait();
  ExchangeState& state = *a.state;
  const Round round(state);
  const bool in_place = a.source == a.full[a.rank] + a.begin[a.rank];
  vectors ? push_rows<uint4>(a, round, in_place) : push_rows<uint32_t>(a, round, in_place);
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence_system();
  if (!is_last(state) || !round.live) return;
  __threadfence_system();
  for (int peer = 0; peer < a.ranks; peer++)
    if (peer != a.rank) release(a.arrived[peer] + a.rank, round.number);
  if (a.staged != nullptr) return;  // the round goes on in pull_rows_kernel
  for (int peer = 0; peer < a.ranks; peer++)
    if (peer != a.rank) wait_for_rows(a, peer, round);
  state.round = round.number;
}

template <typename Vector>
__device__ __forceinline__ void pull_rows(const ExchangeArgs& a, const Round& round) {
  constexpr int kWords = sizeof(Vector) / 4;
  const int columns = a.begin[a.ranks] / kWords, begin = a.begin[a.rank] / kWords, end = a.begin[a.rank + 1] / kWords;
  const uint32_t* const stage = stage_of(a, round);
  const int64_t total = static_cast<int64_t>(a.rows) * columns;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / columns, column = i - row * columns;
    if (column >= begin && column < end) continue;
    const int64_t at = row * a.ldf + column * kWords;
    *reinterpret_cast<Vector*>(a.full[a.rank] + at) = *reinterpret_cast<const Vector*>(stage + at);
  }
}

// The other half of a round of rows that are staged: a kernel of its own, whose blocks need not all be there at once to wait.
__global__ void __launch_bounds__(kThreads) pull_rows_kernel(const __grid_constant__ ExchangeArgs a, bool vectors) {
  grid_launch_dependents();
  grid_wait();
  const Round round(*a.state);
  if (!round.live) return;
  if (threadIdx.x < a.ranks && threadIdx.x != a.rank) wait_for_rows(a, threadIdx.x, round);
  pass_round(*a.state, round);  // after a barrier: what one thread has seen come, all have
  vectors ? pull_rows<uint4>(a, round) : pull_rows<uint32_t>(a, round);
}

bool fits(const ExchangeArgs& a) {
  if (a.ranks < 2 || a.ranks > kMaxRanks || a.rank < 0 || a.rank >= a.ranks || a.rows <= 0 || a.stuck == nullptr || a.state == nullptr)
    return false;
  for (int rank = 0; rank < a.ranks; rank++)
    if (a.begin[rank + 1] < a.begin[rank] || a.full[rank] == nullptr) return false;
  return a.source != nullptr && a.ldf >= a.begin[a.ranks];
}

}  // namespace

cudaError_t launch_exchange_words(const ExchangeArgs& args, cudaStream_t stream) {
  if (!fits(args)) return cudaErrorInvalidValue;
  int most = 0;
  for (int rank = 0; rank < args.ranks; rank++) {
    most = std::max(most, args.rows * (args.begin[rank + 1] - args.begin[rank]));
    if (args.words[rank] == nullptr) return cudaErrorInvalidValue;
  }
  if (most > args.capacity) return cudaErrorInvalidValue;
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  const int blocks = std::max(1, std::min((most + kThreads - 1) / kThreads, 2 * device.sms));
  return launch_kernel(reinterpret_cast<const void*>(&exchange_words_kernel), {dim3(blocks), kThreads, 0, stream}, device, args);
}

cudaError_t launch_exchange_rows(const ExchangeArgs& args, cudaStream_t stream) {
  if (!fits(args) || args.index != nullptr) return cudaErrorInvalidValue;
  for (int rank = 0; rank < args.ranks; rank++)
    if (args.arrived[rank] == nullptr) return cudaErrorInvalidValue;
  if (args.staged != nullptr && static_cast<int64_t>(args.rows) * args.ldf > args.stage) return cudaErrorInvalidValue;
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  bool vectors = args.lds % 4 == 0 && args.ldf % 4 == 0 && reinterpret_cast<uintptr_t>(args.source) % 16 == 0;
  for (int rank = 0; rank < args.ranks; rank++)
    vectors = vectors && reinterpret_cast<uintptr_t>(args.full[rank]) % 16 == 0 && args.begin[rank] % 4 == 0 &&
              (args.begin[rank + 1] - args.begin[rank]) % 4 == 0;
  const auto blocks = [&](int columns) {
    const int64_t pieces = static_cast<int64_t>(args.rows) * columns / (vectors ? 4 : 1);
    return dim3(static_cast<int>(std::max<int64_t>(1, std::min<int64_t>((pieces + kThreads - 1) / kThreads, kMaxRowBlocks))));
  };
  const int own = args.begin[args.rank + 1] - args.begin[args.rank];
  const cudaError_t status =
      launch_kernel(reinterpret_cast<const void*>(&exchange_rows_kernel), {blocks(own), kThreads, 0, stream}, device, args, vectors);
  if (status != cudaSuccess || args.staged == nullptr) return status;
  const dim3 pulling = blocks(args.begin[args.ranks] - own);
  return launch_kernel(reinterpret_cast<const void*>(&pull_rows_kernel), {pulling, kThreads, 0, stream}, device, args, vectors);
}

cudaError_t enable_peer_access(int peer) {
  int device = 0, can = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  if (device == peer) return cudaSuccess;
  if (const cudaError_t status = cudaDeviceCanAccessPeer(&can, device, peer); status != cudaSuccess) return status;
  if (!can) return cudaErrorPeerAccessUnsupported;
  const cudaError_t status = cudaDeviceEnablePeerAccess(peer, 0);
  if (status != cudaErrorPeerAccessAlreadyEnabled) return status;
  cudaGetLastError();
  return cudaSuccess;
}

}  // namespace gptq
