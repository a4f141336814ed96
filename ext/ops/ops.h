// What a layer does between its GEMMs: embedding, RMSNorm, rotary embedding with the write into the KV cache.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace gptq {

struct EmbedArgs {
  const int* history;     // [seats, ldh]: the tokens of every running sequence
  const int* row_seat;    // [T]
  const int* positions;   // [T], -1: zeros
  const uint16_t* table;  // [V, H]
  uint16_t* out;          // [T, H]
  int T, V, H, ldh;
};
cudaError_t launch_embed(const EmbedArgs& args, cudaStream_t stream);

struct RmsNormArgs {
  const uint16_t* x;       // [T, H], row stride ldx
  const uint16_t* weight;  // [H], in the order of out
  const int* perm;         // [H] or null: column i of out is column perm[i] of x
  uint16_t* out;           // [T, H], row stride ldo
  int T, H, ldx, ldo;
  float eps;
};
constexpr int kMaxWidth = 16384;  // two rows of 16-bit elements fit into shared memory
cudaError_t launch_rms_norm(const RmsNormArgs& args, bool bf16, cudaStream_t stream);

struct RopeArgs {
  uint16_t* qkv;             // [T, (Hq + 2 Hkv) D], row stride ldq; q and k are rotated in place
  const int* positions;      // [T], -1: row is skipped
  const int* slot_mapping;   // [T], block * block_size + offset, -1: not cached
  const float* cos_sin;      // [positions, D]: D/2 cosines, D/2 sines
  void* cache;               // [blocks, 2, Hkv, block_size, D]
  const uint16_t* q_norm;    // [D] or null
  const uint16_t* k_norm;    // [D] or null
  int T, num_heads, num_kv_heads, head_dim, block_size, ldq;
  float eps;
};
cudaError_t launch_rope_and_write(const RopeArgs& args, bool bf16, bool fp8_cache, cudaStream_t stream);

}  // namespace gptq
