#include "attention_decode_kernel.h"
#include "attention_decode_table.h"

namespace gptq {

const void* attention_decode_fp16(int head_dim, bool fp8, bool alone) { return attention_decode_of<false>(head_dim, fp8, alone); }

}  // namespace gptq
