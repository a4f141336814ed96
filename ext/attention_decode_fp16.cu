#include "attention_decode_kernel.h"
#include "attention_decode_table.h"

namespace gptq {

const void* attention_decode_fp16(int head_dim, bool fp8) {
  const auto pick = [&](auto plain, auto small) { return fp8 ? reinterpret_cast<const void*>(small) : reinterpret_cast<const void*>(plain); };
  switch (head_dim) {
    case 64: return pick(attention_decode_kernel<64, false, false>, attention_decode_kernel<64, false, true>);
    case 128: return pick(attention_decode_kernel<128, false, false>, attention_decode_kernel<128, false, true>);
    default: return nullptr;
  }
}

}  // namespace gptq
