// Packed weight -> 16-bit matrix, for GEMMs that another library does better.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/pairing.h"

namespace gptq {

struct DequantArgs {
  const uint8_t* w;  // strip stream
  uint16_t* out;     // rows of K, row stride ldo elements (a multiple of 8), k in the order of the stream
  int N, K, ldo;
  int strip_first, strip_count;  // what to write, 16 rows each; paired: the 8 gates of every strip, then the 8 ups of every strip
  int paired;                    // a Pairing; of planes, the 8 outputs of every strip
};

cudaError_t launch_dequant(const DequantArgs& args, int groups, bool zeros, bool bf16, cudaStream_t stream);

struct GatherArgs {
  const uint16_t* x;  // [M, K], row stride ldx
  const int* perm;    // [K]
  uint16_t* out;      // [M, K], row stride ldo: out[:, k] = x[:, perm[k]]. All three 16-byte aligned, K and strides multiples of 8
  int M, K, ldx, ldo;
};

// For act-order where the activations are too large to sort in a kernel's own shared memory.
cudaError_t launch_gather(const GatherArgs& args, cudaStream_t stream);

}  // namespace gptq
