// A token's share and its random number, for one token or for a vector of them: the same bits either way, since each is a sequence of
// IEEE operations. Whoever includes this compiles without contracting them to fused ones (-ffp-contract=off).
#pragma once
#include <cstdint>

namespace gptq_cpu {
namespace {

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N>
using Vector = typename VectorOf<T, N>::type;

// exp(t) for t <= 0, within a bit of float; 9e-14, which as a weight is 0, for all t below -30.
template <int N>
inline __attribute__((always_inline)) Vector<float, N> share_of(Vector<float, N> t) {
  t = t > -30.0f ? t : Vector<float, N>{} - 30.0f;
  constexpr float kInteger = 0x1.8p23f;  // a float of this size has no digits behind the point
  const Vector<float, N> n = (t * 0x1.715476p+0f + kInteger) - kInteger;
  const Vector<float, N> r = (t - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f;  // log(2) in two parts, products by the first being exact
  Vector<float, N> q = r * 0x1.a01a02p-13f + 0x1.6c16c2p-10f;
  q = r * q + 0x1.111112p-7f;
  q = r * q + 0x1.555556p-5f;
  q = r * q + 0x1.555556p-3f;
  q = r * q + 0.5f;
  const Vector<float, N> e = (r * r * q + r) + 1.0f;
  return reinterpret_cast<Vector<float, N>>(reinterpret_cast<Vector<std::int32_t, N>>(e) +
                                            (__builtin_convertvector(n, Vector<std::int32_t, N>) << 23));
}

// The random number of a token in the row of these keys, from id * kIdStep + key0: two rounds of multiply and xor-shift, the second key
// between them (the constants of lowbias32, Wellons and others, "Prospecting for hash functions").
constexpr std::uint32_t kIdStep = 0x9E3779B9u;
template <typename Word>
inline __attribute__((always_inline)) Word random_word(Word x, std::uint32_t key1) {
  x = (x ^ x >> 16) * 0x21F0AAADu + key1;
  x = (x ^ x >> 15) * 0xD35A2D97u;
  return x ^ x >> 15;
}

}  // namespace
}  // namespace gptq_cpu
