// Whether bytes are what they were: 64 bits, at the speed of memory. Against damage, not against people.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace gptq_cpu {

// Eight sums run side by side, as many as a processor multiplies at a time. Each step is one-to-one in the word and in the sum before
// it, so whatever is wrong within one word of 8 bytes always shows.
inline std::uint64_t checksum(const std::uint8_t* data, std::size_t size) {
  constexpr int kSums = 8;
  constexpr std::size_t kBlock = kSums * sizeof(std::uint64_t);
  const auto step = [](std::uint64_t sum, std::uint64_t word) {
    sum = (sum ^ word) * 0x9e3779b97f4a7c15u;  // odd, its bits without a pattern
    return sum ^ sum >> 32;
  };
  std::uint64_t sums[kSums] = {1, 2, 3, 4, 5, 6, 7, 8}, words[kSums];
  std::size_t left = size;
  for (; left >= kBlock; data += kBlock, left -= kBlock) {
    std::memcpy(words, data, kBlock);
    for (int i = 0; i < kSums; i++) sums[i] = step(sums[i], words[i]);
  }
  std::memset(words, 0, kBlock);
  std::memcpy(words, data, left);
  std::uint64_t all = size;
  for (int i = 0; i < kSums; i++) all = step(all, step(sums[i], words[i]));
  return all;
}

}  // namespace gptq_cpu
