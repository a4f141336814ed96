#include "cpu/pack.h"

namespace gptq_cpu {
namespace {

// Values run through the words of a column from the lowest bits on; with 3 bits, two of 32 reach into the next word.
void read(const std::int32_t* qweight, int N, int bits, int input, int column, int width, std::uint8_t* values) {
  const std::int64_t bit = static_cast<std::int64_t>(input) * bits;
  const std::int64_t word = bit / 32;
  const int shift = static_cast<int>(bit % 32), mask = (1 << bits) - 1;
  const std::int32_t* at = qweight + word * N + column;
  for (int i = 0; i < width; i++) {
    std::uint32_t value = static_cast<std::uint32_t>(at[i]) >> shift;
    if (shift + bits > 32) value |= static_cast<std::uint32_t>(at[i + N]) << (32 - shift);
    values[i] = static_cast<std::uint8_t>(value & static_cast<std::uint32_t>(mask));
  }
}

}  // namespace

void pack(const std::int32_t* qweight, int N, int bits, const std::int32_t* places, int K, std::uint8_t* out, int first, int last) {
  const int stored = bits == 8 ? 8 : 4, per_line = 32 / stored;  // of K, in 64 bytes
  for (int s = first; s < last; s++) {
    const int column = s * 16, width = N - column < 16 ? N - column : 16;
    std::uint8_t* line = out + static_cast<std::int64_t>(s) * K * 16 * stored / 8;
    for (int k = 0; k < K; k += per_line, line += 64) {
      for (int i = 0; i < 64; i++) line[i] = 0;
      for (int j = 0; j < per_line; j++) {
        if (places[k + j] < 0) continue;
        std::uint8_t values[16];
        read(qweight, N, bits, places[k + j], column, width, values);
        for (int lane = 0; lane < width; lane++) line[4 * lane + j % 4] |= static_cast<std::uint8_t>(values[lane] << (j >= 4 ? 4 : 0));
      }
    }
  }
}

}  // namespace gptq_cpu
