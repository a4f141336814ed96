// Blocks of a cluster: who one is, barriers of all, the shared memory of the others. Absent before sm_90, which has no clusters.
#pragma once
#include <cstdint>

namespace gptq {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // and in the host's pass, which looks names up in templates of the GEMM
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ uint32_t cluster_id() {
  uint32_t r;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(r));
  return r;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}

// Every warp of the cluster calls these, converged. What any thread wrote before cluster_sync(), all see after it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// In two halves, and publishing nothing: after both, every block of the cluster has started. mbar_init_fence() is enough for its mbarriers
// to be seen, and a release would wait for everything else that the block has under way.
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Where the shared memory at `addr` of this block lies in block `rank` of the cluster.
__device__ __forceinline__ uint32_t cluster_address(uint32_t addr, uint32_t rank) {
  uint32_t r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(addr), "r"(rank));
  return r;
}
__device__ __forceinline__ void mbar_arrive_cluster(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}
// A store that counts at a barrier beside where it goes: no fence, which would wait for this warp's loads.
__device__ __forceinline__ void store_cluster(uint32_t addr, const float (&v)[4], uint32_t bar) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(addr), "f"(v[0]),
               "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(bar)
               : "memory");
}
#endif

}  // namespace gptq
