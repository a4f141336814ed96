// Attention of one new token per sequence over its paged context, with what surrounds it in a pure decode step: qk-norm, rotary embedding
// and the write of the new key and value; and of several tokens of a sequence, one after another, which share one reading of the context.
// See attention_decode_kernel.cuh.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace gptq {

struct AttentionDecodeArgs {
  const uint16_t* qkv;      // [rows, (heads + 2 kv_heads) head_dim], row stride ldqkv elements (a multiple of 8), 16-byte aligned
  uint8_t* cache;           // one layer's [blocks, 2, kv_heads, block_size, head_dim], activations' type or e4m3
  const int* block_tables;  // [sequences, table_stride]
  const int* context_lens;  // [sequences], 0: none
  const int* query_start;   // [sequences + 1]; a sequence without exactly one row is somebody else's
  uint16_t* out;            // [rows, heads head_dim], row stride ldo
  const int* out_index;     // [heads head_dim]: where in a row of out each output goes; or null: in order. Not for warps that attend alone
  // [sequences, 2], or null: each by itself. Consecutive entries that are consecutive tokens of one sequence (consecutive rows, contexts of
  // consecutive lengths, the same block table) may share a reading of the context, at most 8 / part_heads of them, whose first steps and
  // chunks (attention_decode_schedule.cuh) have to be the same. Of the first entry: (how many share, how many new tokens of the sequence
  // there are up to the last of them, at most kMaxNewRows where cos_sin is not null); of the others: 0, 0. Not for warps that attend alone.
  const int* groups;
  // Rotary and the write of the new row, where cos_sin is not null. Per row: positions, slot_mapping (-1: not cached).
  const int* positions;
  const int* slot_mapping;
  const float* cos_sin;    // [positions, head_dim]
  const uint16_t* q_norm;  // [head_dim] or null
  const uint16_t* k_norm;
  void* workspace;  // attention_decode_workspace_bytes, every byte 255 before the first launch; launches leave it so
  float eps, scale;
  int ldqkv, ldo, table_stride;
  int sequences, heads, kv_heads, block_size;  // block_size: a power of two from 8
  int window;                                  // tokens a row sees, itself included; 0: all
  // Block tables, lengths and the cache's older tokens were complete before the chain of dependent launches that this launch is part of
  // began.
  bool prefetch;
  // By launch_attention_decode():
  int block_shift;        // log2 of block_size
  int parts, part_heads;  // the query heads of a key head in parts of at most 8
  int group_rows;         // entries that share a reading at most
  int inverse;            // of part_heads: n / part_heads is n * inverse / 64 for n below 8
};

constexpr int kMaxNewRows = 8;

// Who attends to a step: the four warps of a block, or one; a warp alone takes contexts of up to 4096 tokens (by table_stride).
enum class Teams { kBest, kBlocks, kWarps };

// blocks_per_sm 0: chosen here. The bits of a result depend neither on it nor on `teams`.
cudaError_t launch_attention_decode(AttentionDecodeArgs args, int head_dim, bool bf16, bool fp8, int blocks_per_sm, Teams teams,
                                    cudaStream_t stream);

// For launches on the current device, of two blocks per SM; 0 where there is none.
size_t attention_decode_workspace_bytes(int heads, int kv_heads, int head_dim);

}  // namespace gptq
