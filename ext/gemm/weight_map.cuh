// The tensor map of a packed weight, as the wgmma kernels load it.
#pragma once
#include "common/tensor_map.cuh"

namespace gptq {

// [strips][chunks][bytes of a chunk], in units of 8 bytes; a box is one chunk of `box_strips` strips.
inline bool map_weight(CUtensorMap& map, const void* weight, int strips, int chunks, int chunk_bytes, int box_strips) {
  const EncodeTensorMap encode = tensor_map_encoder();
  if (encode == nullptr) return false;
  const cuuint64_t chunk = static_cast<cuuint64_t>(chunk_bytes);
  const cuuint64_t size[3] = {chunk / 8, static_cast<cuuint64_t>(chunks), static_cast<cuuint64_t>(strips)},
                   stride[2] = {chunk, chunk * chunks};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(chunk / 8), 1, static_cast<cuuint32_t>(box_strips)}, step[3] = {1, 1, 1};
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT64, 3, const_cast<void*>(weight), size, stride, box, step,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace gptq
