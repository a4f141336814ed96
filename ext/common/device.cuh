// What the launchers ask the current device, once.
#pragma once
#include <cuda_runtime.h>

#include <atomic>
#include <utility>

namespace gptq {

struct Device {
  int id, sms, smem;  // smem: bytes one block may ask for
  int capability;     // 10 * major + minor
};

inline cudaError_t current_device(Device& out) {
  constexpr int kMax = 64;
  static std::atomic<long long> known[kMax];  // sms | smem << 16 | capability << 40; 0 = not asked yet
  int id;
  if (const cudaError_t status = cudaGetDevice(&id); status != cudaSuccess) return status;
  long long packed = id < kMax ? known[id].load(std::memory_order_relaxed) : 0;
  if (!packed) {
    int sms, smem, major, minor;
    for (const auto& [value, attribute] :
         {std::pair{&sms, cudaDevAttrMultiProcessorCount}, std::pair{&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin},
          std::pair{&major, cudaDevAttrComputeCapabilityMajor}, std::pair{&minor, cudaDevAttrComputeCapabilityMinor}})
      if (const cudaError_t status = cudaDeviceGetAttribute(value, attribute, id); status != cudaSuccess) return status;
    packed = sms | static_cast<long long>(smem) << 16 | static_cast<long long>(10 * major + minor) << 40;
    if (id < kMax) known[id].store(packed, std::memory_order_relaxed);
  }
  out = {id, static_cast<int>(packed & 0xffff), static_cast<int>(packed >> 16 & 0xffffff), static_cast<int>(packed >> 40)};
  return cudaSuccess;
}

}  // namespace gptq
