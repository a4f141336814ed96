// The GEMV's order of sums, chain by chain (same_bits.cu), for a block whose warps hold the sums of a tile in registers.
#pragma once
#include "common/ptx.cuh"
#include "gemm/same_bits_table.cuh"

namespace gptq {
namespace {

// The chunks of a chain: first, first + kChains, ... below end.
struct Chain {
  int first, end;
  __device__ __forceinline__ Chain(const SameBitsParams& p, int chain) {
    const int segment = chain / kChains * p.segment;
    first = segment + chain % kChains;
    end = min(segment + p.segment, p.k_chunks);
  }
};

// Where the sums of a segment wait while a chain is added up.
template <int COUNT>
struct InRegisters {
  float v[COUNT];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < COUNT; i++) v[i] = 0.f;
  }
  __device__ __forceinline__ void get(float (&to)[COUNT]) const {
#pragma unroll
    for (int i = 0; i < COUNT; i++) to[i] = v[i];
  }
  __device__ __forceinline__ void put(const float (&from)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) v[i] = from[i];
  }
};

// In shared memory, a thread's own 16 bytes of each `stride`; the last KEPT in registers.
template <int COUNT, int KEPT>
struct InShared {
  uint32_t at;
  int stride;
  bool zero;
  float kept[KEPT + 1];
  __device__ __forceinline__ InShared(uint32_t at, int stride) : at(at), stride(stride) { clear(); }
  __device__ __forceinline__ void clear() {
    zero = true;
#pragma unroll
    for (int i = 0; i < KEPT; i++) kept[i] = 0.f;
  }
  __device__ __forceinline__ void get(float (&to)[COUNT]) const {
#pragma unroll
    for (int i = 0; i < COUNT - KEPT; i += 4) {
      const uint4 v = zero ? make_uint4(0, 0, 0, 0) : lds128(at + i / 4 * stride);
      to[i] = __uint_as_float(v.x), to[i + 1] = __uint_as_float(v.y), to[i + 2] = __uint_as_float(v.z), to[i + 3] = __uint_as_float(v.w);
    }
#pragma unroll
    for (int i = 0; i < KEPT; i++) to[COUNT - KEPT + i] = kept[i];
  }
  __device__ __forceinline__ void put(const float (&from)[COUNT]) {
    zero = false;
#pragma unroll
    for (int i = 0; i < COUNT - KEPT; i += 4) sts128(at + i / 4 * stride, {from[i], from[i + 1], from[i + 2], from[i + 3]});
#pragma unroll
    for (int i = 0; i < KEPT; i++) kept[i] = from[COUNT - KEPT + i];
  }
};

// Sums of a tile that a block leaves in the workspace, each lane for its like.
template <int COUNT>
__device__ __forceinline__ float4* piece_at(const SameBitsParams& p, int warps, int warp, int block, int piece) {
  const int64_t first = (static_cast<int64_t>(block) * kPieceSlots + piece) * warps + warp;
  return reinterpret_cast<float4*>(p.partials) + first * (COUNT * 8) + (threadIdx.x & 31);
}
template <int COUNT>
__device__ __forceinline__ void leave(float4* to, const float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) __stcg(to + i * 8, make_float4(d[i], d[i + 1], d[i + 2], d[i + 3]));
}
template <int COUNT>
__device__ __forceinline__ void read_left(float (&d)[COUNT], const float4* from) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    const float4 v = __ldcg(from + i * 8);
    d[i] = v.x, d[i + 1] = v.y, d[i + 2] = v.z, d[i + 3] = v.w;
  }
}
// d += what was left there.
template <int COUNT>
__device__ __forceinline__ void add_left(float (&d)[COUNT], const float4* from) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    const float4 v = __ldcg(from + i * 8);
    d[i] += v.x, d[i + 1] += v.y, d[i + 2] += v.z, d[i + 3] += v.w;
  }
}
template <int COUNT>
__device__ __forceinline__ void add(float (&to)[COUNT], const float (&more)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) to[i] += more[i];
}
template <int COUNT>
__device__ __forceinline__ void set_zero(float (&v)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) v[i] = 0.f;
}

