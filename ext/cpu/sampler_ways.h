// The passes over a row, in the compiler's vectors: included by one source for each instruction set. Only what has one result whatever
// the width is done here: maxima, comparisons, sums of integers, and the same operations on each element (no fused multiply-adds).
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/sampler.h"
#include "cpu/sampler_share.h"

namespace gptq_cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
using Floats = Vector<float, kWidth>;
using Ints = Vector<std::int32_t, kWidth>;
using Words = Vector<std::uint32_t, kWidth>;

Floats load(const float* x) {
  Floats v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

template <typename T, int N, typename F>
T folded(Vector<T, N> v, F&& f) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    Vector<T, N / 2> halves[2];
    std::memcpy(halves, &v, sizeof v);
    return folded<T, N / 2>(f(halves[0], halves[1]), f);
  }
}
bool any(Ints v) {
  return folded<std::int32_t, kWidth>(v, [](auto a, auto b) { return a | b; }) != 0;
}
std::uint64_t sum(Ints v) {
  std::uint64_t total = 0;
  for (int i = 0; i < kWidth; i++) total += static_cast<std::uint32_t>(v[i]);
  return total;
}

bool survey(const RowView& row, float* largest) {
  Ints worst = {};
  for (int b = 0; b < row.num_whole; b++) {
    const float* x = row.block(b);
    Floats most = load(x);
    for (int i = 0; i < kBlock; i += kWidth) {
      const Floats v = load(x + i);
      const Ints magnitude = reinterpret_cast<Ints>(v) & 0x7fffffff;
      worst = magnitude > worst ? magnitude : worst;
      most = v > most ? v : most;
    }
    largest[b] = folded<float, kWidth>(most, [](auto a, auto c) { return a > c ? a : c; });
  }
  return !any(worst >= 0x7f800000);
}

Total measure(const RowView& row, const float* largest, const Scale& scale, float low, float high) {
  // 17 bits of a weight are above the point of share * 2^17, and 23 below: sums of up to 128 of either fit into 32 bits.
  constexpr int kAtOnce = 128 * kWidth / kBlock;
  Total total;
  Ints above = {}, below = {}, count = {};
  int num = 0;
  const auto flush = [&] {
    total.mass += (sum(above) << 23) + sum(below);
    total.count += sum(count);
    above = below = count = Ints{};
    num = 0;
  };
  for (int b = 0; b < row.num_blocks; b++) {
    if (!(largest[b] > low)) continue;
    const float* x = row.block(b);
    for (int i = 0; i < kBlock; i += kWidth) {
      const Floats v = load(x + i);
      const Floats share = share_of<kWidth>((v - scale.best) * scale.inverse_temperature);
      const Ints in = (v > low) & (v <= high) & (share >= scale.min_p);
      const Floats scaled = share * 0x1p17f;
      const Ints upper = __builtin_convertvector(scaled, Ints);
      const Ints lower = __builtin_convertvector((scaled - __builtin_convertvector(upper, Floats)) * 0x1p23f, Ints);
      above += upper & in;
      below += lower & in;
      count -= ((upper | lower) != 0) & in;
    }
    if (++num == kAtOnce) flush();
  }
  flush();
  return total;
}

void histogram(const RowView& row, const float* largest, const Scale& scale, bool by_count, std::uint64_t* bins) {
  for (int b = 0; b < row.num_blocks; b++) {
    if (!((largest[b] - scale.best) * scale.inverse_temperature > -30.0f)) continue;
    const float* x = row.block(b);
    std::uint32_t upper[kBlock], lower[kBlock];
    std::int32_t bin[kBlock];
    for (int i = 0; i < kBlock; i += kWidth) {
      const Floats t = (load(x + i) - scale.best) * scale.inverse_temperature, near = t > -30.0f ? t : Floats{} - 30.0f;
      const Floats share = share_of<kWidth>(t), scaled = (share >= scale.min_p ? share : Floats{}) * 0x1p17f;
      const Ints u = __builtin_convertvector(scaled, Ints);
      const Ints l = __builtin_convertvector((scaled - __builtin_convertvector(u, Floats)) * 0x1p23f, Ints);
      const Ints k = __builtin_convertvector(near * -kBinScale, Ints);
      std::memcpy(upper + i, &u, sizeof u);
      std::memcpy(lower + i, &l, sizeof l);
      std::memcpy(bin + i, &k, sizeof k);
    }
    for (int i = 0; i < kBlock; i++) {
      const std::uint64_t weight = static_cast<std::uint64_t>(upper[i]) << 23 | lower[i];
      bins[bin[i]] += by_count ? weight > 0 : weight;
    }
  }
}

void list(const RowView& row, const float* largest, float low, float high, bool (*take)(void* context, float x, int id), void* context) {
  for (int b = 0; b < row.num_blocks; b++) {
    if (!(largest[b] > low)) continue;
    const float* x = row.block(b);
    for (int i = 0; i < kBlock; i += kWidth) {
      const Floats v = load(x + i);
      const Ints in = (v > low) & (v <= high);
      if (!any(in)) continue;
      for (int k = 0; k < kWidth; k++)
        if (in[k] && !take(context, v[k], b * kBlock + i + k)) return;
    }
  }
}

// Above share * by.
template <int N>
Vector<float, N> bound(Vector<float, N> x, const Scale& scale, float by) {
  constexpr float kSlope = 0x1.715476p+23f, kOne = 0x1.fcp+29f;  // 2^23 / log(2), and the bits of 1
  Vector<float, N> t = (x - scale.best) * scale.inverse_temperature;
  t = t > -80.0f ? t : Vector<float, N>{} - 80.0f;
  return reinterpret_cast<Vector<float, N>>(__builtin_convertvector(t * kSlope + kOne, Vector<std::int32_t, N>)) * by;
}

void race(const RowView& row, const float* largest, Race& race) {
  // An exponential number -log(1 - v) is at least v, so whoever beats the leader has a number v below share / score. The share's bound: a
  // straight line between two powers of 2 is above the curve, by 6 % at most. Half a word is below v * 2^31, and 0.2 % cover the rounding.
  Words first;
  for (int i = 0; i < kWidth; i++) first[i] = static_cast<std::uint32_t>(i) * kIdStep + race.key0;
  float by = static_cast<float>(0x1p31 * 1.002 / race.score);
  for (int b = 0; b < row.num_blocks; b++) {
    if (largest[b] < race.value) continue;
    if (bound<1>(Vector<float, 1>{largest[b]}, race.scale, by)[0] <= 0.25f) continue;
    const float* x = row.block(b);
    const std::uint32_t id = static_cast<std::uint32_t>(b) * kBlock;
    Ints may_win[kBlock / kWidth], found = {};
    for (int i = 0; i < kBlock / kWidth; i++) {
      const Floats v = load(x + i * kWidth);
      const Words word = random_word(first + (id + static_cast<std::uint32_t>(i * kWidth)) * kIdStep, race.key1);
      const Floats number = __builtin_convertvector(reinterpret_cast<Ints>(word >> 1), Floats) + 0.25f;
      may_win[i] = (number < bound<kWidth>(v, race.scale, by)) & (v >= race.value);
      found |= may_win[i];
    }
    if (!any(found)) continue;
    for (int i = 0; i < kBlock; i++)
      if (may_win[i / kWidth][i % kWidth]) race.enter(x[i], static_cast<int>(id) + i);
    by = static_cast<float>(0x1p31 * 1.002 / race.score);
  }
}

}  // namespace
}  // namespace gptq_cpu
