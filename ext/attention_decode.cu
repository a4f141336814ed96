#include "attention_decode.h"

#include <algorithm>
#include <atomic>

#include "attention_decode_parts.h"
#include "attention_decode_table.h"
#include "device.h"

namespace gptq {
namespace {

constexpr int kBlocksPerSM = 2;

template <int D>
int smem_of(bool fp8, int part_heads, bool small) {
  return fp8 ? attention_smem<D, true>(part_heads, small) : attention_smem<D, false>(part_heads, small);
}

// Equal parts of at most kPartHeads query heads.
int parts_of(int group) { return (group + kPartHeads - 1) / kPartHeads; }
int part_heads_of(int group) { return (group + parts_of(group) - 1) / parts_of(group); }

// Limits of a kernel on a device, set at its first launch there. All kernels ask for the same carveout, or they could not overlap.
cudaError_t prepare(const void* kernel, int index, const Device& device) {
  constexpr int kDevices = 64;
  static std::atomic<bool> done[kDevices][8];
  if (device.id < kDevices && done[device.id][index].load(std::memory_order_acquire)) return cudaSuccess;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.smem);
  if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (status == cudaSuccess && device.id < kDevices) done[device.id][index].store(true, std::memory_order_release);
  return status;
}

}  // namespace

void complete(AttentionDecodeArgs& args) {
  const int group = args.heads / args.kv_heads;
  args.parts = parts_of(group), args.part_heads = part_heads_of(group);
  for (args.block_shift = 3; 1 << args.block_shift < args.block_size;) args.block_shift++;
}

bool attention_decode_takes(int head_dim) { return attention_decode_fp16(head_dim, false) != nullptr; }

size_t attention_decode_workspace_bytes(int heads, int kv_heads, int head_dim) {
  Device device;
  if (current_device(device) != cudaSuccess) return 0;
  return size_t{4} * device.sms * kBlocksPerSM * kMaxChunks * slot_floats(head_dim, part_heads_of(heads / kv_heads));
}

cudaError_t launch_attention_decode(AttentionDecodeArgs args, int head_dim, bool bf16, bool fp8, int blocks_per_sm, cudaStream_t stream) {
  const void* kernel = bf16 ? attention_decode_bf16(head_dim, fp8) : attention_decode_fp16(head_dim, fp8);
  const int size = args.block_size;
  if (!kernel || args.sequences < 1 || args.heads % args.kv_heads || size < 8 || (size & (size - 1))) return cudaErrorInvalidValue;
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  const int index = ((head_dim == 64 ? 0 : 1) * 2 + bf16) * 2 + fp8;
  if (const cudaError_t status = prepare(kernel, index, device); status != cudaSuccess) return status;
  complete(args);
  const bool small = has_small_shared_memory(device.capability);
  const int smem = (head_dim == 64 ? smem_of<64> : smem_of<128>)(fp8, args.part_heads, small);
  if (smem > device.smem) return cudaErrorInvalidConfiguration;
  const int resident = 2 * (smem + 1024) <= device.smem + 1024 ? kBlocksPerSM : 1;
  const int64_t items = int64_t{args.sequences} * args.kv_heads * args.parts;
  const int64_t steps = items * ((int64_t{args.table_stride} * size + kStep - 1) / kStep);
  // Where there is little to do, the next kernel's weights are better company for a block than a second block: 8 us a layer at batch 1.
  const int per_sm = blocks_per_sm ? std::min(blocks_per_sm, kBlocksPerSM) : 2 * items <= device.sms ? 1 : resident;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(steps, device.sms * per_sm)));
  config.blockDim = dim3(kAttentionThreads);
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = device.capability >= 90 ? 1 : 0;
  void* pointers[] = {&args};
  return cudaLaunchKernelExC(&config, kernel, pointers);
}

}  // namespace gptq
