// Linear layers on the CPU: quantized weights by int8 activations with integer sums or by float32 ones, and dense 16-bit weights with
// float sums.
#pragma once
#include <cstdint>

#include "cpu/ops.h"

namespace gptq_cpu {

constexpr int kStrip = 16;  // outputs that are computed together
constexpr int kSideBySide = 4;  // strips that few rows are multiplied by at the same time, if they are given as many

// A quantized weight, K inputs in the packed order (a multiple of `group`), N outputs in strips of 16 (the last one padded).
struct Quantized {
  // 4 bits: [N / 16][K / 8][16][4], where byte b of a lane has input 8j + b in its lower half and 8j + 4 + b in its upper one.
  // 8 bits: [N / 16][K / 4][16][4]
  const std::uint8_t* q;
  const void* scales;      // kind[N / 16][K / group][16]
  const std::uint8_t* zeros;  // of the same shape
  const std::int32_t* order;  // [K]: the input at each packed place, -1 for a place that pads; null: in order
  int N, K, inputs, group, bits;
  Kind kind;
  bool exact;  // x is multiplied as it is, and not rounded to bytes
};

// A processor on its own reads ahead less than its memory could give.
constexpr int kAhead = 4096;

// Rows of x as one weight takes them: bytes and, for each group of a row, the scale and the sum of the bytes; or, exact, the packed
// order of its numbers.
struct Rows {
  std::int8_t* bytes;    // [M][ld]
  float* scales;         // [M][K / group]
  std::int32_t* sums;    // [M][K / group]
  float* places;         // [M][ld]
  std::int64_t ld;       // K and a little: rows a power of two apart would push each other out of the cache
};

// One instruction set's way.
struct Ways {
  const char* name;
  // The groups [first, last) of one row of x, float32 [inputs], into row m of `rows`.
  void (*quantize)(const Quantized& w, const float* x, int m, int first, int last, const Rows& rows);
  // y[m, 16s + n] for the strips [first, last) and M rows; y is float32 with `ld` floats from row to row. A row's sum has one order.
  void (*multiply)(const Quantized& w, const Rows& rows, int M, int first, int last, float* y, std::int64_t ld);
  // The groups [first, last) of one row of x, float32 [inputs], in the packed order and padded by zeros: out is float32 [K]. Where
  // `order` is null and inputs are K, x is in this form as it is.
  void (*gather)(const Quantized& w, const float* x, int first, int last, float* out);
  // y as in `multiply`, of rows that `gather` gave, ldx floats apart: float32 products and sums, nothing rounded before.
  void (*multiply_exact)(const Quantized& w, const float* x, std::int64_t ldx, int M, int first, int last, float* y, std::int64_t ldy);
  // y[m, n] = sum of x[m, k] w[n, k] for outputs [first, last); x and y float32. Any K.
  void (*dense)(const void* w, Kind kind, int K, const float* x, std::int64_t ldx, int M, int first, int last, float* y, std::int64_t ldy);
  const Ops* ops;
};

const Ways& portable();
#ifdef GPTQ_CPU_AVX2
const Ways& avx2();
#endif
#ifdef GPTQ_CPU_AVXVNNI
const Ways& avxvnni();
#endif
#ifdef GPTQ_CPU_AVX512
const Ways& avx512();
#endif
#ifdef GPTQ_CPU_AMX
const Ways& amx();
#endif

}  // namespace gptq_cpu
