// The GEMV's arithmetic: one chunk of weights times x, and the end of an output row.
#pragma once
#include "common/layout.cuh"
#include "common/ptx.cuh"
#include "common/vector.cuh"
#include "gemv/gemv_plan.cuh"

namespace gptq {

// Whether chunk_mma computes the sums of x, or computes and leaves them, or finds them.
enum class Sums { kCompute, kLeave, kFind };

// One chunk of S strips, `apart` bytes from each other in shared memory, against NT column tiles: acc += scale * (sum v x - z sum x), group
// by group. load_x(n, u, b): the B fragments of tokens 8n.. for the two k16 steps from k = 32u of the chunk. `sums`: [group][8 NT] float.
// `ones`: what computes the sums of x, see Offset.
template <int S, int NT, int G, bool ZP, bool BF, Sums kSumsOfX, int ROOM, typename LoadX>
__device__ __forceinline__ void chunk_mma(float (&acc)[ROOM][NT][4], uint32_t chunk, int apart, uint32_t sums, int lane,
                                          const LoadX& load_x, const uint32_t (&ones)[4]) {
  using C = Chunk<G, ZP>;
  using O = Offset<BF, ZP>;
  constexpr bool kFind = kSumsOfX == Sums::kFind;
  constexpr int kUnits = 4 / G;  // of 32 k, in a group
  uint4 q[S];
#pragma unroll
  for (int group = 0; group < G; group++) {
    float part[S][NT][4] = {}, off[NT][4] = {};
#pragma unroll
    for (int u = group * kUnits; u < (group + 1) * kUnits; u++) {
      if (u % 2 == 0) {
#pragma unroll
        for (int s = 0; s < S; s++) q[s] = lds128(chunk + s * apart + u / 2 * kBlockBytes + lane * 16);
      }
      uint32_t b[NT][4];
#pragma unroll
      for (int n = 0; n < NT; n++) load_x(n, u, b[n]);
#pragma unroll
      for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int n = 0; n < NT; n++)
          if constexpr (!kFind) mma_m16n8k16<BF>(off[n], ones, b[n][2 * j], b[n][2 * j + 1]);
#pragma unroll
        for (int s = 0; s < S; s++) {
          uint32_t a[4];
          expand<BF>(u % 2 ? (j ? q[s].w : q[s].z) : (j ? q[s].y : q[s].x), a);
#pragma unroll
          for (int n = 0; n < NT; n++) mma_m16n8k16<BF>(part[s][n], a, b[n][2 * j], b[n][2 * j + 1]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint32_t at = sums + (group * NT + n) * 32 + (lane & 3) * 8;
      if constexpr (kSumsOfX == Sums::kLeave) {
        if (lane < 4) sts64(at, off[n][0], off[n][1]);
      }
      if constexpr (kFind) {
        const float2 found = lds64(at);
        off[n][0] = found.x, off[n][1] = found.y;
      }
      off[n][2] = off[n][0] * O::kG8, off[n][3] = off[n][1] * O::kG8;
    }
#pragma unroll
    for (int s = 0; s < S; s++) {
      const uint32_t meta = chunk + s * apart;
      const float2 scale = scale_pair(lds32(meta + C::kScaleOffset + group * 32 + (lane >> 2) * 4));
      float z0 = 0.f, z1 = 0.f;
      if constexpr (ZP) {
        const uint32_t pair = lds16(meta + C::kZeroOffset + group * 16 + (lane >> 2) * 2);
        z0 = O::kZeroBase + static_cast<float>(pair & 255u);
        z1 = O::kZeroBase + static_cast<float>(pair >> 8);
      }
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float whole = ZP ? fmaf(i < 2 ? z0 : z1, off[n][i], part[s][n][i]) : part[s][n][i] + off[n][i];
          acc[s][n][i] = fmaf(i < 2 ? scale.x : scale.y, whole, acc[s][n][i]);
        }
    }
  }
}

// Where one lane's four sums of a strip go: rows r0, r1 of tokens token, token + 1. What is added to them can be loaded before they exist;
// it stays in 16 bits meanwhile, two to a register.
template <bool BF>
struct Outputs {
  int r0, token;
  uint32_t bias, residual[2];  // of rows r0, r1; for each token

  static __device__ __forceinline__ int second_row(const GemvArgs& a, int r0) { return a.paired ? a.N / 2 + r0 : r0 + 8; }
  static __device__ __forceinline__ float low(uint32_t two) { return from_16bit<BF>(static_cast<uint16_t>(two)); }
  static __device__ __forceinline__ float high(uint32_t two) { return from_16bit<BF>(static_cast<uint16_t>(two >> 16)); }

  __device__ __forceinline__ void load(const GemvArgs& a, int strip, int g, int first_token) {
    r0 = a.paired ? strip * 8 + g : strip * kStripRows + g;
    token = first_token;
    const int r1 = second_row(a, r0);
    bias = residual[0] = residual[1] = 0;
    if (a.bias) bias = a.bias[r0] | (a.paired < kPlanes ? static_cast<uint32_t>(a.bias[r1]) << 16 : 0u);
    if (!a.residual) return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (token + i >= a.M) continue;
      const uint16_t* from = a.residual + static_cast<size_t>(token + i) * a.ldr;
      residual[i] = from[r0];
      if (a.paired < kGated) residual[i] |= static_cast<uint32_t>(from[r1]) << 16;
    }
  }

  __device__ __forceinline__ void store(const GemvArgs& a, const float (&v)[4]) const {
    using O = Offset<BF, false>;
    const int r1 = second_row(a, r0);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (token + i >= a.M) continue;
      const float first = __fmaf_rn(v[i], O::kUnscaleG, low(bias)), second = __fmaf_rn(v[2 + i], O::kUnscaleG8, high(bias));
      const size_t row = static_cast<size_t>(token + i) * a.ldy;
      if (a.f32) {
        float* const y = static_cast<float*>(a.y) + row;
        y[r0] = a.paired < kGated ? first : join_rows(a.paired, first, second, 0.f);
        if (a.paired < kGated) y[r1] = second;
        continue;
      }
      uint16_t* const y = static_cast<uint16_t*>(a.y) + row;
      if (a.paired < kGated) {
        y[r0] = to_16bit<BF>(first + low(residual[i]));
        y[r1] = to_16bit<BF>(second + high(residual[i]));
      } else {
        y[r0] = to_16bit<BF>(join_rows(a.paired, first, second, low(residual[i])));
      }
    }
  }
};

}  // namespace gptq
