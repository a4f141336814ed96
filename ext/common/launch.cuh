// How kernels are launched: their limits set once per device, and, where the device can, beside the end of the kernel before them.
#pragma once
#include <cstdint>
#include <cstdlib>

#include "common/device.cuh"

namespace gptq {

// Lets a kernel have `smem` bytes per block, at its first launch on a device. `done`: the kernel's, a bit per device. All ask for the
// largest part of an SM's memory as shared: kernels that divide it differently wait for each other to drain, which undoes their overlap.
inline cudaError_t set_limits(const void* kernel, std::atomic<uint64_t>& done, int smem, const Device& device) {
  if (device.id < 64 && (done.load(std::memory_order_acquire) >> device.id & 1)) return cudaSuccess;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (status == cudaSuccess && device.id < 64) done.fetch_or(uint64_t{1} << device.id, std::memory_order_release);
  return status;
}

// Whether kernels may begin beside the end of those before them. With GPTQ_CUDA_OVERLAP=0 in the environment none does, and no bit of any
// result may change: the strongest test of what they wait for.
inline bool overlap_is_allowed() {
  static const bool allowed = [] {
    const char* said = std::getenv("GPTQ_CUDA_OVERLAP");
    return said == nullptr || said[0] != '0';
  }();
  return allowed;
}

struct Launch {
  dim3 grid;
  int threads, smem;
  cudaStream_t stream;
  int cluster = 1;         // blocks
  bool overlapped = true;  // programmatic dependent launch, for kernels that call grid_wait(); only where their code has it
};

// args: of exactly the types of the kernel's parameters.
template <typename... Args>
cudaError_t launch_kernel(const void* kernel, const Launch& how, const Device& device, const Args&... args) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = how.grid;
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = how.smem;
  config.stream = how.stream;
  config.attrs = attributes;
  if (how.overlapped && device.code >= 90 && overlap_is_allowed()) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (how.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(how.cluster), 1, 1};
  }
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  return cudaLaunchKernelExC(&config, kernel, pointers);
}

}  // namespace gptq
