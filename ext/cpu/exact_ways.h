// The quantized product without rounding x, written once over 16 lanes: (q - zero) is an exact small integer, its products with x are
// summed in float32 in the order of the inputs within a group, and each group's sum times its scale is added in the order of the groups.
// A row's sum is in this order in every tile below.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/linear.h"
#include "cpu/strips.h"

namespace gptq_cpu {
namespace {

void gather(const Quantized& w, const float* x, int first, int last, float* out) {
  const int begin = first * w.group, end = last * w.group;
  if (w.order != nullptr) {
    for (int k = begin; k < end; k++) {
      const std::int32_t place = w.order[k];
      out[k] = place >= 0 && place < w.inputs ? x[place] : 0.0f;
    }
    return;
  }
  const int there = end < w.inputs ? end : w.inputs;
  if (begin < there) std::memcpy(out + begin, x + begin, sizeof(float) * static_cast<std::size_t>(there - begin));
  for (int k = begin < there ? there : begin; k < end; k++) out[k] = 0.0f;
}

template <int bits>
constexpr int kPerLine = 32 / bits;  // inputs in 64 bytes of a strip

template <typename F, int... i>
inline __attribute__((always_inline)) void each(std::integer_sequence<int, i...>, F&& f) {
  (f(std::integral_constant<int, i>{}), ...);
}

// Where group g of S strips from s on is.
template <int bits, int S>
struct Group {
  const std::uint8_t* q[S];
  const std::uint8_t* zeros[S];
  std::int64_t scales[S];
  Group(const Quantized& w, int s, int g) {
    const int groups = w.K / w.group;
    for (int i = 0; i < S; i++) {
      scales[i] = (static_cast<std::int64_t>(s + i) * groups + g) * 16;
      q[i] = w.q + (static_cast<std::int64_t>(s + i) * w.K + static_cast<std::int64_t>(g) * w.group) * 2 * bits;
      zeros[i] = w.zeros + scales[i];
    }
  }
};

// A group's (q - zero) of S strips, made for one use after another: `at(input, w)` for each input of a group in turn.
template <int bits, int S, typename At>
inline __attribute__((always_inline)) void centred(const Quantized& w, const Group<bits, S>& group, At&& at) {
  Lanes::Zeros<bits> zero[S];
  for (int s = 0; s < S; s++) zero[s] = Lanes::zeros<bits>(Lanes::load_u8(group.zeros[s]));
  for (int k = 0; k < w.group; k += kPerLine<bits>) {
    Lanes::Bytes near[S], far[S];
    for (int s = 0; s < S; s++) {
      __builtin_prefetch(group.q[s] + k * 2 * bits + kAhead);
      near[s] = Lanes::load_bytes(group.q[s] + k * 2 * bits);
      far[s] = Lanes::far<bits>(near[s]);
    }
    each(std::make_integer_sequence<int, kPerLine<bits>>{}, [&](auto i) {
      Lanes::Floats values[S];
      for (int s = 0; s < S; s++) values[s] = Lanes::centred<bits, i()>(near[s], far[s], zero[s]);
      at(k + i(), values);
    });
  }
}

// A weight is multiplied by M rows where it is made. Strips side by side keep the sums of few rows from waiting for one another.
template <int bits, int M, int S>
void exact_tile(const Quantized& w, const float* x, std::int64_t ldx, int s, float* y, std::int64_t ldy) {
  Lanes::Floats acc[M][S];
  for (int m = 0; m < M; m++)
    for (int i = 0; i < S; i++) acc[m][i] = Lanes::zero();
  for (int g = 0; g < w.K / w.group; g++, x += w.group) {
    const Group<bits, S> group(w, s, g);
    Lanes::Floats sums[M][S];
    for (int m = 0; m < M; m++)
      for (int i = 0; i < S; i++) sums[m][i] = Lanes::zero();
    centred<bits, S>(w, group, [&](int k, const Lanes::Floats(&values)[S]) {
      for (int m = 0; m < M; m++) {
        const Lanes::Floats v = Lanes::broadcast(x[m * ldx + k]);
        for (int i = 0; i < S; i++) sums[m][i] = Lanes::multiply_add(values[i], v, sums[m][i]);
      }
    });
    for (int i = 0; i < S; i++) {
      const Lanes::Floats scale = load_scales(w, group.scales[i]);
      for (int m = 0; m < M; m++) acc[m][i] = Lanes::multiply_add(sums[m][i], scale, acc[m][i]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int i = 0; i < S; i++) store_strip(w, s + i, acc[m][i], y + m * ldy);
}

// M rows or a few less: the tiles of R rows and as many strips as suit them.
template <int bits, int R>
void exact_tiles(const Quantized& w, const float* x, std::int64_t ldx, int M, int first, int last, float* y, std::int64_t ldy) {
  if constexpr (R > 1)
    if (M < R) return exact_tiles<bits, R - 1>(w, x, ldx, M, first, last, y, ldy);
  constexpr int S = Lanes::exact_strips(R);
  int s = first;
  for (; s + S <= last; s += S) exact_tile<bits, R, S>(w, x, ldx, s, y, ldy);
  if constexpr (S > 1)
    for (; s < last; s++) exact_tile<bits, R, 1>(w, x, ldx, s, y, ldy);
}

template <int bits>
void exact_rows(const Quantized& w, const float* x, std::int64_t ldx, int M, int first, int last, float* y, std::int64_t ldy) {
  const int tiles = (M + Lanes::kExactRows - 1) / Lanes::kExactRows, rows = (M + tiles - 1) / tiles;
  for (int m = 0; m < M; m += rows)
    exact_tiles<bits, Lanes::kExactRows>(w, x + m * ldx, ldx, M - m < rows ? M - m : rows, first, last, y + m * ldy, ldy);
}

void multiply_exact(const Quantized& w, const float* x, std::int64_t ldx, int M, int first, int last, float* y, std::int64_t ldy) {
  w.bits == 4 ? exact_rows<4>(w, x, ldx, M, first, last, y, ldy) : exact_rows<8>(w, x, ldx, M, first, last, y, ldy);
}

}  // namespace
}  // namespace gptq_cpu
