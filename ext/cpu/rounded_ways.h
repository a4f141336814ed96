// The quantized product with x rounded to int8, written once over 16 lanes.
#pragma once
#include <cstring>

#include "cpu/linear.h"
#include "cpu/strips.h"

namespace gptq_cpu {
namespace {

std::int32_t four(const std::int8_t* x) {
  std::int32_t v;
  std::memcpy(&v, x, 4);
  return v;
}

void quantize(const Quantized& w, const float* x, int m, int first, int last, const Rows& rows) {
  const int groups = w.K / w.group;
  alignas(64) float gathered[128];
  for (int g = first; g < last; g++) {
    const int k = g * w.group;
    const float* from = x + k;
    if (w.order != nullptr || k + w.group > w.inputs) {
      for (int i = 0; i < w.group; i++) {
        const int place = w.order != nullptr ? w.order[k + i] : k + i;
        gathered[i] = place >= 0 && place < w.inputs ? x[place] : 0.0f;
      }
      from = gathered;
    }
    float magnitude = Lanes::largest(from, w.group);
    // A number that is none, or infinite, makes the row's results none, and nobody else's.
    Lanes::Floats none = Lanes::zero();
    for (int i = 0; i < w.group; i += 16) {
      const Lanes::Floats v = Lanes::load_floats(from + i);
      none = Lanes::add(none, Lanes::subtract(v, v));
    }
    magnitude += Lanes::sum(none);
    const std::int64_t at = static_cast<std::int64_t>(m) * groups + g;
    rows.scales[at] = magnitude / 127.0f;
    const float by = magnitude > 0 ? 127.0f / magnitude : 0.0f;
    rows.sums[at] = Lanes::round_to_bytes(from, w.group, by, rows.bytes + m * rows.ld + k);
  }
}

// M rows by S strips side by side: sums of few rows do not wait for one another, and what is read of x serves all strips.
template <int M, int S, int bits>
void strip(const Quantized& w, const Rows& rows, int m, int s, float* y, std::int64_t ld) {
  const int groups = w.K / w.group;
  const std::int64_t apart = static_cast<std::int64_t>(w.K) * 2 * bits;
  const std::uint8_t* q = w.q + s * apart;
  Lanes::Floats acc[M][S];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < S; j++) acc[i][j] = Lanes::zero();
  const std::int8_t* x = rows.bytes + m * rows.ld;
  for (int g = 0; g < groups; g++) {
    Lanes::Ints sums[M][S], more[M][S];  // `more`: of the upper halves, where one sum would wait for itself
    for (int i = 0; i < M; i++)
      for (int j = 0; j < S; j++) sums[i][j] = more[i][j] = Lanes::zero_ints();
    if constexpr (bits == 4) {
      for (int k = g * w.group; k < (g + 1) * w.group; k += 8, q += 64) {
        Lanes::Bytes low[S], high[S];
        for (int j = 0; j < S; j++) {
          __builtin_prefetch(q + j * apart + kAhead);
          const Lanes::Bytes v = Lanes::load_bytes(q + j * apart);
          low[j] = Lanes::low_nibbles(v);
          high[j] = Lanes::high_nibbles(v);
        }
        for (int i = 0; i < M; i++) {
          const std::int8_t* at = x + i * rows.ld + k;
          for (int j = 0; j < S; j++) sums[i][j] = Lanes::dot_nibbles(sums[i][j], low[j], four(at));
          for (int j = 0; j < S; j++) {
            Lanes::Ints& sum = M * S == 1 ? more[i][j] : sums[i][j];
            sum = Lanes::dot_nibbles(sum, high[j], four(at + 4));
          }
        }
      }
      if constexpr (M * S == 1)
        for (int i = 0; i < M; i++)
          for (int j = 0; j < S; j++) sums[i][j] = Lanes::add(sums[i][j], more[i][j]);
    } else {
      for (int k = g * w.group; k < (g + 1) * w.group; k += 4, q += 64) {
        Lanes::Bytes v[S];
        for (int j = 0; j < S; j++) {
          __builtin_prefetch(q + j * apart + kAhead);
          v[j] = Lanes::load_bytes(q + j * apart);
        }
        for (int i = 0; i < M; i++)
          for (int j = 0; j < S; j++) sums[i][j] = Lanes::dot_bytes(sums[i][j], v[j], four(x + i * rows.ld + k));
      }
    }
    for (int j = 0; j < S; j++) {
      const std::int64_t at = (static_cast<std::int64_t>(s + j) * groups + g) * 16;
      const Lanes::Floats scale = load_scales(w, at);
      const Lanes::Floats zero = Lanes::load_u8(w.zeros + at);
      for (int i = 0; i < M; i++) {
        const std::int64_t row = static_cast<std::int64_t>(m + i) * groups + g;
        acc[i][j] = add_group(acc[i][j], Lanes::to_floats(sums[i][j]), zero, scale, rows.sums[row], rows.scales[row]);
      }
    }
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < S; j++) store_strip(w, s + j, acc[i][j], y + (m + i) * ld);
}

// M rows, or a few less.
template <int bits, int M>
void strips_of(const Quantized& w, const Rows& rows, int m, int num_rows, int first, int last, float* y, std::int64_t ld) {
  if constexpr (M > 1)
    if (num_rows < M) return strips_of<bits, M - 1>(w, rows, m, num_rows, first, last, y, ld);
  constexpr int S = Lanes::rounded_strips(M, bits);
  int s = first;
  for (; s + S <= last; s += S) strip<M, S, bits>(w, rows, m, s, y, ld);
  if constexpr (S > 1)
    for (; s < last; s++) strip<M, 1, bits>(w, rows, m, s, y, ld);
}

template <int bits>
void strips(const Quantized& w, const Rows& rows, int M, int first, int last, float* y, std::int64_t ld) {
  constexpr int most = Lanes::kStripRows, many = Lanes::kManyRows;
  const int blocks = M <= most ? 1 : (M + many - 1) / many, step = (M + blocks - 1) / blocks;
  for (int m = 0; m < M; m += step) strips_of<bits, most>(w, rows, m, M - m < step ? M - m : step, first, last, y, ld);
}

void multiply(const Quantized& w, const Rows& rows, int M, int first, int last, float* y, std::int64_t ld) {
  w.bits == 4 ? strips<4>(w, rows, M, first, last, y, ld) : strips<8>(w, rows, M, first, last, y, ld);
}

}  // namespace
}  // namespace gptq_cpu
