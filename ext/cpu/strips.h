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
