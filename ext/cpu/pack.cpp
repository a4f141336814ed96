#include "cpu/pack.h"

namespace gptq_cpu {
namespace {

constexpr int kLanes = 16;

// ORs value `input` of each of the columns, moved to bit `at`, into the lanes. Values run through the words of a column from the lowest
// bits on; with 3 bits, two of 32 reach into the next word. The shifts are one for all lanes, so that compilers make vectors of them.
inline void add(const std::int32_t* column, int N, int width, int bits, int input, int at, std::uint32_t* lanes) {
  const std::int64_t bit = static_cast<std::int64_t>(input) * bits;
  const std::int32_t* word = column + bit / 32 * N;
  const int shift = static_cast<int>(bit % 32), rest = 32 - shift;
  const std::uint32_t mask = (1u << bits) - 1;
  if (rest < bits) {
    for (int i = 0; i < width; i++)
      lanes[i] |= ((static_cast<std::uint32_t>(word[i]) >> shift | static_cast<std::uint32_t>(word[i + N]) << rest) & mask) << at;
  } else {
    for (int i = 0; i < width; i++) lanes[i] |= ((static_cast<std::uint32_t>(word[i]) >> shift) & mask) << at;
  }
}

// Whether a line's eight inputs are one word of the file.
inline bool is_one_word(const std::int32_t* places) {
  if (places[0] < 0 || places[0] % 8 != 0) return false;
  for (int j = 1; j < 8; j++)
    if (places[j] != places[0] + j) return false;
  return true;
}

// The nibbles of a word in the order of a lane: 0 4 1 5 2 6 3 7.
inline std::uint32_t spread(std::uint32_t half) {
  half = (half | half << 8) & 0x00ff00ffu;
  return (half | half << 4) & 0x0f0f0f0fu;
}

}  // namespace

void pack(const std::int32_t* qweight, int N, int bits, const std::int32_t* places, int K, std::uint8_t* out, int first, int last) {
  const int stored = bits == 8 ? 8 : 4, per_line = 32 / stored;  // of K, in 64 bytes
  for (int s = first; s < last; s++) {
    const std::int32_t* column = qweight + s * kLanes;
    const int width = N - s * kLanes < kLanes ? N - s * kLanes : kLanes;
    auto* line = reinterpret_cast<std::uint32_t*>(out + static_cast<std::int64_t>(s) * K * kLanes * stored / 8);
    for (int k = 0; k < K; k += per_line, line += kLanes) {
      const std::int32_t* place = places + k;
      if (bits == 4 && width == kLanes && is_one_word(place)) {
        const std::int32_t* word = column + static_cast<std::int64_t>(place[0] / 8) * N;
        for (int i = 0; i < kLanes; i++) {
          const auto w = static_cast<std::uint32_t>(word[i]);
          line[i] = spread(w & 0xffff) | spread(w >> 16) << 4;
        }
        continue;
      }
      std::uint32_t lanes[kLanes] = {};
      for (int j = 0; j < per_line; j++) {
        if (place[j] < 0) continue;
        const int at = stored == 8 ? 8 * j : 8 * (j % 4) + 4 * (j / 4);
        if (width == kLanes)
          add(column, N, kLanes, bits, place[j], at, lanes);
        else
          add(column, N, width, bits, place[j], at, lanes);
      }
      for (int i = 0; i < kLanes; i++) line[i] = lanes[i];
    }
  }
}

}  // namespace gptq_cpu
