// Where the bits of a weight are in the 32 of its lane, and floats that are made around them: a float of 2^(23 - b) has its ones at bit b
// of the mantissa, so that the bits of a small q at b make it 2^(23 - b) + q, exactly.
#pragma once

namespace gptq_cpu {

struct Place {
  bool far;  // beyond the mantissa, unless it is shifted by kFar first
  int bit;
};

template <int bits>
constexpr int kFar = bits == 4 ? 12 : 16;
template <int bits>
constexpr int kOffsets = bits == 4 ? 5 : 2;  // places that are not far

// Of input i of a line (linear.h).
template <int bits>
constexpr Place place(int i) {
  const int bit = 8 * (i % 4) + (i < 4 ? 0 : 4);
  return bit + bits > 23 ? Place{true, bit - kFar<bits>} : Place{false, bit};
}

// The bits of 2^(23 - bit).
constexpr int one_at(int bit) { return (127 + 23 - bit) << 23; }

}  // namespace gptq_cpu
