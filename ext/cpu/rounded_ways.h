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

template <int M, int bits>
void strip(const Quantized& w, const Rows& rows, int m, int s, float* y, std::int64_t ld) {
  const int groups = w.K / w.group;
  const std::uint8_t* q = w.q + static_cast<std::int64_t>(s) * w.K * 16 * bits / 8;
  Lanes::Floats acc[M];
  for (int i = 0; i < M; i++) acc[i] = Lanes::zero();
  const std::int8_t* x = rows.bytes + m * rows.ld;
  for (int g = 0; g < groups; g++) {
    Lanes::Ints sums[M];
    for (int i = 0; i < M; i++) sums[i] = Lanes::zero_ints();
    if constexpr (bits == 4) {
      for (int k = g * w.group; k < (g + 1) * w.group; k += 8, q += 64) {
        __builtin_prefetch(q + kAhead);
        const Lanes::Bytes v = Lanes::load_bytes(q), low = Lanes::low_nibbles(v), high = Lanes::high_nibbles(v);
        for (int i = 0; i < M; i++) {
          const std::int8_t* at = x + i * rows.ld + k;
          sums[i] = Lanes::dot_nibbles(sums[i], low, four(at));
          sums[i] = Lanes::dot_nibbles(sums[i], high, four(at + 4));
        }
      }
    } else {
      for (int k = g * w.group; k < (g + 1) * w.group; k += 4, q += 64) {
        __builtin_prefetch(q + kAhead);
        const Lanes::Bytes v = Lanes::load_bytes(q);
        for (int i = 0; i < M; i++) sums[i] = Lanes::dot_bytes(sums[i], v, four(x + i * rows.ld + k));
      }
    }
    const std::int64_t at = (static_cast<std::int64_t>(s) * groups + g) * 16;
    const Lanes::Floats scale = load_scales(w, at);
    const Lanes::Floats zero = Lanes::load_u8(w.zeros + at);
    for (int i = 0; i < M; i++) {
      const std::int64_t row = static_cast<std::int64_t>(m + i) * groups + g;
      acc[i] = add_group(acc[i], Lanes::to_floats(sums[i]), zero, scale, rows.sums[row], rows.scales[row]);
    }
  }
  for (int i = 0; i < M; i++) store_strip(w, s, acc[i], y + (m + i) * ld);
}

// M rows, or a few less.
template <int bits, int M>
void strips_of(const Quantized& w, const Rows& rows, int m, int num_rows, int first, int last, float* y, std::int64_t ld) {
  if constexpr (M > 1)
    if (num_rows < M) return strips_of<bits, M - 1>(w, rows, m, num_rows, first, last, y, ld);
  for (int s = first; s < last; s++) strip<M, bits>(w, rows, m, s, y, ld);
}

template <int bits>
void strips(const Quantized& w, const Rows& rows, int M, int first, int last, float* y, std::int64_t ld) {
  constexpr int most = Lanes::kStripRows;
  for (int m = 0; m < M; m += most) strips_of<bits, most>(w, rows, m, M - m < most ? M - m : most, first, last, y, ld);
}

void multiply(const Quantized& w, const Rows& rows, int M, int first, int last, float* y, std::int64_t ld) {
  w.bits == 4 ? strips<4>(w, rows, M, first, last, y, ld) : strips<8>(w, rows, M, first, last, y, ld);
}

}  // namespace
}  // namespace gptq_cpu