// The tiles of this block. multiply(segment, chain, sums): adds the chain's chunks, one after the other. store(tile, sums): the tile's.
// A block that has a tile's first chain keeps what it has of a segment, adds up complete ones before it in the workspace, and at last what
// others have left; those leave each chain of a segment that was begun by another by itself, and the sum of what else they have of one.
// AHEAD: while one of those is added, the next is on its way to registers.
template <int COUNT, bool AHEAD = false, class Total, class Multiply, class Store>
__device__ __forceinline__ void add_up(const SameBitsParams& p, int warps, int warp, Total& total, const Multiply& multiply,
                                       const Store& store) {
  const int lane = threadIdx.x & 31, mine = p.clusters - 1 - blockIdx.x;
  const auto piece_of = [&](int block, int piece) { return piece_at<COUNT>(p, warps, warp, block, piece); };
  const auto completes = [&](int chain) { return chain % kChains == kChains - 1 || chain + 1 == p.chunks; };
  Walk walk(p, blockIdx.x);
  Segment s;
#pragma unroll 1
  while (walk.next(p, s)) {
    float acc[COUNT], sum[COUNT];
    const int whole_from = (s.first + kChains - 1) / kChains * kChains;
    int piece = 0;
    total.clear();
#pragma unroll 1
    for (int chain = s.first; chain < s.last; chain++) {
      set_zero(acc);
      multiply(s, chain, acc);
      total.get(sum);
      add(sum, acc);
      const bool ends = chain + 1 == s.last;
      bool keeps;
      if (s.first == 0) {
        keeps = ends || !completes(chain);
        if (!keeps) {
          float4* const before = piece_of(mine, kPieces);
          if (chain >= kChains) {
            set_zero(acc);
            add_left(acc, before);
            add(acc, sum);
            leave(before, acc);
          } else {
            leave(before, sum);
          }
        }
      } else {
        keeps = !ends && chain >= whole_from && !completes(chain);
        if (!keeps) leave(piece_of(mine, piece++), sum);
      }
      if (keeps) total.put(sum);
      else total.clear();
    }
    if (s.first > 0) {
      __syncwarp();
      if (lane == 0) {
        __threadfence();
        flag_set(p.flags + mine * kSameBitsWarps + warp);
      }
      continue;
    }
    // `acc`: complete segments. `sum`: what there is of the next one.
    total.get(sum);
    set_zero(acc);
    if (s.last > kChains) add_left(acc, piece_of(mine, kPieces));
    const auto close = [&](int chain) {
      if (completes(chain)) add(acc, sum), set_zero(sum);
    };
    close(s.last - 1);
    if (s.last < p.chunks) {
      const int tile_end = (s.tile + 1) * p.chunks;
      const auto wait_for = [&](int i) {
        int* flag = p.flags + i * kSameBitsWarps + warp;
        if (lane == 0) {
          while (!flag_is_set(flag)) __nanosleep(20);
          *flag = 0;  // ready for the next launch on this stream
        }
        __syncwarp();
      };
      if constexpr (AHEAD) {
        int i = mine, last = s.last, chain = s.last - 1;
        const auto next = [&]() -> const float4* {  // the sums of what ends with `chain`, or null
          if (++chain == last) {
            if (split_begin(p, ++i) >= tile_end) return nullptr;
            last = min(split_begin(p, i + 1) - s.tile * p.chunks, p.chunks);
            piece = 0;
            wait_for(i);
          }
          const int first = split_begin(p, i) - s.tile * p.chunks;
          if (chain >= (first + kChains - 1) / kChains * kChains) chain = min(chain / kChains * kChains + kChains, last) - 1;
          return piece_of(i, piece++);
        };
        float now[COUNT], ahead[COUNT];
        const float4* from = next();
        read_left(now, from);
#pragma unroll 1
        while (from != nullptr) {
          const int its_chain = chain;
          from = next();
          if (from != nullptr) read_left(ahead, from);
          add(sum, now);
          close(its_chain);
#pragma unroll
          for (int j = 0; j < COUNT; j++) now[j] = ahead[j];
        }
      } else {
#pragma unroll 1
        for (int i = mine + 1; split_begin(p, i) < tile_end; i++) {
          wait_for(i);
          const int first = split_begin(p, i) - s.tile * p.chunks, last = min(split_begin(p, i + 1) - s.tile * p.chunks, p.chunks);
          const int its_whole_from = (first + kChains - 1) / kChains * kChains;
          piece = 0;
#pragma unroll 1
          for (int chain = first; chain < last; chain++) {
            if (chain >= its_whole_from) chain = min(chain / kChains * kChains + kChains, last) - 1;
            add_left(sum, piece_of(i, piece++));
            close(chain);
          }
        }
      }
    }
    store(s.tile, acc);
  }
}

}  // namespace
}  // namespace gptq
