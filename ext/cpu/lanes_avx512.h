// 16 lanes in one AVX-512 register. Needs F, BW, VL and VNNI.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "cpu/place.h"

namespace gptq_cpu {
namespace {  // each source has lanes of its own

struct Lanes {
  using Bytes = __m512i;  // 16 lanes of 4 bytes
  using Ints = __m512i;
  using Floats = __m512;

  static Bytes load_bytes(const std::uint8_t* p) { return _mm512_load_si512(p); }
  static Bytes low_nibbles(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  static Bytes high_nibbles(Bytes v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
  static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Ints zero_ints() { return _mm512_setzero_si512(); }
  static Floats zero() { return _mm512_setzero_ps(); }

  // acc += the 4 unsigned bytes of each lane by the 4 signed bytes at x. Nibbles only: other instruction sets saturate beyond.
  static Ints dot_nibbles(Ints acc, Bytes w, std::int32_t x) { return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x)); }
  static Ints dot_bytes(Ints acc, Bytes w, std::int32_t x) { return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x)); }

  // q - zero without a conversion: the bits of q become the lowest ones that count of a float's mantissa (place.h).
  static constexpr int kExactRows = 8;  // at a time
  static constexpr int exact_strips(int rows) { return rows <= 4 ? 4 : 2; }
  template <int bits>
  struct Zeros { Floats offset[kOffsets<bits>]; };
  template <int bits>
  static Zeros<bits> zeros(Floats zero) {
    Zeros<bits> z;
    for (int i = 0; i < kOffsets<bits>; i++) z.offset[i] = _mm512_add_ps(zero, _mm512_castsi512_ps(_mm512_set1_epi32(one_at(bits * i))));
    return z;
  }
  template <int bits>
  static Bytes far(Bytes v) { return _mm512_srli_epi32(v, kFar<bits>); }
  // Input i of a line, whose bytes are `near` and, shifted, `far`.
  template <int bits, int i>
  static Floats centred(Bytes near, Bytes far, const Zeros<bits>& zero) {
    constexpr Place at = place<bits>(i);
    const __m512i mask = _mm512_set1_epi32(((1 << bits) - 1) << at.bit), one = _mm512_set1_epi32(one_at(at.bit));
    const __m512i number = _mm512_ternarylogic_epi32(at.far ? far : near, mask, one, 0xEA);  // bytes & mask | one
    return _mm512_sub_ps(_mm512_castsi512_ps(number), zero.offset[at.bit / bits]);
  }

  static Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
  static Floats broadcast(float v) { return _mm512_set1_ps(v); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats multiply_subtract_from(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }

  static Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static Floats load_half(const std::uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Floats load_bfloat(const std::uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  static Floats load_u8(const std::uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }

  static constexpr int kTile = 16;  // accumulators that leave registers for what they are made of
  static constexpr int kStripRows = 8, kManyRows = 6;  // at a time: of no more than so many, and of more
  static constexpr int rounded_strips(int rows, int bits) {
    if (rows == 1 || (rows == 2 && bits == 8)) return 1;  // memory is faster in few streams
    return bits == 4 && (rows == 3 || rows == 4) ? 4 : 2;
  }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  // Where one of them is NaN, the second.
  static Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static Floats round(Floats v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // v * 2^n for whole n from -150 to 128.
  static Floats times_power_of_two(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }
  static float largest_lane(Floats v) { return _mm512_reduce_max_ps(v); }

  // The sum of the lanes, in one order.
  static float sum(Floats v) {
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
  }

  // The largest magnitude of n floats, n a multiple of 16; NaN counts for nothing here, and shows in what is rounded.
  static float largest(const float* x, int n) {
    __m512 most = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) most = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(x + i)), most);
    return _mm512_reduce_max_ps(most);
  }
  // x * by, rounded to even, as signed bytes; their sum.
  static std::int32_t round_to_bytes(const float* x, int n, float by, std::int8_t* out) {
    __m512i total = _mm512_setzero_si512();
    const __m512 factor = _mm512_set1_ps(by);
    for (int i = 0; i < n; i += 16) {
      const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), factor));
      const __m128i bytes = _mm512_cvtsepi32_epi8(v);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), bytes);
      total = _mm512_add_epi32(total, _mm512_cvtepi8_epi32(bytes));
    }
    return _mm512_reduce_add_epi32(total);
  }
};

}  // namespace
}  // namespace gptq_cpu
