#include "head/head_kernel.cuh"

namespace gptq {
const void* head_bf16(int tokens) { return find_head_kernel<true>(tokens); }
}  // namespace gptq
