#include "head/head_kernel.cuh"

namespace gptq {
const void* head_fp16(int tokens) { return find_head_kernel<false>(tokens); }
}  // namespace gptq
