// The kernel of mma.cu, compiled in mma_fp16.cu and mma_bf16.cu so that two cores work side by side.
#pragma once
#include "common/layout.cuh"
#include "common/ptx.cuh"
#include "common/vector.cuh"
#include "gemm/mma_table.cuh"
#include "gemm/operands.cuh"

namespace gptq {
namespace {

// A kernel: 16 STRIPS output rows x TN tokens. Its eight warps have two strips each. With 8 strips they are two teams, which take the
// chunks of a tile in turn, each with a ring of its own, so that one multiplies while the other expands weights, and join their sums.
// SCALED: the operand is weight times scale, rounded to 16 bits: one rounding (2^-11 relative) before that of the result. Otherwise it is
// weight minus zero point, an exact integer, and sums are scaled in fp32 group by group, with a second set of accumulators.
template <bool BF_, MmaFormat FORMAT_, int STRIPS_, int TN_, bool SCALED_>
struct MmaShape {
  static constexpr bool BF = BF_, SCALED = SCALED_, ONE = FORMAT_ != MmaFormat::kAny;  // ONE: one scale group per chunk, or fewer
  static constexpr int STRIPS = STRIPS_, TN = TN_, kTiles = TN / 8;                     // column tiles of eight
  static constexpr int kTeams = 16 / STRIPS, kTeamWarps = kMmaWarps / kTeams, kTeam = 32 * kTeamWarps;
  static constexpr int kOwned = 2 / kTeams;             // strips whose sums a warp has in the end
  static constexpr int kTokenBytes = TN * kChunkK * 2;  // of a slot
  static constexpr int kRows = kTeam / 16;              // tokens that a team brings in at a time
  static constexpr int kBlocksPerSM = TN == 16 ? 2 : 1;
  static __device__ __forceinline__ int chunk_size(const MmaParams& p) {
    return ONE ? chunk_bytes(1, FORMAT_ == MmaFormat::kOneGroupZeros) : p.chunk_bytes;
  }
  static __device__ __forceinline__ bool zeros(const MmaParams& p) { return ONE ? FORMAT_ == MmaFormat::kOneGroupZeros : p.zeros; }
};

// A value that the compiler keeps instead of computing it again where it is used.
template <typename T>
__device__ __forceinline__ T kept(T v) {
  if constexpr (sizeof(T) == 8) asm("" : "+l"(v));
  else asm("" : "+r"(v));
  return v;
}

// What a team asks for next: a chunk of a tile. A warp brings in the weights of its strips, and with the others the tokens.
template <class S>
struct MmaFeed {
  Walk walk;
  const uint8_t* weights;  // of this lane, of the first strip
  const uint8_t* meta;     // of this lane, of what comes after the weights of either
  const uint8_t* tokens;   // of this thread's first row
  int strip_bytes, row_bytes;
  int left, k_left;             // chunks of the segment for this team, and of k from this thread's place
  int rows, strips;             // that exist, from there on
  int meta_strip, meta_from;
  uint32_t weights_to, meta_to, tokens_to;  // in a slot
  int team;

