#include "gemv/gemv.h"

#include <algorithm>
#include <atomic>

#include "common/launch.cuh"
#include "gemv/gemv_kernel.cuh"
#include "gemv/gemv_table.cuh"

namespace gptq {
namespace {

constexpr int kReserved = 1024;  // shared memory the driver keeps per block
constexpr int kDevices = 64;
constexpr int kGoodDepth = 4;              // slots; with less, memory waits for the SMs
constexpr int kNormBytes = 20 << 10;       // shared memory of a block of RMSNorm in act-order, with what the driver keeps
constexpr int kAttentionBytes = 72 << 10;  // shared memory of a block of the decode attention, with what the driver keeps
constexpr int kShareMinM = 2;              // tokens from which blocks bring x in together

struct GemvShape {
  int cluster;  // blocks that share k
  GemvPlan plan;
};

// How many segments of k are added up by themselves: by K, format and device alone, so that the order of a row's sum is the same for every
// M. One for each block of the cluster that eight tokens need beside a ring.
int split_for(int K, int groups, bool zeros, const Device& device) {
  int split = 1;
  while (split < kMaxCluster && plan_gemv(8, K, 1, split, split, kGoodDepth, 1, groups, zeros).total > device.smem) split *= 2;
  return split;
}

// One block for all of k where x fits beside a ring: where sums cross blocks, a kernel ends half a microsecond later. Room is left for a
// block of the attention, or else of a norm, which then begins beside the GEMV before it, if that costs no ring worth having. With
// `in_a_row` two launches of the GEMV share an SM, and the next one's ring fills while this one drains; among other kernels that has blocks
// of a launch meet on some SMs while others have none: a 7B layer takes 49 us instead of 39.
bool choose_shape(GemvShape& shape, const Device& device, int M, int K, int column_tiles, int groups, bool zeros, bool in_a_row) {
  const int split = split_for(K, groups, zeros, device), chunks = (K + kChunkK - 1) / kChunkK;
  const auto fits = [&](int cluster, int budget, int depth, int least) {
    for (; depth >= least; depth--)
      for (int buffers = kMaxBuffers; buffers > 0; buffers--) {
        const GemvPlan plan = plan_gemv(M, K, column_tiles, split, cluster, depth, buffers, groups, zeros);
        if (plan.total > budget) continue;
        shape = {cluster, plan};
        return true;
      }
    return false;
  };
  if (chunks <= kMaxParts * kMathWarps) {
    if (in_a_row && M == 1 && fits(1, (device.smem + kReserved) / 2 - kReserved, kGoodDepth + 1, kGoodDepth - 1)) return true;
    if (fits(1, device.smem - kAttentionBytes, kMaxDepth, kGoodDepth)) return true;
    if (fits(1, device.smem - kNormBytes, kMaxDepth, kGoodDepth)) return true;
  }
  return fits(split, device.smem - kNormBytes, kMaxDepth, kGoodDepth) || fits(split, device.smem, kMaxDepth, 1);
}

cudaError_t prepare(const void* kernel, int index, const Device& device) {
  static std::atomic<uint64_t> done[kGemvKernels];
  return set_limits(kernel, done[index], device.smem, device);
}

// How many clusters run at once: fewer than SMs / size where the SMs of a GPC are no multiple of it, and one too many would take a second
// turn.
cudaError_t resident_clusters(int& count, int cluster, const Device& device) {
  static std::atomic<int> known[kDevices][4];
  const int slot = cluster == 1 ? 0 : cluster == 2 ? 1 : cluster == 4 ? 2 : 3;
  count = cluster == 1 ? device.sms : device.id < kDevices ? known[device.id][slot].load(std::memory_order_relaxed) : 0;
  if (count) return cudaSuccess;
  const void* kernel = gemv_fp16(1, false, 1);
  if (const cudaError_t status = prepare(kernel, 0, device); status != cudaSuccess) return status;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(device.sms / cluster * cluster);
  config.blockDim = dim3(kGemvThreads);
  config.dynamicSmemBytes = device.smem;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (const cudaError_t status = cudaOccupancyMaxActiveClusters(&count, kernel, &config); status != cudaSuccess) return status;
  count = std::min(count, device.sms / cluster);
  if (count < 1) return cudaErrorInvalidConfiguration;
  if (device.id < kDevices) known[device.id][slot].store(count, std::memory_order_relaxed);
  return cudaSuccess;
}

cudaError_t launch_rows(GemvArgs args, int groups, bool zeros, bool bf16, bool in_a_row, const Device& device, cudaStream_t stream) {
  const int tiles = args.M <= 8 ? 1 : 2, strips = args.N / kStripRows;
  const void* kernel = bf16 ? gemv_bf16(groups, zeros, tiles) : gemv_fp16(groups, zeros, tiles);
  const int index = (((tiles - 1) * 3 + groups / 2) * 2 + zeros) * 2 + bf16;
  if (const cudaError_t status = prepare(kernel, index, device); status != cudaSuccess) return status;
  if (takes_portable_kernel(device.code)) {
    const int blocks = std::min(strips, device.sms);
    args.plan = plan_portable(args.M, (strips + blocks - 1) / blocks, device.smem, groups, zeros);
    if (args.plan.depth < 2) return cudaErrorInvalidConfiguration;
    args.plan.strips = strips / blocks;
    args.plan.spare = strips % blocks;
    return launch_kernel(kernel, {dim3(blocks), kPortableThreads, args.plan.total, stream, 1, false}, device, args);
  }
  GemvShape shape;
  if (!choose_shape(shape, device, args.M, args.K, tiles, groups, zeros, in_a_row)) return cudaErrorInvalidConfiguration;
  // x of 8 tokens is as much as the weights of a small linear; read once for two blocks, it takes the L2 half the time. But never so that M
  // decides which block has which strips.
  bool share_x = device.capability == 90 && shape.cluster == 1 && args.M >= kShareMinM && strips >= device.sms;
  int clusters;
  if (share_x) {
    if (const cudaError_t status = resident_clusters(clusters, 2, device); status != cudaSuccess) return status;
    share_x = 2 * clusters == device.sms;
  }
  const int cluster = share_x ? 2 : shape.cluster;
  if (const cudaError_t status = resident_clusters(clusters, cluster, device); status != cudaSuccess) return status;
  const int owners = share_x ? 2 * clusters : std::min(clusters, strips);  // blocks, or clusters, with strips of their own
  args.plan = shape.plan;
  args.plan.share_x = share_x;
  args.plan.strips = strips / owners;
  args.plan.spare = strips % owners;
  return launch_kernel(kernel, {dim3(share_x ? owners : owners * cluster), kGemvThreads, shape.plan.total, stream, cluster}, device, args);
}

}  // namespace

cudaError_t gemv_segment(int& chunks, int K, int groups, bool zeros) {
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  const int split = takes_portable_kernel(device.code) ? 1 : split_for(K, groups, zeros, device);
  chunks = plan_gemv(1, K, 1, split, split, 1, 1, groups, zeros).share;
  return cudaSuccess;
}

cudaError_t launch_gemv(GemvArgs args, int groups, bool zeros, bool bf16, bool in_a_row, cudaStream_t stream) {
  if (args.M < 1 || args.M > kGemvMaxM || args.N % kStripRows || args.K % 8 || args.paired < kApart || args.paired > kPlanesGate ||
      (args.paired == kPlanesGate && args.residual == nullptr) || (args.f32 && args.residual != nullptr))
    return cudaErrorInvalidValue;
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  // As many rows at a time as x fits in shared memory.
  GemvShape shape;
  const bool sixteen =
      !takes_portable_kernel(device.code) && choose_shape(shape, device, std::min(args.M, 16), args.K, 2, groups, zeros, false);
  const int step = sixteen ? 16 : kPortableMaxM;
  for (int row = 0; row < args.M; row += step) {
    GemvArgs part = args;
    part.M = std::min(step, args.M - row);
    part.x += static_cast<size_t>(row) * args.ldx;
    part.y = static_cast<uint8_t*>(args.y) + static_cast<size_t>(row) * args.ldy * (args.f32 ? sizeof(float) : sizeof(uint16_t));
    if (part.residual) part.residual += static_cast<size_t>(row) * args.ldr;
    if (const cudaError_t status = launch_rows(part, groups, zeros, bf16, in_a_row, device, stream); status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace gptq
