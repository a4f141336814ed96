// 16 lanes in two AVX2 registers. Needs AVX2, FMA and F16C; AVX-VNNI where the compiler has it on.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "cpu/place.h"

namespace gptq_cpu {
namespace {  // each source has lanes of its own

struct Lanes {
  struct Bytes { __m256i a, b; };
  struct Ints { __m256i a, b; };
  struct Floats { __m256 a, b; };

  static Bytes load_bytes(const std::uint8_t* p) {
    return {_mm256_load_si256(reinterpret_cast<const __m256i*>(p)), _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 32))};
  }
  static Bytes low_nibbles(Bytes v) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(v.a, m), _mm256_and_si256(v.b, m)};
  }
  static Bytes high_nibbles(Bytes v) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(v.a, 4), m), _mm256_and_si256(_mm256_srli_epi16(v.b, 4), m)};
  }
  static Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
  static Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }

#ifdef __AVXVNNI__
  static Ints dot_nibbles(Ints acc, Bytes w, std::int32_t x) {
    const __m256i v = _mm256_set1_epi32(x);
    return {_mm256_dpbusd_avx_epi32(acc.a, w.a, v), _mm256_dpbusd_avx_epi32(acc.b, w.b, v)};
  }
  static Ints dot_bytes(Ints acc, Bytes w, std::int32_t x) { return dot_nibbles(acc, w, x); }
#else
  // Two products of 15 by 127 fit into 16 bits.
  static Ints dot_nibbles(Ints acc, Bytes w, std::int32_t x) {
    const __m256i v = _mm256_set1_epi32(x), ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(w.a, v), ones)),
            _mm256_add_epi32(acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(w.b, v), ones))};
  }
  static Ints dot_bytes(Ints acc, Bytes w, std::int32_t x) {
    const Ints high = dot_nibbles(zero_ints(), high_nibbles(w), x);
    acc = dot_nibbles(acc, low_nibbles(w), x);
    return {_mm256_add_epi32(acc.a, _mm256_slli_epi32(high.a, 4)), _mm256_add_epi32(acc.b, _mm256_slli_epi32(high.b, 4))};
  }
#endif

  static constexpr int kExactRows = 6;
  static constexpr int exact_strips(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
  template <int bits>
  struct Zeros { Floats offset[kOffsets<bits>]; };
  template <int bits>
  static Zeros<bits> zeros(Floats zero) {
    Zeros<bits> z;
    for (int i = 0; i < kOffsets<bits>; i++) {
      const __m256 one = _mm256_castsi256_ps(_mm256_set1_epi32(one_at(bits * i)));
      z.offset[i] = {_mm256_add_ps(zero.a, one), _mm256_add_ps(zero.b, one)};
    }
    return z;
  }
  template <int bits>
  static Bytes far(Bytes v) { return {_mm256_srli_epi32(v.a, kFar<bits>), _mm256_srli_epi32(v.b, kFar<bits>)}; }
  template <int bits, int i>
  static Floats centred(Bytes near, Bytes far, const Zeros<bits>& zero) {
    constexpr Place at = place<bits>(i);
    const __m256i mask = _mm256_set1_epi32(((1 << bits) - 1) << at.bit), one = _mm256_set1_epi32(one_at(at.bit));
    const Bytes v = at.far ? far : near;
    return {_mm256_sub_ps(_mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(v.a, mask), one)), zero.offset[at.bit / bits].a),
            _mm256_sub_ps(_mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(v.b, mask), one)), zero.offset[at.bit / bits].b)};
  }

  static Floats to_floats(Ints v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
  static Floats broadcast(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
  static Floats multiply_subtract_from(Floats a, Floats b, Floats c) {
    return {_mm256_fnmadd_ps(a.a, b.a, c.a), _mm256_fnmadd_ps(a.b, b.b, c.b)};
  }

  static Floats load_floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Floats load_half(const std::uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  static Floats load_bfloat(const std::uint16_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8))), 16))};
  }
  static Floats load_u8(const std::uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))))};
  }
  static void store(float* p, Floats v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
  }

  static constexpr int kTile = 4;
  static constexpr int kStripRows = 4, kManyRows = 4;  // at a time: of no more than so many, and of more
  static constexpr int rounded_strips(int, int) { return 1; }
  static Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
  static Floats subtract(Floats a, Floats b) { return {_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
  static Floats divide(Floats a, Floats b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
  static Floats maximum(Floats a, Floats b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
  static Floats minimum(Floats a, Floats b) { return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
  static Floats round(Floats v) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(v.a, nearest), _mm256_round_ps(v.b, nearest)};
  }
  static Floats times_power_of_two(Floats v, Floats n) { return {scaled(v.a, n.a), scaled(v.b, n.b)}; }
  static float largest_lane(Floats v) {
    float lanes[16], most;
    store(lanes, v);
    most = lanes[0];
    for (const float lane : lanes) most = most > lane ? most : lane;
    return most;
  }

  static float sum(Floats v) {
    const __m256 half = _mm256_add_ps(v.a, v.b);
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
  }

  static float largest(const float* x, int n) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 most = _mm256_setzero_ps();
    for (int i = 0; i < n; i += 8) most = _mm256_max_ps(_mm256_and_ps(_mm256_loadu_ps(x + i), magnitude), most);
    float found[8], best = 0;
    _mm256_storeu_ps(found, most);
    for (float v : found) best = v > best ? v : best;
    return best;
  }
  static std::int32_t round_to_bytes(const float* x, int n, float by, std::int8_t* out) {
    __m256i total = _mm256_setzero_si256();
    const __m256 factor = _mm256_set1_ps(by);
    for (int i = 0; i < n; i += 8) {
      const __m256i v = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), factor));
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
      const __m128i bytes = _mm_packs_epi16(words, words);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i), bytes);
      total = _mm256_add_epi32(total, _mm256_cvtepi8_epi32(bytes));
    }
    std::int32_t found[8], sum = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(found), total);
    for (std::int32_t v : found) sum += v;
    return sum;
  }

 private:
  // In two steps, for either factor has to be a number.
  static __m256 scaled(__m256 v, __m256 n) {
    const __m256i whole = _mm256_cvtps_epi32(n), first = _mm256_srai_epi32(whole, 1), second = _mm256_sub_epi32(whole, first);
    return _mm256_mul_ps(_mm256_mul_ps(v, power(first)), power(second));
  }
  static __m256 power(__m256i n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }
};

}  // namespace
}  // namespace gptq_cpu
