// The instantiations, a translation unit for each type so that two cores compile side by side.
#pragma once

namespace gptq {

// A step of an item: a block, for one row or for several of a sequence; or a warp.
enum class AttendedBy : int { kBlock, kSharingBlock, kWarp };

// Null for a head_dim that is neither 64 nor 128.
const void* attention_decode_fp16(int head_dim, bool fp8, AttendedBy by);
const void* attention_decode_bf16(int head_dim, bool fp8, AttendedBy by);

}  // namespace gptq
