// 16 lanes in plain C++, for processors without kernels of their own. The compiler makes of it what the baseline has.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace gptq_cpu {
namespace {  // each source has lanes of its own

struct Lanes {
  struct Bytes { std::uint8_t v[64]; };
  struct Ints { std::int32_t v[16]; };
  struct Floats { float v[16]; };

  static Bytes load_bytes(const std::uint8_t* p) {
    Bytes r;
    std::memcpy(r.v, p, 64);
    return r;
  }
  static Bytes low_nibbles(Bytes v) {
    for (std::uint8_t& b : v.v) b &= 15;
    return v;
  }
  static Bytes high_nibbles(Bytes v) {
    for (std::uint8_t& b : v.v) b >>= 4;
    return v;
  }
  static Ints add(Ints a, const Ints& b) {
    for (int i = 0; i < 16; i++) a.v[i] += b.v[i];
    return a;
  }
  static Ints zero_ints() { return {}; }
  static Floats zero() { return {}; }
  static Ints dot_bytes(Ints acc, const Bytes& w, std::int32_t x) {
    std::int8_t xs[4];
    std::memcpy(xs, &x, 4);
    for (int i = 0; i < 16; i++)
      for (int b = 0; b < 4; b++) acc.v[i] += static_cast<std::int32_t>(w.v[4 * i + b]) * xs[b];
    return acc;
  }
  static Ints dot_nibbles(Ints acc, const Bytes& w, std::int32_t x) { return dot_bytes(acc, w, x); }

  static constexpr int kExactRows = 4;
  static constexpr int exact_strips(int) { return 1; }
  template <int bits>
  struct Zeros { Floats zero; };
  template <int bits>
  static Zeros<bits> zeros(Floats zero) { return {zero}; }
  template <int bits>
  static Bytes far(Bytes v) { return v; }
  template <int bits, int i>
  static Floats centred(const Bytes& v, const Bytes&, const Zeros<bits>& zero) {
    constexpr int byte = i % 4, shift = i < 4 ? 0 : 4, mask = (1 << bits) - 1;
    return each([&](int lane) { return static_cast<float>(v.v[4 * lane + byte] >> shift & mask) - zero.zero.v[lane]; });
  }

  static Floats to_floats(Ints v) { return each([&](int i) { return static_cast<float>(v.v[i]); }); }
  static Floats broadcast(float x) { return each([&](int) { return x; }); }
  static Floats multiply(Floats a, Floats b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
  static Floats multiply_subtract_from(Floats a, Floats b, Floats c) { return each([&](int i) { return c.v[i] - a.v[i] * b.v[i]; }); }

  static Floats load_floats(const float* p) { return each([&](int i) { return p[i]; }); }
  static Floats load_half(const std::uint16_t* p) { return each([&](int i) { return half(p[i]); }); }
  static Floats load_bfloat(const std::uint16_t* p) {
    return each([&](int i) {
      const std::uint32_t bits = static_cast<std::uint32_t>(p[i]) << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      return x;
    });
  }
  static Floats load_u8(const std::uint8_t* p) { return each([&](int i) { return static_cast<float>(p[i]); }); }
  static void store(float* p, Floats v) { std::memcpy(p, v.v, sizeof v.v); }
  static constexpr int kTile = 2;
  static constexpr int kStripRows = 4, kManyRows = 4;  // at a time: of no more than so many, and of more
  static constexpr int rounded_strips(int, int) { return 1; }
  static Floats add(Floats a, Floats b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
  static Floats subtract(Floats a, Floats b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
  static Floats divide(Floats a, Floats b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
  static Floats maximum(Floats a, Floats b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
  static Floats minimum(Floats a, Floats b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
  static Floats round(Floats v) { return each([&](int i) { return std::nearbyint(v.v[i]); }); }
  static Floats times_power_of_two(Floats v, Floats n) {
    return each([&](int i) { return n.v[i] >= -150 && n.v[i] <= 128 ? std::ldexp(v.v[i], static_cast<int>(n.v[i])) : n.v[i]; });
  }
  static float largest_lane(Floats v) {
    float most = v.v[0];
    for (const float lane : v.v) most = most > lane ? most : lane;
    return most;
  }

  static float sum(Floats v) {
    for (int width = 8; width; width /= 2)
      for (int i = 0; i < width; i++) v.v[i] += v.v[i + width];
    return v.v[0];
  }

  static float largest(const float* x, int n) {
    float most = 0;
    for (int i = 0; i < n; i++) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
    return most;
  }
  static std::int32_t round_to_bytes(const float* x, int n, float by, std::int8_t* out) {
    std::int32_t total = 0;
    for (int i = 0; i < n; i++) {
      const float v = std::nearbyint(x[i] * by);
      out[i] = v > 127 ? 127 : v >= -128 ? static_cast<std::int8_t>(v) : -128;  // NaN too
      total += out[i];
    }
    return total;
  }

 private:
  template <typename F>
  static Floats each(F f) {
    Floats r;
    for (int i = 0; i < 16; i++) r.v[i] = f(i);
    return r;
  }
  static float half(std::uint16_t h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(mantissa), -24);
    const std::uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
};

}  // namespace
}  // namespace gptq_cpu
