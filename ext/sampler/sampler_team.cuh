// The blocks that work on one row: a cluster of C, which see one another's shared memory. C == 1 is one block, on any architecture.
#pragma once
#include "common/cluster.cuh"
#include "common/ptx.cuh"
#include "sampler/sampler_row.cuh"

namespace gptq {

template <int C>
struct RowTeam {
  u64 (*mail)[C];  // shared [2][C]: what the others say, twice so that a slow reader is not overrun
  int rank;
  int turn = 0;

  __device__ __forceinline__ explicit RowTeam(u64 (*mail)[C]) : mail(mail), rank(C == 1 ? 0 : blockIdx.x % C) {
#if __CUDA_ARCH__ >= 900
    // Nobody may be written to before it runs; `meet` waits.
    if constexpr (C > 1) cluster_arrive_relaxed();
#endif
  }
  __device__ __forceinline__ void meet() const {
#if __CUDA_ARCH__ >= 900
    if constexpr (C > 1) cluster_wait();
#endif
  }
  __device__ __forceinline__ void sync() const {
#if __CUDA_ARCH__ >= 900
    if constexpr (C > 1) cluster_sync();
#endif
  }

  // The same variable of shared memory in another block.
#if __CUDA_ARCH__ >= 900
  static __device__ __forceinline__ uint32_t there(const void* here, int peer) { return cluster_address(smem_addr(here), peer); }
#endif
  static __device__ __forceinline__ u64 read(const u64* here, int peer) {
    u64 v = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(v) : "r"(there(here, peer)));
#endif
    return v;
  }
  static __device__ __forceinline__ uint32_t read(const uint32_t* here, int peer) {
    uint32_t v = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(there(here, peer)));
#endif
    return v;
  }
  static __device__ __forceinline__ void write(const u64* here, int peer, u64 v) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(there(here, peer)), "l"(v) : "memory");
#endif
  }
  static __device__ __forceinline__ void write(const uint32_t* here, int peer, uint32_t v) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there(here, peer)), "r"(v) : "memory");
#endif
  }

  // The values of all blocks by rank; a block's threads agree on its own. Everything written before is seen by all after.
  __device__ __forceinline__ const u64* exchange(u64 mine) {
    u64* box = mail[turn];
    turn ^= 1;
    if (C > 1 && threadIdx.x < C) write(box + rank, threadIdx.x, mine);
    sync();
    return box;
  }
  __device__ __forceinline__ u64 max(u64 mine) {
    if (C == 1) return mine;
    const u64* all = exchange(mine);
    for (int i = 0; i < C; i++) mine = all[i] > mine ? all[i] : mine;
    return mine;
  }
  __device__ __forceinline__ u64 sum(u64 mine) {
    u64 total;
    before(mine, total);
    return total;
  }
  // Sum over the blocks before this one; `total` over all.
  __device__ __forceinline__ u64 before(u64 mine, u64& total) {
    total = mine;
    if (C == 1) return 0;
    const u64* all = exchange(mine);
    u64 earlier = 0;
    total = 0;
    for (int i = 0; i < C; i++) {
      if (i == rank) earlier = total;
      total += all[i];
    }
    return earlier;
  }
};

}  // namespace gptq
