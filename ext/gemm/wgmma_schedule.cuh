// What a cluster of the GEMM works on: whole tiles, and its share of the tiles that are cut along k.
#pragma once
#include "gemm/wgmma_table.cuh"

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

}  // namespace
}  // namespace gptq
