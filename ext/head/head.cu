#include "head/head.h"

#include <algorithm>
#include <atomic>

#include "common/launch.cuh"
#include "head/head_table.cuh"

namespace gptq {
namespace {

constexpr int kWidest = 128;
constexpr int kNormBytes = 20 << 10;  // shared memory of a block of the norm before, with what the driver keeps

// The narrowest that holds all tokens.
int choose_tile(int m) {
  for (const int tokens : kHeadTiles)
    if (m <= tokens) return tokens;
  return kWidest;
}

// As many slots as fit, beside a block of the norm if that costs none of the first three.
int depth_for(int tokens, int smem) {
  const auto in = [&](int budget) { return std::min(kHeadMaxDepth, budget / head_slot_bytes(tokens)); };
  return std::max(in(smem - kNormBytes), std::min(kHeadMinDepth, in(smem)));
}

}  // namespace

cudaError_t launch_head(const HeadProduct& call, cudaStream_t stream) {
  if (!head_takes(call)) return cudaErrorInvalidValue;
  const int tokens = call.tokens ? call.tokens : choose_tile(call.m);
  const void* kernel = (call.bf16 ? head_bf16 : head_fp16)(tokens);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  HeadParams p = head_params(call, tokens, 1);
  p.stages = depth_for(tokens, device.smem);
  if (p.stages < kHeadMinDepth) return cudaErrorInvalidConfiguration;
  static std::atomic<uint64_t> done[2][kWidest / 8 + 1];
  if (const cudaError_t status = set_limits(kernel, done[call.bf16][tokens / 8], device.smem, device); status != cudaSuccess) return status;
  const int blocks = std::min(p.tiles, device.sms);
  return launch_kernel(kernel, {dim3(blocks), kHeadThreads, p.stages * head_slot_bytes(tokens), stream}, device, p);
}

}  // namespace gptq
