// Warpgroup matrix multiply with A in registers, tensor-map loads with multicast, transposing stores to shared memory:
// the sm_90a instructions of the GEMM. Only translation units built for sm_90a may include this.
#pragma once
#include <cuda.h>

#include <cstdint>

#include "common/cluster.cuh"
#include "common/ptx.cuh"

namespace gptq {

// ---- wgmma m64nNk16, fp32 accumulators, A (weights) from registers (Wgmma) or shared memory (WgmmaShared), B (tokens) from shared memory,
// both K-major ----------------------------------------------------------------------------------------------------------------------------
// d[4j], d[4j+1]: row g of the warp's 16, columns 8j+2t, 8j+2t+1; d[4j+2], d[4j+3]: row g+8. `accumulate` 0 overwrites d.

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// A tile with rows of 64 k (128 B) under the 128-byte swizzle: groups of 8 rows lie 1024 B apart. `start` is the address / 16; 16 k are 2.
__device__ __forceinline__ uint64_t wgmma_desc(uint32_t start) {
  constexpr uint32_t kSwizzle128 = 1u << 30, kStride = 1024 >> 4;
  uint64_t desc;
  asm("mov.b64 %0, {%1, %2};" : "=l"(desc) : "r"(start), "n"(kSwizzle128 | kStride));
  return desc;
}

template <bool BF, int N>
struct Wgmma;
template <bool BF, int N>
struct WgmmaShared;

// The accumulators of N columns, N/2 registers, as asm text (GPTQ_R) and as operands (GPTQ_D).
#define GPTQ_R4 "%0, %1, %2, %3"
#define GPTQ_R8 GPTQ_R4 ", %4, %5, %6, %7"
#define GPTQ_R16 GPTQ_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define GPTQ_R32 GPTQ_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define GPTQ_R48 GPTQ_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define GPTQ_R64 GPTQ_R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GPTQ_R96 \
  GPTQ_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define GPTQ_R128 \
  GPTQ_R96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define GPTQ_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define GPTQ_D8(i) GPTQ_D4(i), GPTQ_D4(i + 4)
#define GPTQ_D16(i) GPTQ_D8(i), GPTQ_D8(i + 8)
#define GPTQ_D32(i) GPTQ_D16(i), GPTQ_D16(i + 16)
#define GPTQ_D64(i) GPTQ_D32(i), GPTQ_D32(i + 32)
#define GPTQ_WGMMA(BF, TYPE, N, REGS, A, DESC, ACC, ...)                                                                            \
  template <>                                                                                                                   \
  struct Wgmma<BF, N> {                                                                                                         \
    static __device__ __forceinline__ void mma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t desc, int accumulate) {      \
      asm volatile("{\n.reg .pred acc;\nsetp.ne.b32 acc, " ACC ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
                   " {" REGS "}, {" A "}, " DESC ", acc, 1, 1, 0;\n}\n"                                                          \
                   : __VA_ARGS__                                                                                                \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc), "r"(accumulate));                                   \
    }                                                                                                                           \
  };
#define GPTQ_WGMMA_BOTH(...) GPTQ_WGMMA(false, "f16", __VA_ARGS__) GPTQ_WGMMA(true, "bf16", __VA_ARGS__)
GPTQ_WGMMA_BOTH(16, GPTQ_R8, "%8, %9, %10, %11", "%12", "%13", GPTQ_D8(0))
GPTQ_WGMMA_BOTH(32, GPTQ_R16, "%16, %17, %18, %19", "%20", "%21", GPTQ_D16(0))
GPTQ_WGMMA_BOTH(64, GPTQ_R32, "%32, %33, %34, %35", "%36", "%37", GPTQ_D32(0))
GPTQ_WGMMA_BOTH(96, GPTQ_R48, "%48, %49, %50, %51", "%52", "%53", GPTQ_D32(0), GPTQ_D16(32))
GPTQ_WGMMA_BOTH(128, GPTQ_R64, "%64, %65, %66, %67", "%68", "%69", GPTQ_D64(0))
GPTQ_WGMMA_BOTH(192, GPTQ_R96, "%96, %97, %98, %99", "%100", "%101", GPTQ_D64(0), GPTQ_D32(64))
GPTQ_WGMMA_BOTH(256, GPTQ_R128, "%128, %129, %130, %131", "%132", "%133", GPTQ_D64(0), GPTQ_D64(64))
#define GPTQ_WGMMA_SHARED(BF, TYPE, N, REGS, A, B, ACC, ...)                                                                       \
  template <>                                                                                                                   \
  struct WgmmaShared<BF, N> {                                                                                                   \
    static __device__ __forceinline__ void mma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {                     \
      asm volatile("{\n.reg .pred acc;\nsetp.ne.b32 acc, " ACC ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
                   " {" REGS "}, " A ", " B ", acc, 1, 1, 0, 0;\n}\n"                                                            \
                   : __VA_ARGS__                                                                                                \
                   : "l"(a), "l"(b), "r"(accumulate));                                                                          \
    }                                                                                                                           \
  };
