// What both quantized products do with a strip.
#pragma once
#include <cstring>

#include "cpu/linear.h"

namespace gptq_cpu {
namespace {

Lanes::Floats load_scales(const Quantized& w, std::int64_t at) {
  if (w.kind == Kind::half) return Lanes::load_half(static_cast<const std::uint16_t*>(w.scales) + at);
  if (w.kind == Kind::bfloat) return Lanes::load_bfloat(static_cast<const std::uint16_t*>(w.scales) + at);
  return Lanes::load_floats(static_cast<const float*>(w.scales) + at);
}

// acc + (integers - zero * sum of the row's bytes) * the row's scale * scale: what a group of inputs adds, in this order wherever it is
// computed.
Lanes::Floats add_group(Lanes::Floats acc, Lanes::Floats integers, Lanes::Floats zero, Lanes::Floats scale, std::int32_t row_sum,
                        float row_scale) {
  const Lanes::Floats centred = Lanes::multiply_subtract_from(zero, Lanes::broadcast(static_cast<float>(row_sum)), integers);
  return Lanes::multiply_add(Lanes::multiply(centred, Lanes::broadcast(row_scale)), scale, acc);
}

// A row's 16 outputs of strip s; of the last strip, those that there are.
void store_strip(const Quantized& w, int s, Lanes::Floats v, float* row) {
  float* out = row + static_cast<std::int64_t>(s) * 16;
  if ((s + 1) * 16 <= w.N) return Lanes::store(out, v);
  alignas(64) float lanes[16];
  Lanes::store(lanes, v);
  std::memcpy(out, lanes, sizeof(float) * static_cast<std::size_t>(w.N - s * 16));
}

}  // namespace
}  // namespace gptq_cpu
