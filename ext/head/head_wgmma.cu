#include <algorithm>
#include <atomic>

#include "common/launch.cuh"
#include "common/tensor_map.cuh"
#include "head/head_wgmma_kernel.cuh"

namespace gptq {
namespace {

constexpr int kNormBytes = 20 << 10;  // shared memory of a block of the norm before, with what the driver keeps
constexpr int kWidest = 256;

struct Kernel {
  const void* function;
  int tokens, cluster, slot;
};

template <class S>
Kernel info() {
  return {reinterpret_cast<const void*>(head_wgmma_kernel<S>), S::TN, S::CL, S::kSlot + S::kBarrierBytes};
}
// From 32 tokens on two blocks bring those of a tile in together.
template <bool BF>
Kernel find_kernel(int tokens) {
  switch (tokens) {
    case 8: return info<WgmmaHead<BF, 8, 1>>();
    case 16: return info<WgmmaHead<BF, 16, 1>>();
    case 32: return info<WgmmaHead<BF, 32, 2>>();
    case 64: return info<WgmmaHead<BF, 64, 2>>();
    case 128: return info<WgmmaHead<BF, 128, 2>>();
    case 192: return info<WgmmaHead<BF, 192, 2>>();
    case 256: return info<WgmmaHead<BF, 256, 2>>();
  }
  return {};
}

// The narrowest that holds all tokens; of more than the widest holds, that which leaves fewest columns empty.
int choose_tile(int m) {
  for (const int tokens : {8, 16, 32, 64, 128, 192, 256})
    if (m <= tokens) return tokens;
  const auto padded = [&](int tokens) { return (m + tokens - 1) / tokens * tokens; };
  return padded(192) < padded(256) ? 192 : 256;
}

}  // namespace

cudaError_t launch_head_wgmma(const HeadProduct& call, cudaStream_t stream) {
  if (!head_takes(call)) return cudaErrorInvalidValue;
  const int wanted = call.tokens ? call.tokens : choose_tile(call.m);
  const Kernel kernel = call.bf16 ? find_kernel<true>(wanted) : find_kernel<false>(wanted);
  if (kernel.function == nullptr) return cudaErrorInvalidValue;
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  if (device.capability != 90) return cudaErrorNoKernelImageForDevice;
  HeadParams p = head_params(call, kernel.tokens, kernel.cluster);
  p.stages = (device.smem - kNormBytes) / kernel.slot;
  CUtensorMap weights, tokens;
  if (!map_rows(weights, call.weight, call.bf16, call.n, call.k, call.k, kHeadRows) ||
      !map_rows(tokens, call.x, call.bf16, call.m, call.k, call.ldx, kernel.tokens / kernel.cluster))
    return cudaErrorInvalidValue;
  static std::atomic<uint64_t> done[2][kWidest / 8 + 1];
  std::atomic<uint64_t>& mine = done[call.bf16][kernel.tokens / 8];
  if (const cudaError_t status = set_limits(kernel.function, mine, device.smem, device); status != cudaSuccess) return status;
  const int clusters = std::min(p.tiles, device.sms / kernel.cluster);
  const Launch how{dim3(clusters * kernel.cluster), kWgmmaThreads, p.stages * kernel.slot, stream, kernel.cluster};
  return launch_kernel(kernel.function, how, device, weights, tokens, p);
}

}  // namespace gptq