#define GPTQ_WGMMA_SHARED_BOTH(...) GPTQ_WGMMA_SHARED(false, "f16", __VA_ARGS__) GPTQ_WGMMA_SHARED(true, "bf16", __VA_ARGS__)
GPTQ_WGMMA_SHARED_BOTH(8, GPTQ_R4, "%4", "%5", "%6", GPTQ_D4(0))
GPTQ_WGMMA_SHARED_BOTH(16, GPTQ_R8, "%8", "%9", "%10", GPTQ_D8(0))
GPTQ_WGMMA_SHARED_BOTH(32, GPTQ_R16, "%16", "%17", "%18", GPTQ_D16(0))
GPTQ_WGMMA_SHARED_BOTH(64, GPTQ_R32, "%32", "%33", "%34", GPTQ_D32(0))
GPTQ_WGMMA_SHARED_BOTH(128, GPTQ_R64, "%64", "%65", "%66", GPTQ_D64(0))
GPTQ_WGMMA_SHARED_BOTH(192, GPTQ_R96, "%96", "%97", "%98", GPTQ_D64(0), GPTQ_D32(64))
GPTQ_WGMMA_SHARED_BOTH(256, GPTQ_R128, "%128", "%129", "%130", GPTQ_D64(0), GPTQ_D64(64))
#undef GPTQ_WGMMA_SHARED_BOTH
#undef GPTQ_WGMMA_SHARED
#undef GPTQ_WGMMA_BOTH
#undef GPTQ_WGMMA
#undef GPTQ_D64
#undef GPTQ_D32
#undef GPTQ_D16
#undef GPTQ_D8
#undef GPTQ_D4
#undef GPTQ_R128
#undef GPTQ_R96
#undef GPTQ_R64
#undef GPTQ_R48
#undef GPTQ_R32
#undef GPTQ_R16
#undef GPTQ_R8
#undef GPTQ_R4

// ---- tensor-map loads: the map fixes the size of the box --------------------------------------------------------
__device__ __forceinline__ void tensor_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void tensor_load(uint32_t dst, const CUtensorMap* map, int k, int m, uint32_t bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(dst),
               "l"(map), "r"(k), "r"(m), "r"(bar)
               : "memory");
}
__device__ __forceinline__ void tensor_load_3d(uint32_t dst, const CUtensorMap* map, int c0, int c1, int c2, uint32_t bar) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(dst),
               "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(bar)
               : "memory");
}
// The same box lands at the same offset of every block in `mask`, and counts at each one's barrier.
__device__ __forceinline__ void tensor_load_multicast(uint32_t dst, const CUtensorMap* map, int k, int m, uint32_t bar, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::
          "r"(dst),
      "l"(map), "r"(k), "r"(m), "r"(bar), "h"(mask)
      : "memory");
}

// ---- transposing loads and stores: 8x8 blocks held as matrix fragments (row g, columns 2t, 2t+1) land as rows of 8 columns' values -----
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t addr, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(addr) : "memory");
}
__device__ __forceinline__ void stmatrix_x2_trans(uint32_t addr, uint32_t r0, uint32_t r1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(addr), "r"(r0), "r"(r1) : "memory");
}

}  // namespace gptq
