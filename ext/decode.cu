#include "decode.h"

#include <algorithm>
#include <atomic>

#include "decode_kernel.h"
#include "decode_table.h"
#include "device.h"

namespace gptq {
namespace {

constexpr int kReserved = 1024;  // shared memory the driver keeps per block
constexpr int kDevices = 64;

struct Shape {
  int cluster, depth, buffers, smem;
};

// By K, format and device alone, so that the order of a row's sum is the same for every M: x of 8 tokens must fit. Halves of x are also faster to
// bring in: at K = 5120 a cluster of 2 costs nothing at M=1 and saves 5 % at M=8; at 4096 it costs 5 %.
int cluster_for(int K, int chunk, const Device& device) {
  const int nch = (K + kChunkK - 1) / kChunkK;
  int cluster = K <= 4096 ? 1 : 2;
  while (cluster < kMaxCluster && DecodeSmem(8, nch, 1, cluster, 2, 1, chunk, false).total > device.smem) cluster *= 2;
  return cluster;
}

// A ring of three slots such that two generations of blocks share a multiprocessor (the next kernel's rings then fill while this one drains), else
// the deepest ring that fits alone.
bool choose_shape(Shape& shape, const Device& device, int M, int K, int column_tiles, int chunk, bool gather) {
  const int nch = (K + kChunkK - 1) / kChunkK, cluster = cluster_for(K, chunk, device), half = (device.smem + kReserved) / 2 - kReserved;
  struct Try {
    int budget, depth, buffers;
  };
  for (const Try t : {Try{half, 3, 2}, Try{half, 3, 1}, Try{device.smem, 4, 2}, Try{device.smem, 3, 2}, Try{device.smem, 3, 1}, Try{device.smem, 2, 2},
                      Try{device.smem, 2, 1}, Try{device.smem, 1, 1}}) {
    const int total = DecodeSmem(M, nch, column_tiles, cluster, t.depth, t.buffers, chunk, gather).total;
    if (total > t.budget) continue;
    shape = {cluster, t.depth, t.buffers, total};
    return true;
  }
  return false;
}

// A kernel's limits are properties of it on a device, set at its first launch there. All ask for the largest shared memory of a multiprocessor:
// kernels that ask for different amounts wait for each other to drain, which undoes the overlap.
cudaError_t prepare(const void* kernel, int index, const Device& device) {
  static std::atomic<bool> done[kDevices][kDecodeKernels];
  if (device.id < kDevices && done[device.id][index].load(std::memory_order_acquire)) return cudaSuccess;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.smem);
  if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (status == cudaSuccess && device.id < kDevices) done[device.id][index].store(true, std::memory_order_release);
  return status;
}

// How many clusters run at once: fewer than SMs / size where the SMs of a GPC are no multiple of it, and one too many would take a second turn.
cudaError_t resident_clusters(int& count, int cluster, const Device& device) {
  static std::atomic<int> known[kDevices][4];
  const int slot = cluster == 1 ? 0 : cluster == 2 ? 1 : cluster == 4 ? 2 : 3;
  count = cluster == 1 ? device.sms : device.id < kDevices ? known[device.id][slot].load(std::memory_order_relaxed) : 0;
  if (count) return cudaSuccess;
  const void* kernel = decode_fp16(1, false, 1);
  if (const cudaError_t status = prepare(kernel, 0, device); status != cudaSuccess) return status;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(device.sms / cluster * cluster);
  config.blockDim = dim3(kDecodeThreads);
  config.dynamicSmemBytes = device.smem;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (const cudaError_t status = cudaOccupancyMaxActiveClusters(&count, kernel, &config); status != cudaSuccess) return status;
  count = std::min(count, device.sms / cluster);
  if (count < 1) return cudaErrorInvalidConfiguration;
  if (device.id < kDevices) known[device.id][slot].store(count, std::memory_order_relaxed);
  return cudaSuccess;
}

cudaError_t launch_rows(DecodeArgs args, int groups, bool zeros, bool bf16, const Device& device, cudaStream_t stream) {
  const int tiles = args.M <= 8 ? 1 : 2, chunk = chunk_bytes(groups, zeros), strips = args.N / kStripRows;
  const void* kernel = bf16 ? decode_bf16(groups, zeros, tiles) : decode_fp16(groups, zeros, tiles);
  const int index = (((tiles - 1) * 3 + groups / 2) * 2 + zeros) * 2 + bf16;
  if (const cudaError_t status = prepare(kernel, index, device); status != cudaSuccess) return status;
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};
  config.stream = stream;
  config.attrs = attributes;
  if (takes_portable_kernel(device.capability)) {
    config.gridDim = dim3(std::min(strips, 2 * device.sms));
    config.blockDim = dim3(kPortableWarps * 32);
    config.dynamicSmemBytes = portable_smem(tiles, chunk);
  } else {
    Shape shape;
    if (!choose_shape(shape, device, args.M, args.K, tiles, chunk, args.perm != nullptr)) return cudaErrorInvalidConfiguration;
    int clusters;
    if (const cudaError_t status = resident_clusters(clusters, shape.cluster, device); status != cudaSuccess) return status;
    args.depth = shape.depth;
    args.buffers = shape.buffers;
    config.gridDim = dim3(std::min(clusters, strips) * shape.cluster);
    config.blockDim = dim3(kDecodeThreads);
    config.dynamicSmemBytes = shape.smem;
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    if (shape.cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    }
  }
  void* pointers[] = {&args};
  return cudaLaunchKernelExC(&config, kernel, pointers);
}

}  // namespace

bool decode_gathers(int M, int K, int groups, bool zeros) {
  Device device;
  Shape shape;
  if (current_device(device) != cudaSuccess) return false;
  return takes_portable_kernel(device.capability) || (M <= 2 && choose_shape(shape, device, M, K, 1, chunk_bytes(groups, zeros), true));
}

cudaError_t launch_decode(DecodeArgs args, int groups, bool zeros, bool bf16, cudaStream_t stream) {
  if (args.M < 1 || args.M > kDecodeMaxM || args.N % kStripRows || args.K % 8) return cudaErrorInvalidValue;
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  // As many rows at a time as x fits in shared memory.
  Shape shape;
  const bool sixteen = takes_portable_kernel(device.capability) || choose_shape(shape, device, std::min(args.M, 16), args.K, 2, chunk_bytes(groups, zeros), false);
  const int step = sixteen ? 16 : 8;
  for (int row = 0; row < args.M; row += step) {
    DecodeArgs part = args;
    part.M = std::min(step, args.M - row);
    part.x += static_cast<size_t>(row) * args.ldx;
    part.y += static_cast<size_t>(row) * args.ldy;
    if (part.residual) part.residual += static_cast<size_t>(row) * args.ldr;
    if (const cudaError_t status = launch_rows(part, groups, zeros, bf16, device, stream); status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace gptq
