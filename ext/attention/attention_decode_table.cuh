// The instantiations, a translation unit for each type so that two cores compile side by side.
#pragma once

namespace gptq {

// Null for a head_dim that is neither 64 nor 128. `alone`: every warp by itself.
const void* attention_decode_fp16(int head_dim, bool fp8, bool alone);
const void* attention_decode_bf16(int head_dim, bool fp8, bool alone);

}  // namespace gptq
