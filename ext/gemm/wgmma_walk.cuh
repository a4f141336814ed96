// Which parts of which tiles a cluster of the wgmma kernel computes, and in what order.
#pragma once
#include "gemm/schedule.cuh"

namespace gptq {
namespace {

// The cluster's place among those that share the cut tiles. Whoever waits waits for lower cluster indices, which start first: an owner for
// the rest of its tile, or where sums are resumed, who has the rest for its beginning.
template <class S>
__device__ __forceinline__ int place_of(const GemmTiles& p, int cluster) {
  return S::SCALED && p.resumed ? cluster : p.clusters - 1 - cluster;
}

// The same for who fetches and who multiplies. Where sums are resumed, a cluster has more than a tile of the cut ones: it begins with the
// beginning of one, which another goes on with, and leaves the rest of one, whose beginning another has, for the end. So nobody waits long.
template <class S>
struct WgmmaWalk {
  Walk walk;
  int rest = -1;  // where in the line of cut tiles it begins; -1: there is none

  __device__ __forceinline__ WgmmaWalk(const GemmTiles& p, int cluster) : walk(p, cluster) {
    if (!S::SCALED || !p.resumed) return;
    walk.unit = split_begin(p, cluster), walk.end = split_begin(p, cluster + 1);
    if (const int within = walk.unit % p.chunks) {
      rest = walk.unit;
      walk.unit += p.chunks - within;
    }
  }
  __device__ __forceinline__ bool next(const GemmTiles& p, Segment& s) {
    if (!S::SCALED || !p.resumed) return walk.next(p, s);
    if (const int beginning = walk.end % p.chunks) {
      walk.end -= beginning;
      s = {walk.end / p.chunks, 0, beginning};
      return true;
    }
    if (walk.next(p, s)) return true;
    if (rest < 0) return false;
    s.tile = rest / p.chunks, s.first = rest - s.tile * p.chunks, s.last = p.chunks;
    rest = -1;
    return true;
  }
};

}  // namespace
}  // namespace gptq
