// The GEMV kernel for devices without bulk copies, or without the shared memory for the other one's ring.
#pragma once
#include "gemv/gemv_math.cuh"

namespace gptq {

// A strip at a time, its chunks dealt to the warps, each lane fetching with cp.async the bytes it will read itself, x straight from the
// caches.
constexpr int kPortableWarps = 8;
constexpr int kPortableDepth = 6;

inline int portable_smem(int nt, int chunk) { return kPortableWarps * (kPortableDepth * chunk + nt * 512); }

template <int NT, int G, bool ZP, bool BF>
__device__ __forceinline__ void gemv_portable(const GemvArgs& a, uint8_t* smem) {
  using C = Chunk<G, ZP>;
  constexpr int kMeta = (C::kBytes - kWeightBytes) / 16;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int nch = (a.K + kChunkK - 1) / kChunkK;
  const uint8_t* ring = smem + warp * kPortableDepth * C::kBytes;
  float4* red = reinterpret_cast<float4*>(smem + kPortableWarps * kPortableDepth * C::kBytes);
  for (int strip = blockIdx.x; strip < a.N / kStripRows; strip += gridDim.x) {
    const auto fetch = [&](int c) {
      if (c < nch) {
        const uint32_t dst = smem_addr(ring) + (c / kPortableWarps % kPortableDepth) * C::kBytes + lane * 16;
        const uint8_t* src = a.w + (static_cast<size_t>(strip) * nch + c) * C::kBytes + lane * 16;
        cp_async16(dst, src);
        cp_async16(dst + kBlockBytes, src + kBlockBytes);
        if (lane < kMeta) cp_async16(dst + kWeightBytes, src + kWeightBytes);
      }
      cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < kPortableDepth - 1; i++) fetch(warp + i * kPortableWarps);
    float acc[kPair][NT][4] = {};
    for (int c = warp; c < nch; c += kPortableWarps) {
      fetch(c + (kPortableDepth - 1) * kPortableWarps);
      cp_async_wait<kPortableDepth - 1>();
      __syncwarp();  // scales and zeros came through other lanes
      const auto load_x = [&](int n, int u, uint32_t (&b)[4]) {
        const uint16_t* x = a.x + static_cast<size_t>(min(n * 8 + g, a.M - 1)) * a.ldx;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int k = c * kChunkK + u * 32 + i * 8 + 2 * t;
          b[i] = k < a.K ? *reinterpret_cast<const uint32_t*>(x + k) : 0u;
        }
      };
      chunk_mma<1, NT, G, ZP, BF, Sums::kCompute>(acc, smem_addr(ring) + (c / kPortableWarps % kPortableDepth) * C::kBytes, 0, 0, lane,
                                                  load_x);
      __syncwarp();
    }
    __syncthreads();  // the sums of the strip before have been read
#pragma unroll
    for (int n = 0; n < NT; n++)
      red[(warp * NT + n) * 32 + t * 8 + g] = make_float4(acc[0][n][0], acc[0][n][1], acc[0][n][2], acc[0][n][3]);
    __syncthreads();
    if (threadIdx.x < NT * 32) {
      float v[4] = {0.f, 0.f, 0.f, 0.f};
      for (int w = 0; w < kPortableWarps; w++) {
        const float4 f = red[w * NT * 32 + threadIdx.x];
        v[0] += f.x, v[1] += f.y, v[2] += f.z, v[3] += f.w;
      }
      Outputs<BF> out;
      out.load(a, strip, lane & 7, warp * 8 + (lane >> 3) * 2);
      out.store(a, v);
    }
  }
}

}  // namespace gptq
