// Between the kernel's instantiations, a translation unit for each type, and the code that launches them.
#pragma once

namespace gptq {

// groups 1, 2, 4 per chunk.
const void* decode_layers_fp16(int groups, bool zeros);
const void* decode_layers_bf16(int groups, bool zeros);

}  // namespace gptq
