#include "attention/attention_decode.h"

#include <algorithm>
#include <atomic>

#include "attention/attention_decode_shape.cuh"
#include "attention/attention_decode_table.cuh"
#include "common/launch.cuh"

namespace gptq {
namespace {

constexpr int kMaxBlocksPerSM = 2;
constexpr int kAloneMinItems = 8, kAloneMinItemsE4m3 = 4;  // (sequence, key head) items per SM from which warps attend alone

constexpr int kAloneMaxContext = kStepTokens * kMaxChunks;  // tokens, up to which a step is a chunk

template <class Team>
int smem_of(int head_dim, bool fp8, int part_heads) {
  if (head_dim == 64) return fp8 ? attention_smem<Team, 64, true>(part_heads) : attention_smem<Team, 64, false>(part_heads);
  return fp8 ? attention_smem<Team, 128, true>(part_heads) : attention_smem<Team, 128, false>(part_heads);
}

// Equal parts of at most kPartHeads query heads.
int parts_of(int group) { return (group + kPartHeads - 1) / kPartHeads; }
int part_heads_of(int group) { return (group + parts_of(group) - 1) / parts_of(group); }

}  // namespace

size_t attention_decode_workspace_bytes(int heads, int kv_heads, int head_dim) {
  Device device;
  if (current_device(device) != cudaSuccess) return 0;
  return size_t{4} * device.sms * kMaxBlocksPerSM * kAttentionWarps * kMaxChunks * slot_floats(head_dim, part_heads_of(heads / kv_heads));
}

cudaError_t launch_attention_decode(AttentionDecodeArgs args, int head_dim, bool bf16, bool fp8, int blocks_per_sm, Teams teams,
                                    cudaStream_t stream) {
  const int size = args.block_size;
  if (args.sequences < 1 || args.heads % args.kv_heads || size < 8 || (size & (size - 1))) return cudaErrorInvalidValue;
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  const int group = args.heads / args.kv_heads;
  args.parts = parts_of(group), args.part_heads = part_heads_of(group);
  args.group_rows = args.groups ? kPartHeads / args.part_heads : 1;
  args.inverse = (64 + args.part_heads - 1) / args.part_heads;
  for (args.block_shift = 3; 1 << args.block_shift < size;) args.block_shift++;
  // With groups as few as they can be.
  const int64_t items = int64_t{(args.sequences + args.group_rows - 1) / args.group_rows} * args.kv_heads * args.parts;
  const int64_t context = int64_t{args.table_stride} * size;
  const int64_t steps = items * ((context + kStepTokens - 1) / kStepTokens);
  const bool can_be_alone = context <= kAloneMaxContext && !args.out_index && !args.groups;
  if (teams == Teams::kWarps && !can_be_alone) return cudaErrorInvalidValue;
  const bool alone = teams == Teams::kWarps ||
                     (teams == Teams::kBest && can_be_alone && items >= int64_t{fp8 ? kAloneMinItemsE4m3 : kAloneMinItems} * device.sms);
  const AttendedBy by = alone ? AttendedBy::kWarp : args.groups ? AttendedBy::kSharingBlock : AttendedBy::kBlock;
  const void* kernel = (bf16 ? attention_decode_bf16 : attention_decode_fp16)(head_dim, fp8, by);
  if (!kernel) return cudaErrorInvalidValue;
  static std::atomic<uint64_t> done[2][2][2][3];
  std::atomic<uint64_t>& mine = done[head_dim == 64][bf16][fp8][static_cast<int>(by)];
  if (const cudaError_t status = set_limits(kernel, mine, device.smem, device); status != cudaSuccess) return status;
  const int smem = (alone ? smem_of<OneWarp> : smem_of<WholeBlock>)(head_dim, fp8, args.part_heads);
  if (smem > device.smem) return cudaErrorInvalidConfiguration;
  const int resident = 2 * (smem + 1024) <= device.smem + 1024 ? kMaxBlocksPerSM : 1;
  // Where items are few, an SM does more with one block and one of the GEMV before or after than with two blocks of this kernel.
  const int per_sm = blocks_per_sm ? std::min(blocks_per_sm, kMaxBlocksPerSM) : 2 * items <= device.sms ? 1 : resident;
  const int64_t blocks = std::min<int64_t>(alone ? (steps + kAttentionWarps - 1) / kAttentionWarps : steps, device.sms * per_sm);
  return launch_kernel(kernel, {dim3(static_cast<unsigned>(blocks)), kAttentionThreads, smem, stream}, device, args);
}

}  // namespace gptq
