// What a consumer warpgroup does with the sums of a segment: it leaves them for the tile's owner, or owns the tile, adds the others' and
// writes y.
#pragma once
#include "common/vector.cuh"
#include "gemm/wgmma_ptx.cuh"
#include "gemm/wgmma_shape.cuh"
#include "gemm/wgmma_walk.cuh"

namespace gptq {
namespace {

// Where a consumer thread stands: its cluster, block, warpgroup, and place in that.
struct Place {
  int cluster, rank, group, thread;
};

// Where in the workspace a thread leaves the sums of 64 rows: those of the cluster in place `i`.
template <class S>
__device__ __forceinline__ float4* partial_of(const WgmmaParams& p, const Place& at, int i, int f) {
  const int64_t box = static_cast<int64_t>((i * S::CL + at.rank) * S::NWG + at.group) * S::FR + f;
  return reinterpret_cast<float4*>(p.partials) + box * (S::TN / 8) * 128 + at.thread;
}

__device__ __forceinline__ void await_sums(int* flag) {
  while (!flag_is_set(flag)) __nanosleep(20);
  *flag = 0;  // ready for the next launch on this stream
}

// The sums that the cluster before this one has left, of the beginning of the tile whose rest is here.
template <class S>
__device__ __forceinline__ void take_up(const WgmmaParams& p, const Place& at, float (&d)[S::FR][S::TN / 2]) {
  const int before = place_of<S>(p, at.cluster) - 1;
  if (at.thread == 0) await_sums(p.flags + (before * S::CL + at.rank) * S::NWG + at.group);
  named_sync(1 + at.group, 128);
#pragma unroll
  for (int f = 0; f < S::FR; f++)
#pragma unroll
    for (int i = 0; i < S::TN / 8; i++) {
      const float4 v = __ldcg(partial_of<S>(p, at, before, f) + i * 128);
      d[f][4 * i] = v.x, d[f][4 * i + 1] = v.y, d[f][4 * i + 2] = v.z, d[f][4 * i + 3] = v.w;
    }
}

// Partial sums of a tile that was cut along k. True: `d` is complete, and this warpgroup is to write it.
template <class S>
__device__ __forceinline__ bool complete(const WgmmaParams& p, const Segment& s, const Place& at, float (&d)[S::FR][S::TN / 2]) {
  constexpr int TN = S::TN, FR = S::FR, CL = S::CL, NWG = S::NWG;
  const int rank = at.rank, group = at.group, thread = at.thread;
  const int mine = place_of<S>(p, at.cluster);
  auto partial = [&](int i, int f) { return partial_of<S>(p, at, i, f); };
  if (S::SCALED && p.resumed ? s.last < p.chunks : s.first > 0) {
#pragma unroll
    for (int f = 0; f < FR; f++) {
      float4* to = partial(mine, f);
#pragma unroll
      for (int i = 0; i < TN / 8; i++) __stcg(to + i * 128, make_float4(d[f][4 * i], d[f][4 * i + 1], d[f][4 * i + 2], d[f][4 * i + 3]));
    }
    named_sync(1 + group, 128);
    if (thread == 0) flag_set(p.flags + (mine * CL + rank) * NWG + group);
    return false;
  }
  if (s.last < p.chunks) {  // the sums of a tile that was resumed are complete
    int others = 1;
    for (const int tile_end = (s.tile + 1) * p.chunks; split_begin(p, mine + 1 + others) < tile_end;) others++;
    for (int i = thread; i < others; i += 128) {
      await_sums(p.flags + ((mine + 1 + i) * CL + rank) * NWG + group);
    }
    named_sync(1 + group, 128);
    // As many loads in flight as there are registers for; the sums are in order of k all the same.
    constexpr int kBatch = S::kConsumerRegisters >= 128 ? 16 : TN < 64 ? 8 : 4, kQuads = TN / 8;
    constexpr int kAtOnce = kBatch > kQuads ? kBatch / kQuads : 1, kPart = kBatch < kQuads ? kBatch : kQuads;
    for (int i = 1; i <= others; i += kAtOnce) {
#pragma unroll
      for (int f = 0; f < FR; f++) {
#pragma unroll
        for (int part = 0; part < kQuads; part += kPart) {
          float4 v[kAtOnce][kPart];
#pragma unroll
          for (int j = 0; j < kAtOnce; j++)
#pragma unroll
            for (int k = 0; k < kPart; k++)
              v[j][k] = i + j <= others ? __ldcg(partial(mine + i + j, f) + (part + k) * 128) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
          for (int j = 0; j < kAtOnce; j++)
#pragma unroll
            for (int k = 0; k < kPart; k++) {
              float* to = d[f] + 4 * (part + k);
              to[0] += v[j][k].x, to[1] += v[j][k].y, to[2] += v[j][k].z, to[3] += v[j][k].w;
            }
        }
      }
    }
  }
  return true;
}

// Turns the tile token by token through shared memory, so that rows leave in whole lines.
template <class S>
__device__ __forceinline__ void store_tile(const WgmmaParams& p, const Segment& s, const Place& place, uint32_t turn,
                                           const float (&d)[S::FR][S::TN / 2]) {
  constexpr int TN = S::TN, FR = S::FR, CL = S::CL, NWG = S::NWG;
  const int rank = place.rank, group = place.group, thread = place.thread, lane = thread & 31, quarter = thread >> 5, g = lane >> 2;
  int m_tile, n_tile;
  tile_position(p, s.tile, m_tile, n_tile);
  const uint32_t box = turn + group * S::kPassBytes;
#pragma unroll
  for (int f = 0; f < FR; f++) {
    const int strip0 = (((n_tile * CL + rank) * NWG + group) * FR + f) * 4;
    // Where the 8 rows of one half of a strip stand in the output.
    auto column_of = [&](int strip, int half) { return p.paired != 0 ? half * (p.n / 2) + 8 * strip : 16 * strip + 8 * half; };
    float bias0 = 0.f, bias8 = 0.f;
    if (p.bias != nullptr && strip0 + quarter < p.strips) {
      bias0 = from_16bit<S::BF>(p.bias[column_of(strip0 + quarter, 0) + g]);
      if (p.paired < kPlanes) bias8 = from_16bit<S::BF>(p.bias[column_of(strip0 + quarter, 1) + g]);
    }
    // This thread's share of a pass: 16 bytes (8 columns) of every token_step-th token.
    const bool joined = p.paired >= kGated;
    const int unit = joined ? thread & 3 : thread & 7, first_token = joined ? thread >> 2 : thread >> 3;
    const int token_step = joined ? 32 : 16, strip = strip0 + (joined ? unit : unit >> 1);
    const int column = column_of(strip, joined ? 0 : unit & 1);
    const int tokens_here = strip < p.strips ? p.m - m_tile * TN : 0;
    uint16_t* const y = p.y + static_cast<int64_t>(m_tile * TN) * p.ldy + column;
    const uint16_t* const residual = p.residual == nullptr ? nullptr : p.residual + static_cast<int64_t>(m_tile * TN) * p.ldr + column;
#pragma unroll
    for (int pass = 0; pass < TN / S::kPass; pass++) {
      if (m_tile * TN + pass * S::kPass >= p.m) break;
      auto each_unit = [&](auto&& visit) {
#pragma unroll
        for (int i = 0; i < S::kPass * 8 / 128; i++) {
          const int token = first_token + i * token_step;
          if (token < S::kPass && pass * S::kPass + token < tokens_here)
            visit(box + token * 128 + ((unit ^ (token & 7)) << 4), static_cast<int64_t>(pass * S::kPass + token));
        }
      };
      named_sync(1 + group, 128);
      if (residual != nullptr) {
        each_unit([&](uint32_t at, int64_t token) { sts128(at, *reinterpret_cast<const uint4*>(residual + token * p.ldr)); });
        named_sync(1 + group, 128);
      }
#pragma unroll
      for (int half = 0; half < S::kPass / 16; half++) {
        const float* v = d[f] + (pass * S::kPass / 8 + half * 2) * 4;
        if (joined) {
          const int token = half * 16 + (lane & 15);
          const uint32_t at = box + token * 128 + ((quarter ^ (token & 7)) << 4);
          uint32_t r[2] = {0x80008000u, 0x80008000u};  // -0, which changes no number
          if (residual != nullptr) ldmatrix_x2_trans(r, at);
#pragma unroll
          for (int j = 0; j < 2; j++) {
            const float first = join_rows(p.paired, v[4 * j] + bias0, v[4 * j + 2] + bias8, from_16bit<S::BF>(r[j] & 0xffff));
            r[j] = pack2<S::BF>(first, join_rows(p.paired, v[4 * j + 1] + bias0, v[4 * j + 3] + bias8, from_16bit<S::BF>(r[j] >> 16)));
          }
          stmatrix_x2_trans(at, r[0], r[1]);
        } else {
          const int token = half * 16 + (lane >> 4) * 8 + (lane & 7), at_unit = quarter * 2 + ((lane >> 3) & 1);
          const uint32_t at = box + token * 128 + ((at_unit ^ (token & 7)) << 4);
          uint32_t r[4];
          if (residual != nullptr) {
            ldmatrix_x4_trans(r, at);
#pragma unroll
            for (int j = 0; j < 4; j++) {
              const float bias = j % 2 == 0 ? bias0 : bias8;
              r[j] = pack2<S::BF>(v[2 * j] + bias + from_16bit<S::BF>(r[j] & 0xffff), v[2 * j + 1] + bias + from_16bit<S::BF>(r[j] >> 16));
            }
          } else {
#pragma unroll
            for (int j = 0; j < 4; j++) {
              const float bias = j % 2 == 0 ? bias0 : bias8;
              r[j] = pack2<S::BF>(v[2 * j] + bias, v[2 * j + 1] + bias);
            }
          }
          stmatrix_x4_trans(at, r[0], r[1], r[2], r[3]);
        }
      }
      named_sync(1 + group, 128);
      each_unit([&](uint32_t at, int64_t token) { *reinterpret_cast<uint4*>(y + token * p.ldy) = lds128(at); });
    }
  }
}

}  // namespace
}  // namespace gptq
