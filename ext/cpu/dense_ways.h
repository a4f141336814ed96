// The product with dense weights, written once over 16 lanes.
#pragma once
#include <cstring>

#include "cpu/linear.h"

namespace gptq_cpu {
namespace {

constexpr int kDenseAhead = 512;  // bytes of a row that are asked for before they are needed

template <Kind kind>
Lanes::Floats load_dense(const void* w, std::int64_t at) {
  if constexpr (kind == Kind::half) return Lanes::load_half(static_cast<const std::uint16_t*>(w) + at);
  if constexpr (kind == Kind::bfloat) return Lanes::load_bfloat(static_cast<const std::uint16_t*>(w) + at);
  return Lanes::load_floats(static_cast<const float*>(w) + at);
}

float element(const void* w, Kind kind, std::int64_t at) {
  alignas(64) std::uint16_t bits[16] = {};
  alignas(64) float lanes[16];
  if (kind == Kind::single) return static_cast<const float*>(w)[at];
  bits[0] = static_cast<const std::uint16_t*>(w)[at];
  Lanes::store(lanes, kind == Kind::half ? Lanes::load_half(bits) : Lanes::load_bfloat(bits));
  return lanes[0];
}

// M rows by O outputs at a time, so that sums do not wait for one another; each has its own order whatever M is.
template <Kind kind, int M, int O>
void tile(const void* w, int K, const float* x, std::int64_t ldx, int n, float* y, std::int64_t ldy) {
  Lanes::Floats acc[M][O];
  for (int i = 0; i < M; i++)
    for (int o = 0; o < O; o++) acc[i][o] = Lanes::zero();
  int k = 0;
  for (; k + 16 <= K; k += 16) {
    Lanes::Floats v[O];
    for (int o = 0; o < O; o++) {
      const std::int64_t at = static_cast<std::int64_t>(n + o) * K + k;
      __builtin_prefetch(static_cast<const char*>(w) + at * (kind == Kind::single ? 4 : 2) + kDenseAhead);
      v[o] = load_dense<kind>(w, at);
    }
    for (int i = 0; i < M; i++) {
      const Lanes::Floats row = Lanes::load_floats(x + i * ldx + k);
      for (int o = 0; o < O; o++) acc[i][o] = Lanes::multiply_add(v[o], row, acc[i][o]);
    }
  }
  for (int i = 0; i < M; i++)
    for (int o = 0; o < O; o++) {
      float sum = Lanes::sum(acc[i][o]);
      for (int rest = k; rest < K; rest++) sum += element(w, kind, static_cast<std::int64_t>(n + o) * K + rest) * x[i * ldx + rest];
      y[i * ldy + n + o] = sum;
    }
}

template <Kind kind, int O>
void outputs(const void* w, int K, const float* x, std::int64_t ldx, int M, int n, float* y, std::int64_t ldy) {
  constexpr int R = Lanes::kTile / 4 > 1 ? Lanes::kTile / 4 : 2;
  int m = 0;
  for (; m + R <= M; m += R) tile<kind, R, O>(w, K, x + m * ldx, ldx, n, y + m * ldy, ldy);
  for (; m < M; m++) tile<kind, 1, O>(w, K, x + m * ldx, ldx, n, y + m * ldy, ldy);
}

template <Kind kind>
void dense_of(const void* w, int K, const float* x, std::int64_t ldx, int M, int first, int last, float* y, std::int64_t ldy) {
  int n = first;
  for (; n + 4 <= last; n += 4) outputs<kind, 4>(w, K, x, ldx, M, n, y, ldy);
  for (; n < last; n++) outputs<kind, 1>(w, K, x, ldx, M, n, y, ldy);
}

void dense(const void* w, Kind kind, int K, const float* x, std::int64_t ldx, int M, int first, int last, float* y, std::int64_t ldy) {
  if (kind == Kind::half) dense_of<Kind::half>(w, K, x, ldx, M, first, last, y, ldy);
  if (kind == Kind::bfloat) dense_of<Kind::bfloat>(w, K, x, ldx, M, first, last, y, ldy);
  if (kind == Kind::single) dense_of<Kind::single>(w, K, x, ldx, M, first, last, y, ldy);
}

}  // namespace
}  // namespace gptq_cpu
