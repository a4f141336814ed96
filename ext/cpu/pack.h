// From the file's layout of a quantized weight to the one that the products read.
#pragma once
#include <cstdint>

namespace gptq_cpu {

// Strips [first, last) of 16 outputs of qweight, int32 [inputs * bits / 32][N], into `out` as linear.h describes it: K places, each the
// number of an input or -1, which is stored as 0. 2, 3 and 4 bits are stored as 4.
void pack(const std::int32_t* qweight, int N, int bits, const std::int32_t* places, int K, std::uint8_t* out, int first, int last);

}  // namespace gptq_cpu
