#include "attention/attention_decode_kernel.cuh"
#include "attention/attention_decode_table.cuh"

namespace gptq {

const void* attention_decode_fp16(int head_dim, bool fp8, AttendedBy by) { return attention_decode_of<false>(head_dim, fp8, by); }

}  // namespace gptq
