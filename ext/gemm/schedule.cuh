// Which tiles of a product a GEMM's blocks work on, and which of them are cut along k ("stream-k").
#pragma once
#include <algorithm>
#include <cstdint>

namespace gptq {

// A product in tiles. Those who share them are called clusters: of the wgmma kernel's, or single blocks of the mma kernel.
struct GemmTiles {
  int m, n, strips, chunks;
  int m_tiles, n_tiles;
  int tiles, split_tiles;  // the first split_tiles are cut along k over all clusters
  int clusters, share, spare;  // chunks of those that a cluster has; so many clusters have one more
  bool resumed;  // who has the rest of a cut tile goes on with the sums of who has its beginning
};

// In chunks. `clusters` work at a time. `cut_cost`: what cutting tiles along k takes as long as, since partial sums are written, awaited
// and read.
inline int64_t whole_time(int64_t tiles, int clusters, int chunks) { return (tiles + clusters - 1) / clusters * chunks; }
inline int64_t cut_time(int64_t tiles, int clusters, int chunks, int cut_cost) {
  return (tiles * chunks + clusters - 1) / clusters + (tiles % clusters != 0 ? cut_cost : 0);
}

// Over at most `clusters`: whole tiles where that is sooner. Otherwise tiles that fill whole waves of clusters stay whole; the rest, and
// one wave with it, is cut into equal parts along k. `wanted`: 0, or a GemmSplit. kOneOrder: whole, and by tiles that all add up a row in
// the same order, which format, device and the weight's size decide, not the number of tokens. A kernel that can go on with another's sums
// (`resumes`) cuts tiles in two all the same.
enum class GemmSplit : int { kAlongK = 1, kWhole, kOneOrder, kLast = kOneOrder };
inline void share_tiles(GemmTiles& p, int clusters, int cut_cost, int wanted, bool resumes = false) {
  p.tiles = p.m_tiles * p.n_tiles;
  p.clusters = std::min(clusters, p.tiles * p.chunks);
  const int over = p.tiles % p.clusters;
  bool whole = whole_time(p.tiles, p.clusters, p.chunks) < cut_time(p.tiles, p.clusters, p.chunks, cut_cost);
  p.resumed = resumes && wanted == static_cast<int>(GemmSplit::kOneOrder) && p.tiles > p.clusters && !whole;
  if (wanted != 0) whole = wanted != static_cast<int>(GemmSplit::kAlongK) && !p.resumed;
  p.split_tiles = whole ? 0 : p.tiles < p.clusters || over == 0 ? over : over + p.clusters;
  if (whole) p.clusters = std::min(p.clusters, p.tiles);
  const int64_t cut = int64_t{p.split_tiles} * p.chunks;
  p.share = static_cast<int>(cut / p.clusters), p.spare = static_cast<int>(cut % p.clusters);
}

#ifdef __CUDACC__
namespace {

constexpr int kRaster = 8;  // token tiles that run side by side, so that they share weights in L2

struct Segment {
  int tile, first, last;  // chunks [first, last) of the tile
};

__device__ __forceinline__ int split_begin(const GemmTiles& p, int i) {
  return i * p.share + min(i, p.spare);
}

// The segments of one cluster, the same for who fetches and who multiplies.
struct Walk {
  int unit, end, tile;
  __device__ Walk(const GemmTiles& p, int cluster) {
    const int i = p.clusters - 1 - cluster;  // reversed: owners wait for lower cluster indices
    unit = split_begin(p, i);
    end = split_begin(p, i + 1);
    tile = p.split_tiles + cluster;
  }
  __device__ __forceinline__ bool next(const GemmTiles& p, Segment& s) {
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

__device__ __forceinline__ void tile_position(const GemmTiles& p, int tile, int& m_tile, int& n_tile) {
  const int per_band = kRaster * p.n_tiles, band = tile / per_band, in_band = tile - band * per_band;
  const int rows = min(kRaster, p.m_tiles - band * kRaster);
  n_tile = in_band / rows;
  m_tile = band * kRaster + in_band - n_tile * rows;
}

}  // namespace
#endif

}  // namespace gptq
