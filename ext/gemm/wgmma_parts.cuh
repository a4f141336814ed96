// What a block of the wgmma kernel works on, and how a warp turns packed weights into operands.
#pragma once
#include "gemm/wgmma_table.cuh"
#include "common/layout.cuh"

namespace gptq {
namespace {

constexpr int kRaster = 8;  // token tiles that run side by side, so that they share weights in L2

struct Segment {
  int tile, first, last;  // chunks [first, last) of the tile
};

__device__ __forceinline__ int split_begin(const WgmmaParams& p, int i) {
  return static_cast<int>(static_cast<int64_t>(p.split_tiles) * p.chunks * i / p.clusters);
}

// The segments of one cluster, the same for its producer and its consumers.
struct Walk {
  int unit, end, tile;
  __device__ Walk(const WgmmaParams& p, int cluster) {
    const int i = p.clusters - 1 - cluster;  // reversed: owners wait for lower cluster indices
    unit = split_begin(p, i);
    end = split_begin(p, i + 1);
    tile = p.split_tiles + cluster;
  }
  __device__ __forceinline__ bool next(const WgmmaParams& p, Segment& s) {
    if (unit < end) {
      s.tile = unit / p.chunks;
      s.first = unit - s.tile * p.chunks;
      s.last = min(p.chunks, s.first + end - unit);
      unit += s.last - s.first;
      return true;
    }
    if (tile >= p.tiles) return false;
    s = {tile, 0, p.chunks};
    tile += p.clusters;
    return true;
  }
};

__device__ __forceinline__ void tile_position(const WgmmaParams& p, int tile, int& m_tile, int& n_tile) {
  const int per_band = kRaster * p.n_tiles, band = tile / per_band, in_band = tile - band * per_band;
  const int rows = min(kRaster, p.m_tiles - band * kRaster);
  n_tile = in_band / rows;
  m_tile = band * kRaster + in_band - n_tile * rows;
}

// Scales and zero points of rows g and g+8 for one group.
template <bool BF>
struct RowPair {
  ZeroPair zero;
  uint32_t scale[2], rest[2];  // bf16: the fp16 scale is scale + rest to 16 bits

  __device__ __forceinline__ RowPair(uint32_t s, uint32_t z) : zero(load_zeros<BF>(z)) {
    if constexpr (BF) {
      const float2 f = scale_pair(s);
      const float both[2] = {f.x, f.y};
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t hi = to_16bit<true>(both[i]), lo = to_16bit<true>(both[i] - from_16bit<true>(hi));
        scale[i] = hi * 0x10001u;
        rest[i] = lo * 0x10001u;
      }
    } else {
      scale[0] = __byte_perm(s, s, 0x1010);
      scale[1] = __byte_perm(s, s, 0x3232);
    }
  }
  __device__ __forceinline__ void weights(uint32_t q, uint32_t (&a)[4]) const {
    dequant<BF>(q, a, zero);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (BF) {
        uint32_t low;
        asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(low) : "r"(a[i]), "r"(rest[i & 1]));
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(a[i]) : "r"(a[i]), "r"(scale[i & 1]), "r"(low));
      } else {
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(a[i]) : "r"(a[i]), "r"(scale[i & 1]));
      }
    }
  }
};

// What one warp needs of a chunk of its strip, as it lies in memory.
template <int GROUPS>
struct Packed {
  uint32_t q[8], scale[GROUPS], zero[GROUPS];

  // GROUPS 1: one group per chunk. GROUPS 4: `groups` 2 or 4, entry i is the group of k 32i..32i+31.
  __device__ __forceinline__ void fetch(const uint8_t* chunk, int groups, bool zeros, int lane) {
#pragma unroll
    for (int b = 0; b < 2; b++) *reinterpret_cast<uint4*>(q + 4 * b) = *reinterpret_cast<const uint4*>(chunk + b * kBlockBytes + lane * 16);
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
      const int group = GROUPS == 1 ? 0 : (i * groups) >> 2;
      scale[i] = *reinterpret_cast<const uint32_t*>(chunk + kWeightBytes + 32 * group + (lane & 28));
      zero[i] = 0x0808;
      if (zeros) zero[i] = *reinterpret_cast<const uint16_t*>(chunk + kWeightBytes + 32 * (GROUPS == 1 ? 1 : groups) + 16 * group + (lane & 28) / 2);
    }
  }
};

template <bool BF>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t r;
  if constexpr (BF)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.f + __expf(-v)); }

}  // namespace
}  // namespace gptq
