// The 24 instantiations, a translation unit for each type so that two cores compile side by side.
#pragma once

namespace gptq {

constexpr int kGemvKernels = 24;

// groups 1, 2, 4 per chunk; column_tiles 1 (M <= 8) or 2 (M <= 16).
const void* gemv_fp16(int groups, bool zeros, int column_tiles);
const void* gemv_bf16(int groups, bool zeros, int column_tiles);

}  // namespace gptq
