// GPTQ tensors as in a checkpoint -> the strip stream of common/layout.cuh. Once per weight, at load.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace gptq {

struct PackArgs {
  const uint32_t* qweight;  // [K/8, N]: 8 inputs per word, little-endian
  const uint16_t* scales;   // fp16 [group_count, N]
  const uint8_t* zeros;     // [group_count, N], 0..16; null: all 8, and none is stored
  const int* perm;          // [K]: k-th input of the stream is input perm[k]; null: in order
  const int* columns;       // [N]: row i of the strips is output columns[i]; null: in order
  uint8_t* out;             // strip stream
  int N, K;
  int group_size;  // inputs per row of `scales`, after sorting; at least K rounded up to a chunk where there is one group
  int group_count;
};

// `groups`: groups per chunk, 1, 2 or 4.
cudaError_t launch_pack(const PackArgs& args, int groups, cudaStream_t stream);

}  // namespace gptq