  __device__ __forceinline__ MmaFeed(const MmaParams& p, int team) : walk(p, blockIdx.x), team(team) {
    const int lane = threadIdx.x & 31, thread = threadIdx.x % S::kTeam, row = thread >> 4, piece = thread & 15;
    const int size = S::chunk_size(p), pieces = (size - kWeightBytes) / 16;
    strip_bytes = kept(p.chunks * size);
    row_bytes = kept(2 * S::kRows * p.ldx);
    meta_strip = kept(lane / pieces);
    meta_from = kWeightBytes + lane % pieces * 16;
    weights_to = kept(S::kTokenBytes + (thread >> 5) * 2 * size + lane * 16);
    meta_to = kept(S::kTokenBytes + ((thread >> 5) * 2 + meta_strip) * size + meta_from);
    // A token's 16-byte pieces are permuted by its number modulo 8, so that ldmatrix meets no bank twice.
    tokens_to = kept(row * (kChunkK * 2) + ((piece ^ (row & 7)) << 4));
    open(p);
  }
  __device__ __forceinline__ void open(const MmaParams& p) {
    Segment at;
    do {
      left = 0;
      if (!walk.next(p, at)) return;
      left = (at.last - at.first - team + S::kTeams - 1) / S::kTeams;
    } while (left <= 0);
    at.first += team;
    int m_tile, n_tile;
    tile_position(p, at.tile, m_tile, n_tile);
    const int thread = threadIdx.x % S::kTeam, strip = n_tile * S::STRIPS + 2 * (thread >> 5), row = m_tile * S::TN + (thread >> 4);
    strips = min(p.strips - strip, 2), rows = p.m - row;
    k_left = p.k - at.first * kChunkK - (thread & 15) * 8;
    const uint8_t* const chunk = p.weight + static_cast<int64_t>(strip) * strip_bytes + static_cast<int64_t>(at.first) * S::chunk_size(p);
    weights = kept(chunk + (thread & 31) * 16);
    meta = kept(chunk + static_cast<int64_t>(meta_strip) * strip_bytes + meta_from);
    tokens = kept(reinterpret_cast<const uint8_t*>(p.x + static_cast<int64_t>(row) * p.ldx + at.first * kChunkK + (thread & 15) * 8));
  }
  // Asks for it, into the slot at `to`, and turns to what comes after.
  __device__ __forceinline__ void fetch(const MmaParams& p, uint32_t to) {
    if (left == 0) return;
    const int size = S::chunk_size(p);
    const uint32_t first = to + weights_to, token = to + tokens_to;
    if (strips > 0) cp_async16(first, weights), cp_async16(first + kBlockBytes, weights + kBlockBytes);
    if (strips > 1) {
      const uint8_t* const second = weights + strip_bytes;
      cp_async16(first + size, second), cp_async16(first + size + kBlockBytes, second + kBlockBytes);
    }
    if (meta_strip < strips) cp_async16(to + meta_to, meta);
    const int rows_here = k_left > 0 ? rows : 0;  // others become zeros, and are not read
    const uint8_t* from = tokens;
#pragma unroll
    for (int i = 0; i < S::TN / S::kRows; i++) {
      cp_async16_or_zeros(token + i * S::kRows * kChunkK * 2, from, i * S::kRows < rows_here ? 16 : 0);
      from = kept(from + row_bytes);
    }
    weights = kept(weights + S::kTeams * size), meta = kept(meta + S::kTeams * size);
    tokens = kept(tokens + S::kTeams * 2 * kChunkK), k_left -= S::kTeams * kChunkK;
    if (--left == 0) open(p);
  }
};

// Where a lane finds what it multiplies, in a slot.
struct MmaPlaces {
  uint32_t tokens, weights, scales, zeros;
};

// A chunk of a warp's strips: total += scale * (weight - zero point) x. `ask` for the next one, once the tensor cores work.
template <class S, typename Ask>
__device__ __forceinline__ void multiply_chunk(float (&total)[2][S::kTiles][4], const MmaParams& p, const MmaPlaces& places, uint32_t slot,
                                               const Ask& ask) {
  const uint32_t tokens = slot + places.tokens, weights = slot + places.weights, scales = slot + places.scales,
                 zeros = slot + places.zeros;
  const uint32_t at_k16[4] = {tokens, tokens ^ 32, tokens ^ 64, tokens ^ 96};  // pieces are permuted within 128 bytes
  const int size = S::chunk_size(p);
  constexpr int kGroupK16 = S::ONE ? 8 : 2;  // k16 steps of a scale group
  constexpr int kPairs = S::kTiles / 2, kLoads = 8 * kPairs;  // pairs of column tiles, of a step and of the chunk
  constexpr int kHeld = S::SCALED ? 2 : kPairs;               // whose tokens are brought in ahead
  float part[2][S::kTiles][4];
  float2 scale[2];
  uint4 q[2];
  uint32_t x[2 * kHeld][4], w[2][2][4];
  const auto scale_word = [&](int s, int k16) { return lds32(scales + s * size + 32 * (S::ONE ? 0 : (k16 / 2 * p.groups) >> 2)); };
  const auto zero_word = [&](int s, int k16) {
    return S::zeros(p) ? lds16(zeros + s * size + 16 * (S::ONE ? 0 : (k16 / 2 * p.groups) >> 2)) : 0x0808u;
  };
  ZeroPair zero[2];
  RowPair<S::BF> rows[2];
  // Tokens for a pair of column tiles: the load-th of the chunk.
  const auto bring = [&](int load) {
    const int k16 = load / kPairs, n = load % kPairs;
    ldmatrix_x4(x[load % (2 * kHeld)], at_k16[k16 % 4] + k16 / 4 * 128 + n * 16 * kChunkK * 2);
  };
  const auto expand = [&](int k16) {
    const int j = k16 % 4;
#pragma unroll
    for (int s = 0; s < 2; s++) {
      if (k16 % kGroupK16 == 0) {
        if constexpr (S::SCALED) rows[s] = RowPair<S::BF>(scale_word(s, k16), zero_word(s, k16));
        else zero[s] = S::zeros(p) ? load_zeros<S::BF>(zero_word(s, k16)) : symmetric_zeros<S::BF>();
      }
      if (j == 0) q[s] = lds128(weights + s * size + k16 / 4 * kBlockBytes);
      const uint32_t word = j == 0 ? q[s].x : j == 1 ? q[s].y : j == 2 ? q[s].z : q[s].w;
      if constexpr (S::SCALED) rows[s].weights(word, w[k16 & 1][s]);
      else dequant<S::BF>(word, w[k16 & 1][s], zero[s]);
    }
  };
  expand(0);
#pragma unroll
  for (int load = 0; load < kHeld; load++) bring(load);
#pragma unroll
  for (int k16 = 0; k16 < 8; k16++) {
    if (!S::SCALED && k16 % kGroupK16 == 0) {
#pragma unroll
      for (int s = 0; s < 2; s++) {
        scale[s] = scale_pair(scale_word(s, k16));
#pragma unroll
        for (int n = 0; n < S::kTiles; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) part[s][n][i] = 0.f;
      }
    }
    auto& sums = S::SCALED ? total : part;
    if (!S::SCALED && k16 < 7) {
#pragma unroll
      for (int pair = 0; pair < kPairs; pair++) bring((k16 + 1) * kPairs + pair);
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; pair++) {
      const int load = k16 * kPairs + pair;
      if (S::SCALED && load + kHeld < kLoads) bring(load + kHeld);
#pragma unroll
      for (int n = 2 * pair; n < 2 * pair + 2; n++)
#pragma unroll
        for (int s = 0; s < 2; s++) {
          const uint32_t(&b)[4] = x[load % (2 * kHeld)];
          mma_m16n8k16<S::BF>(sums[s][n], w[k16 & 1][s], b[n % 2 * 2], b[n % 2 * 2 + 1]);
        }
    }
    if (k16 == 0) ask();
    if (k16 < 7) expand(k16 + 1);
    if (!S::SCALED && k16 % kGroupK16 == kGroupK16 - 1) {
#pragma unroll
      for (int s = 0; s < 2; s++)
#pragma unroll
        for (int n = 0; n < S::kTiles; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) total[s][n][i] = fmaf(i < 2 ? scale[s].x : scale[s].y, part[s][n][i], total[s][n][i]);
    }
  }
}

// Two warps, one of each team, have the same strips: each gives the other its sums of one, and has all of the other.
template <class S>
__device__ __forceinline__ void join_teams(float (&d)[1][S::kTiles][4], float (&total)[2][S::kTiles][4], uint32_t exchange, int team,
                                           int member, int lane) {
  const uint32_t at = exchange + member * S::kTiles * 512 + lane * 16;
#pragma unroll
  for (int s = 0; s < 2; s++) {
    if (team != s) {
#pragma unroll
      for (int n = 0; n < S::kTiles; n++) sts128(at + n * 512, total[s][n]);
    }
    __syncthreads();
    if (team == s) {
#pragma unroll
      for (int n = 0; n < S::kTiles; n++) {
        const uint4 other = lds128(at + n * 512);
        const float o[4] = {__uint_as_float(other.x), __uint_as_float(other.y), __uint_as_float(other.z), __uint_as_float(other.w)};
#pragma unroll
        for (int i = 0; i < 4; i++) d[0][n][i] = s == 0 ? total[s][n][i] + o[i] : o[i] + total[s][n][i];
      }
    }
    __syncthreads();
  }
}

// Sums of a tile that was cut along k, warp by warp. True: `d` is complete, and this warp is to write it.
template <class S>
__device__ __forceinline__ bool complete(const MmaParams& p, const Segment& s, float (&d)[S::kOwned][S::kTiles][4], int warp, int lane) {
  const int mine = p.clusters - 1 - blockIdx.x;
  const auto partial = [&](int i, int f) {
    return reinterpret_cast<float4*>(p.partials) + ((static_cast<int64_t>(i) * kMmaWarps + warp) * S::kOwned + f) * (S::kTiles * 32) + lane;
  };
  if (s.first > 0) {
#pragma unroll
    for (int f = 0; f < S::kOwned; f++)
#pragma unroll
      for (int n = 0; n < S::kTiles; n++)
        __stcg(partial(mine, f) + n * 32, make_float4(d[f][n][0], d[f][n][1], d[f][n][2], d[f][n][3]));
    __syncwarp();
    if (lane == 0) {
      __threadfence();
      flag_set(p.flags + mine * kMmaWarps + warp);
    }
    return false;
  }
  if (s.last == p.chunks) return true;
  for (int i = mine + 1; split_begin(p, i) < (s.tile + 1) * p.chunks; i++) {
    int* flag = p.flags + i * kMmaWarps + warp;
    if (lane == 0) {
      while (!flag_is_set(flag)) __nanosleep(20);
      *flag = 0;  // ready for the next launch on this stream
    }
    __syncwarp();
#pragma unroll
    for (int f = 0; f < S::kOwned; f++)
#pragma unroll
      for (int n = 0; n < S::kTiles; n++) {
        const float4 v = __ldcg(partial(i, f) + n * 32);
        d[f][n][0] += v.x, d[f][n][1] += v.y, d[f][n][2] += v.z, d[f][n][3] += v.w;
      }
  }
  return true;
}

// Writes a strip: 8x8 corners are turned in registers, so that a lane has two neighbouring outputs of a token.
template <class S>
__device__ __forceinline__ void store_strip(const MmaParams& p, const float (&d)[S::kTiles][4], int strip, int first_token, int lane) {
  if (strip >= p.strips) return;
  const int g = lane >> 2, t = lane & 3;
  const int column[2] = {p.paired ? 8 * strip : 16 * strip, p.paired ? p.n / 2 + 8 * strip : 16 * strip + 8};  // of rows 0 and 8
  float bias[2] = {};
  if (p.bias != nullptr) bias[0] = from_16bit<S::BF>(p.bias[column[0] + g]);
  if (p.bias != nullptr && p.paired < kPlanes) bias[1] = from_16bit<S::BF>(p.bias[column[1] + g]);
#pragma unroll
  for (int n = 0; n < S::kTiles; n++) {
    const int token = first_token + n * 8 + g;  // of this lane, once turned
    const bool exists = token < p.m;
    const auto place = [&](const void* from, int64_t stride, int corner) {
      return reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(from) + token * stride + column[corner] + 2 * t);
    };
    const auto residual = [&](int corner) {  // of two tokens; where there is none, what changes no number
      if (p.residual == nullptr) return make_float2(-0.f, -0.f);
      const uint32_t r = transpose_8x8(exists ? *place(p.residual, p.ldr, corner) : 0u);
      return make_float2(from_16bit<S::BF>(static_cast<uint16_t>(r)), from_16bit<S::BF>(static_cast<uint16_t>(r >> 16)));
    };
    const auto store = [&](int corner, float first, float second) {
      const uint32_t turned = transpose_8x8(pack2<S::BF>(first, second));
      if (exists) *const_cast<uint32_t*>(place(p.y, p.ldy, corner)) = turned;
    };
    const float(&v)[4] = d[n];
    const float2 r = residual(0);
    const float gate[2] = {v[0] + bias[0], v[1] + bias[0]}, up[2] = {v[2] + bias[1], v[3] + bias[1]};
    if (p.paired >= kGated) {
      store(0, join_rows(p.paired, gate[0], up[0], r.x), join_rows(p.paired, gate[1], up[1], r.y));
    } else {
      store(0, gate[0] + r.x, gate[1] + r.y);
      const float2 r8 = residual(1);
      store(1, up[0] + r8.x, up[1] + r8.y);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kMmaThreads, S::kBlocksPerSM) mma_kernel(const __grid_constant__ MmaParams p) {
  extern __shared__ __align__(128) uint8_t smem[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int team = warp / S::kTeamWarps, member = warp % S::kTeamWarps;
  const uint32_t base = smem_addr(smem), ring = base + team * p.stages * p.slot, end = ring + p.stages * p.slot;
  MmaFeed<S> feed(p, team);
  uint32_t to = ring, slot = ring;
  // As many groups to a slot as make the wait below the same for every depth.
  const auto ask = [&] {
    feed.fetch(p, to);
    cp_async_commit();
    if (p.stages < 4) cp_async_commit();
    if (p.stages < 3) cp_async_commit();
    to += p.slot;
    if (to == end) to = ring;
  };
  for (int i = 0; i < p.stages - 1; i++) ask();
  MmaPlaces places;
  {
    // Of 16 tokens and of 16 k, as ldmatrix wants them.
    const int size = S::chunk_size(p), row = (lane & 7) + ((lane >> 4) << 3), half = (lane >> 3) & 1;
    const int chunk = S::kTokenBytes + 2 * member * size;
    places.tokens = kept(row * (kChunkK * 2) + ((half ^ (row & 7)) << 4));
    places.weights = kept(chunk + lane * 16);
    places.scales = kept(chunk + kWeightBytes + (lane & 28));
    places.zeros = kept(chunk + kWeightBytes + 32 * (S::ONE ? 1 : p.groups) + (lane & 28) / 2);
  }
  const int barrier = kept(1 + team);
  Walk walk(p, blockIdx.x);
  Segment s;
#pragma unroll 1
  while (walk.next(p, s)) {
    float total[2][S::kTiles][4] = {};
#pragma unroll 1
    for (int c = s.first + team; c < s.last; c += S::kTeams) {
      cp_async_wait<kMmaDepth - 2>();
      named_sync(barrier, S::kTeam);  // the slot has come through all threads, and none still reads the one before
      multiply_chunk<S>(total, p, places, slot, ask);
      slot += p.slot;
      if (slot == end) slot = ring;
    }
    // Of an odd number of chunks the first team has one more. The other one meets as often all the same: racecheck tells by the number of
    // barriers that threads have passed what came before what.
    if (S::kTeams == 2 && (s.last - s.first) % 2 == 1 && team == 1) named_sync(barrier, S::kTeam);
    int m_tile, n_tile;
    tile_position(p, s.tile, m_tile, n_tile);
    const int strip = n_tile * S::STRIPS + 2 * member;
    if constexpr (S::kTeams == 2) {
      float d[1][S::kTiles][4];
      join_teams<S>(d, total, base + p.exchange, team, member, lane);
      if (complete<S>(p, s, d, warp, lane)) store_strip<S>(p, d[0], strip + team, m_tile * S::TN, lane);
    } else if (complete<S>(p, s, total, warp, lane)) {
#pragma unroll
      for (int f = 0; f < 2; f++) store_strip<S>(p, total[f], strip + f, m_tile * S::TN, lane);
    }
  }
}

template <class S>
MmaKernel info() {
  return {reinterpret_cast<const void*>(mma_kernel<S>), S::kBlocksPerSM};
}

template <bool BF, MmaFormat FORMAT>
MmaKernel find_kernel(MmaTile tile) {
  switch (tile) {
    case MmaTile::k128x16: return info<MmaShape<BF, FORMAT, 8, 16, false>>();
    case MmaTile::k128x32: return info<MmaShape<BF, FORMAT, 8, 32, false>>();
    case MmaTile::k128x64: return info<MmaShape<BF, FORMAT, 8, 64, false>>();
    case MmaTile::k256x64: return info<MmaShape<BF, FORMAT, 16, 64, false>>();
    case MmaTile::k256x128: return info<MmaShape<BF, FORMAT, 16, 128, true>>();
  }
  return {};
}

template <bool BF>
MmaKernel find_kernel(MmaTile tile, MmaFormat format) {
  switch (format) {
    case MmaFormat::kOneGroup: return find_kernel<BF, MmaFormat::kOneGroup>(tile);
    case MmaFormat::kOneGroupZeros: return find_kernel<BF, MmaFormat::kOneGroupZeros>(tile);
    case MmaFormat::kAny: return find_kernel<BF, MmaFormat::kAny>(tile);
  }
  return {};
}

}  // namespace
}  // namespace gptq
